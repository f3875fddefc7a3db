"""The demo: adapters against a head alone, on a real LLaMA and real texts, in minutes on a CPU.

Backbone: the first 8 layers of SmolLM2-135M-Instruct. Texts: Reuters-21578 R8, eight topics of newswire. corpora.py
downloads both.
"""

import contextlib
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
from adapterkern.training import processes
from adapterkern.training.api import train
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.prefix import PrefixCache
from adapterkern.training.run.lock import locked
from adapterkern.training.run.results import TrainResult
from adapterkern.training.saved import Sources

NUM_LAYERS = 8
TRAIN_TEXTS, EVAL_TEXTS = 1600, 600
ADAPTERS = AdapterConfig(adapter_dim=64, layers=(-3, -2, -1))
TRAINING = TrainConfig(epochs=3, batch_size=16, max_length=48, seed=0)


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
    dtype: str = "fp32",
    progress: bool = True,
) -> list[Run]:
    """Train head + adapters, then a head alone at its own rate; print their table and save both in ``output``.

    ``adapterkern eval output/adapters`` evaluates the first. With several processes rank 0 prints.

    Args:
        model: a ``.gguf`` file, transformers folder or hub name instead of SmolLM2-135M.
        train_file, eval_file: data with the columns text and label instead of Reuters R8; both or neither.
        num_layers: use only the first layers of the backbone; None uses all.
        dtype: of the backbone; see ``load_backbone``.
        progress: show progress bars.

    Returns:
        one line per run, the head alone first; fewer than two after Ctrl-C.

    Raises:
        DownloadError: model or texts could not be downloaded.
        DataError: unusable rows; the message names file and line.
        ValueError: only one of the two files is given.
    """
    if (train_file is None) != (eval_file is None):
        raise ValueError("train_file, eval_file: expected both or neither, got one")
    start = time.perf_counter()
    if train_file is None or eval_file is None:
        train_file = draw_texts(R8_TRAIN, TRAIN_TEXTS, TRAINING.seed)
        eval_file = draw_texts(R8_TEST, EVAL_TEXTS, TRAINING.seed, exclude=frozenset(column(train_file, "text")))
    source = model or os.fspath(obtain(MODEL))
    fetched = time.perf_counter()
    with locked(output) if processes.is_rank_zero() else contextlib.nullcontext():
        llama, tokenizer = load_backbone(source, num_layers=num_layers, dtype=dtype)
        torch.manual_seed(TRAINING.seed)
        adapted = LlamaAdapter(llama, ADAPTERS)
        sites = ", ".join(map(str, adapted.adapter_config().layers or ()))
        _say(f"{type(llama).__name__}: {len(adapted.layers)} layers, adapters after {sites} (from 0)")
        cache = PrefixCache()
        runs: list[Run] = []
        # The adapters first: the head alone needs all layers, which continue from the cached prefix below the adapters.
        for name, folder, train_adapters in (("head + adapters", "adapters", True), ("head alone", "head", False)):
            config = dataclasses.replace(
                TRAINING, train_adapters=train_adapters, progress=progress, output_dir=output / folder, overwrite=True
            )
            sources = Sources(source, num_layers, dtype, eval_data=os.fspath(eval_file.resolve()))
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
    if processes.is_rank_zero():
        _print_table(runs, train_file, eval_file)
    _say(f"{time.perf_counter() - fetched:.0f} s in total, after {fetched - start:.0f} s for obtaining the files")
    _say(f"saved in {output / 'adapters'}, with the curves in training.png; to evaluate it again:")
    _say(f"  adapterkern eval {output / 'adapters'}")
    return runs


def _say(message: str) -> None:
    if processes.is_rank_zero():
        print(message, flush=True)


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
    most_common = max(set(known), key=known.count)
    title = f"{len(known)} training texts, {len(unseen)} unseen test texts, {len(set(known))} labels"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)  # narrow enough for 80 columns
    for heading in ("", "trainable", "prefix s", "train s", "eval s", "tokens/s", "accuracy"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_row(f"always {most_common!r}", "0", "", "", "", "", f"{unseen.count(most_common) / len(unseen):.1%}")
    for run in runs:
        seconds = (f"{s:.1f}" for s in (run.prefix_seconds, run.train_seconds, run.eval_seconds))
        table.add_row(run.name, f"{run.trainable:,}", *seconds, f"{run.tokens_per_second:,.0f}", f"{run.accuracy:.1%}")
    Console().print(table)
