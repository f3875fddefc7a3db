"""The demo's adapters over three seeds: in fp32 as before, and as the commands train them now.

Before: fp32, the C library's default malloc, the closed form. Now: --dtype auto, kept memory, the CPU kernels. Each
training has its own process; they take turns.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import torch

from adapterkern.cli.memory import keep_pages
from adapterkern.model.backbone import load_backbone
from adapterkern.model.fast_dtype import fast_dtype
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.demo import demo
from adapterkern.recipes.demo.corpora import MODEL, R8_TEST, R8_TRAIN, column, draw_texts, obtain
from adapterkern.training import train
from experiments import common

SEEDS = (0, 1, 2)
BEFORE, NOW = "before", "now"


def train_one(seed: int, how: str) -> dict[str, Any]:
    """One training of the demo's adapters: its accuracy, and the seconds of its parts."""
    if how == NOW:
        keep_pages()
    dtype = fast_dtype(common.CPU)[0] if how == NOW else "fp32"
    train_file = draw_texts(R8_TRAIN, demo.TRAIN_TEXTS, 0)
    eval_file = draw_texts(R8_TEST, demo.EVAL_TEXTS, 0, exclude=frozenset(column(train_file, "text")))
    llama, tokenizer = load_backbone(obtain(MODEL), num_layers=demo.NUM_LAYERS, dtype=dtype)
    torch.manual_seed(seed)
    model = LlamaAdapter(llama, demo.ADAPTERS)
    config = dataclasses.replace(demo.TRAINING, seed=seed, progress=False, plot=False)
    result = train(model, train_file, config, tokenizer=tokenizer, eval_data=eval_file)
    assert result.metrics is not None
    seconds = {"prefix_s": result.prefix_seconds, "train_s": result.seconds, "eval_s": result.eval_seconds}
    return {"seed": seed, "how": how, "dtype": dtype, "accuracy": result.metrics["accuracy"], **seconds}


def main() -> None:
    parser = common.make_parser("dtype", __doc__)
    parser.add_argument("--one", nargs=2, metavar=("SEED", "HOW"), help="one training, in this process")
    arguments = common.parse(parser)
    if arguments.one is not None:
        common.show(train_one(int(arguments.one[0]), arguments.one[1]))
        return
    rows = []
    for seed in SEEDS:
        for how in (BEFORE, NOW):
            environment = os.environ | ({"ADAPTERKERN_CPU_ISA": "none"} if how == BEFORE else {})
            command = [sys.executable, "-m", "experiments.dtype", "--one", str(seed), how]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            common.show(rows[-1])
            common.record(arguments.output / "dtype.json", rows=rows)


if __name__ == "__main__":
    main()
