"""What the studies share: the command line, the backbone, texts, CPU seconds, and the JSON file of the results."""

import argparse
import functools
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from pytest_benchmark.utils import get_commit_info

import adapterkern as ak
from adapterkern.files import write_json
from adapterkern.model.backbone import load_backbone
from adapterkern.recipes.demo import corpora
from bench.measure import machine, results_folder

CPU = torch.device("cpu")
Rows = list[dict[str, str]]
T = TypeVar("T")


def make_parser(study: str, description: str | None, by_device: bool = True) -> argparse.ArgumentParser:
    """The parser of ``python -m experiments.STUDY``, with ``--output``.

    Args:
        by_device: the results are of one device, whose folder is the default; others name the device of each row.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{study}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder = results_folder(CPU) if by_device else results_folder(CPU).parent
    text = f"folder of the results; default bench/results{'/<device>' * by_device}/<study>"
    parser.add_argument("--output", type=Path, default=folder / study.replace("_", "-"), metavar="DIR", help=text)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the output folder made."""
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    commit()  # of the code that runs: another may be made before the study ends
    return arguments


@functools.cache
def commit() -> str | None:
    """The commit that was checked out when this was first called."""
    found: str | None = get_commit_info().get("id")
    return found


def record(path: Path, **fields: Any) -> None:
    """Write a study's JSON file atomically: date, commit and machine, then its settings and results."""
    about = machine(CPU)
    about["python"] = platform.python_version()
    about["versions"]["adapterkern"] = ak.__version__
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, {"datetime": now, "commit": commit(), "machine": about, **fields})


def show(row: dict[str, Any]) -> None:
    """Print one result as a line of JSON."""
    print(json.dumps(row), flush=True)


def backbone(num_layers: int | None = None) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, or its first layers, in fp32, and its tokenizer."""
    return load_backbone(corpora.obtain(corpora.MODEL), num_layers=num_layers)


def texts(table: corpora.Member, count: int, seed: int = 0, exclude: frozenset[str] = frozenset()) -> Rows:
    """``count`` rows with "text" and "label", drawn from a table; none whose text is in ``exclude``."""
    lines = corpora.draw_texts(table, count, seed, exclude).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def cpu_timed(call: Callable[[], T]) -> tuple[T, float]:
    """What ``call`` returns, and the CPU seconds of this process that it takes."""
    started = time.process_time()
    result = call()
    return result, time.process_time() - started
