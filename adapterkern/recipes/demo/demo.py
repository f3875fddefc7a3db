"""The demo: adapters against a head alone, on a real LLaMA and real texts, in minutes on a CPU.

Backbone: the first 8 layers of SmolLM2-135M-Instruct. Texts: Reuters-21578 R8, eight topics of newswire. corpora.py
fetches both.
"""

import dataclasses
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from adapterkern.model.backbone import load_backbone
from adapterkern.model.config import AdapterConfig
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.demo.corpora import MODEL, R8_TEST, R8_TRAIN, column, draw_texts, obtain
from adapterkern.training.api import train
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.prefix import PrefixCache
from adapterkern.training.run.results import TrainResult
from adapterkern.training.saved import Sources

NUM_LAYERS = 8
TRAIN_TEXTS, EVAL_TEXTS = 1600, 600
ADAPTERS = AdapterConfig(adapter_dim=64, layers=(-3, -2, -1))
TRAINING = TrainConfig(epochs=3, batch_size=16, lr=2e-3, max_length=48, seed=0)


class Run(NamedTuple):
    """One line of the demo's table."""

    name: str
    trainable: int
    prefix_seconds: float
    train_seconds: float
    eval_seconds: float
    tokens_per_second: float
    accuracy: float


def run_demo(
    output: Path,
    model: str | None = None,
    train_file: Path | None = None,
    eval_file: Path | None = None,
    *,
    num_layers: int | None = NUM_LAYERS,
    progress: bool = True,
) -> list[Run]:
    """Train a head alone, then head + adapters with the same settings; print their table and save both in ``output``.

    ``output/adapters`` is what ``adapterkern eval`` takes.
    """
    if (train_file is None) != (eval_file is None):
        raise ValueError("train, eval: expected both files or neither")
    start = time.perf_counter()
    if train_file is None or eval_file is None:
        train_file = draw_texts(R8_TRAIN, TRAIN_TEXTS, TRAINING.seed)
        eval_file = draw_texts(R8_TEST, EVAL_TEXTS, TRAINING.seed, exclude=frozenset(column(train_file, "text")))
    source = model or os.fspath(obtain(MODEL))
    fetched = time.perf_counter()
    llama, tokenizer = load_backbone(source, num_layers=num_layers)
    torch.manual_seed(TRAINING.seed)
    adapted = LlamaAdapter(llama, ADAPTERS)
    layers, sites = len(adapted.layers), adapted.adapter_config().layers
    print(f"{type(llama).__name__}: {layers} layers, adapters after {', '.join(str(i) for i in sites or ())} (from 0)")
    cache = PrefixCache()
    runs: list[Run] = []
    # The adapters first: the head alone reads the end of the backbone, and goes there from their cached prefix.
    for name, folder, train_adapters in (("head + adapters", "adapters", True), ("head alone", "head", False)):
        config = dataclasses.replace(
            TRAINING, train_adapters=train_adapters, progress=progress, output_dir=output / folder, overwrite=True
        )
        sources = Sources(source, num_layers, eval_data=os.fspath(eval_file.resolve()))
        result = train(
            adapted,
            train_file,
            config,
            tokenizer=tokenizer,
            eval_data=eval_file,
            cache=cache,
            sources=sources,
        )
        if result.stopped:
            return runs
        runs.insert(0, _line(name, result))
    _print_table(runs, train_file, eval_file)
    print(f"{time.perf_counter() - fetched:.0f} s in all, {fetched - start:.0f} s before that for obtaining the files")
    print(f"saved in {output / 'adapters'}, with the curves in training.png; for the same accuracy again:")
    print(f"  adapterkern eval {output / 'adapters'}")
    return runs


def _line(name: str, result: TrainResult) -> Run:
    assert result.metrics is not None
    return Run(
        name,
        result.trainable_parameters,
        result.prefix_seconds,
        result.seconds,
        result.eval_seconds,
        result.tokens_per_second,
        result.metrics["accuracy"],
    )


def _print_table(runs: list[Run], train_file: Path, eval_file: Path) -> None:
    known, unseen = column(train_file, "label"), column(eval_file, "label")
    commonest = max(set(known), key=known.count)
    title = f"{len(known)} texts to learn from, {len(unseen)} unseen to test on, {len(set(known))} labels"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)  # narrow enough for 80 columns
    for heading in ("", "trainable", "prefix s", "train s", "eval s", "tokens/s", "accuracy"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_row(f"always {commonest!r}", "0", "", "", "", "", f"{unseen.count(commonest) / len(unseen):.1%}")
    for run in runs:
        seconds = (f"{s:.1f}" for s in (run.prefix_seconds, run.train_seconds, run.eval_seconds))
        table.add_row(run.name, f"{run.trainable:,}", *seconds, f"{run.tokens_per_second:,.0f}", f"{run.accuracy:.1%}")
    Console().print(table)
