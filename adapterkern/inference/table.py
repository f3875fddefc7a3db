"""Predictions in a file, beside the columns of the rows that they are for.

``prediction`` and ``probability`` are added to a row's columns, ``probabilities`` if asked for; of an answer to a
question ``prediction`` and ``score``; of a list of labels, or a number, ``prediction`` alone. In CSV and TSV each
label's probability is a column of its own, and a value that is no string or number is JSON. A file is written whole or
not at all.
"""

import contextlib
import csv
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from adapterkern.files import replacing
from adapterkern.training.data.rows import DataError, listed, scalar

FORMATS = (".csv", ".tsv", ".jsonl")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def format_of_output(path: Path, data: object = None) -> str:
    """The suffix that names the format.

    Args:
        data: what the rows are read from, which is not to be written over.

    Raises:
        OSError: no file can be written there.
        ValueError: another suffix; or it is the file of ``data``, or in that folder.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in FORMATS:
        expected = f"expected a name that ends in {', '.join(FORMATS)} (each may be followed by .gz)"
        raise ValueError(f"output: {expected}, got {path}")
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"output: expected a file in a folder that exists, got {path}")
    source = Path(data) if isinstance(data, str | os.PathLike) else None
    if source is not None and source.exists():
        inside = source.resolve() in path.resolve().parents  # where it would be read as data the next time
        if inside or (path.exists() and path.samefile(source)):
            raise ValueError(f"output: expected a file that is no part of the data, {source}, got {path}")
    return suffix


def write_predictions(
    path: Path, found: Iterable[tuple[Mapping[str, Any], Any]], *, probabilities: bool = False
) -> int:
    """Write each row's columns and its prediction, as they come; the number of rows.

    Args:
        path: see ``format_of_output``.
        found: rows and predictions, as ``iter_predictions`` gives them. None, of a bad row, leaves the columns empty.
        probabilities: that of each label, too.

    Raises:
        DataError: the rows have a column of a prediction's name; or for CSV and TSV rows of different columns.
        OSError: the file cannot be written.
    """
    suffix, count = format_of_output(path), 0
    with replacing(path) as temporary, _opened(temporary, path.name.endswith(".gz")) as file:
        write = _as_json(file) if suffix == ".jsonl" else _as_table(file, _DELIMITERS[suffix], path)
        for values, added in _filled(found, lambda one: _columns(one, probabilities, suffix != ".jsonl")):
            if both := [name for name in added if name in values]:
                raise DataError(
                    f"data: column {listed(both)}: expected rows without what a prediction adds; rename or remove the "
                    "column"
                )
            write({**values, **added})
            count += 1
    return count


def _filled(
    found: Iterable[tuple[Mapping[str, Any], Any]], columns: Callable[[Any], dict[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Each row with the columns of its prediction; those of a bad row are the others', and empty."""
    waiting: list[Mapping[str, Any]] = []
    names: list[str] = []
    for values, prediction in found:
        if prediction is None and not names:
            waiting.append(values)
            continue
        added = columns(prediction) if prediction is not None else dict.fromkeys(names)
        names = names or list(added)
        yield from ((before, dict.fromkeys(names)) for before in waiting)
        waiting.clear()
        yield values, added
    yield from ((values, {"prediction": None}) for values in waiting)


@contextlib.contextmanager
def _opened(path: Path, compressed: bool) -> Iterator[IO[str]]:
    opened: Any = gzip.open if compressed else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        yield file


def _columns(prediction: Any, probabilities: bool, flat: bool) -> dict[str, Any]:
    added: dict[str, Any] = prediction.columns()
    of_labels = added.pop("probabilities", None) or {}
    if not probabilities or not of_labels:
        return added
    return added | ({f"probability {k}": p for k, p in of_labels.items()} if flat else {"probabilities": of_labels})


def _as_json(file: IO[str]) -> Callable[[dict[str, Any]], object]:
    return lambda row: file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")


def _as_table(file: IO[str], delimiter: str, path: Path) -> Callable[[dict[str, Any]], object]:
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    header: list[str] = []

    def write(row: dict[str, Any]) -> None:
        if not header:
            header.extend(row)
            writer.writerow(header)
        if other := [name for name in row if name not in header]:
            raise DataError(
                f"{path}: expected the columns of the first row, {listed(header)}, in every row, got {listed(other)}; "
                "write .jsonl"
            )
        writer.writerow([_cell(row.get(name)) for name in header])

    return write


def _cell(value: Any) -> Any:
    value = scalar(value)
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON has no form for, as the nearest that it has."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
