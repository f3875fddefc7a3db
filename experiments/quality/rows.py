"""The CSV: a row per run, replaced as a whole, so it is always complete."""

import csv
import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import adapterkern as ak
from adapterkern.files import replacing
from bench.measure import device_name
from experiments.common import commit
from experiments.quality.training import PROTOCOL, Spec

NAME = "runs.csv"
FIELDS = tuple(field.name for field in dataclasses.fields(Spec))
MEASURED = (
    *("status", "digest", "parameters", "train_texts", "steps", "validation", "validation_loss", "drift"),
    *("drift_elsewhere", "test", "test_f1", "test_texts", "right", "train_seconds", "seconds"),
)
ABOUT = ("protocol", "date", "device", "commit", "adapterkern", "torch", "transformers", "peft")
COLUMNS = (*FIELDS, *MEASURED, *ABOUT)
Rows = dict[Spec, dict[str, str]]


def read(path: Path) -> Rows:
    """The rows by what was run; none if there is no file.

    Raises:
        ValueError: a row is cut off, of another protocol, there twice, or of a set that is another in other rows.
    """
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        found = [(reader.line_num, row) for row in reader]
    for line, row in found:
        if None in row or None in row.values():  # a merge or an editor: ``write`` leaves no such row
            raise ValueError(f"{path}:{line}: expected a value for each column, got a row of another length")
    if odd := {row.get("protocol") for _, row in found} - {str(PROTOCOL)}:
        raise ValueError(f"{path}: expected rows of protocol {PROTOCOL}, got some of {odd.pop()}; move the file away")
    done: Rows = {}
    for line, row in found:
        spec = spec_of(row)
        if spec in done:
            raise ValueError(f"{path}:{line}: expected one row of each run, got a second of {spec}")
        if other := other_digest(done, spec, row["digest"]):
            raise ValueError(f"{path}:{line}: expected {spec.data} of digest {other}, as above, got {row['digest']}")
        done[spec] = row
    return done


def other_digest(done: Rows, spec: Spec, digest: str) -> str | None:
    """The digest of a run's set in the rows, if it is another: of other texts no difference would be one of methods."""
    return next((row["digest"] for of, row in done.items() if of.data == spec.data and row["digest"] != digest), None)


def spec_of(row: Mapping[str, str]) -> Spec:
    """What a row has run."""
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Spec)}
    values: dict[str, Any] = {
        name: row[name] == "True" if kind is bool else kind(row[name]) for name, kind in kinds.items()
    }
    return Spec(**values)


def write(path: Path, rows: Rows) -> None:
    """Replace the file by one of these rows."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows.values())


def row_of(spec: Spec, result: Mapping[str, Any]) -> dict[str, str]:
    """A run's row, as it is read again."""
    about = {
        "protocol": PROTOCOL,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(torch.device("cpu")),
        "commit": commit(),
        "adapterkern": ak.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in result.items()}
    values = dataclasses.asdict(spec) | shown | about
    return {name: str(values.get(name, "")) for name in COLUMNS}
