"""Rows of text from JSONL, CSV and TSV files or from Python, each with the place that a message about it can name.

A file that cannot be read as what it claims to be is refused at once; a row that is wrong by itself is collected, so
that one run names all of them. CSV and TSV have a header line and follow RFC 4180's quoting; every file is UTF-8.
"""

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

HALF_A_PAIR = "half a surrogate pair, which is no character"
_SHOWN = 10  # bad rows in one message
_MAX_FIELD = 64 << 20  # characters in one CSV field; Python's own limit of 131,072 is shorter than a long document


class DataError(ValueError):
    """Training or evaluation data that cannot be used; the message names file and line."""


class Row(NamedTuple):
    """One example as it was read."""

    values: Mapping[str, Any]
    place: str  # "reviews.csv:17", or "row 16" of a list


class BadRows:
    """Collects what is wrong with single rows, and then refuses the data or leaves the rows out."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[str] = []

    def add(self, place: str, problem: str) -> None:
        self.found.append(f"{place}: {problem}")

    def settle(self, skip: bool) -> None:
        """Raise :class:`DataError` over the rows collected; with ``skip`` warn instead."""
        if not self.found:
            return
        shown = "\n  ".join(self.found[:_SHOWN])
        more = f"\n  and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
        count = f"{len(self.found)} bad row{'s' if len(self.found) > 1 else ''}"
        if not skip:
            raise DataError(f"{self.source}: {count}:\n  {shown}{more}\nset skip_bad_rows to leave them out")
        logger.warning("%s: left out %s:\n  %s%s", self.source, count, shown, more)


def read_rows(data: str | os.PathLike[str] | Iterable[Mapping[str, Any]], bad: BadRows) -> list[Row]:
    """Rows of a ``.jsonl``, ``.csv``, ``.tsv`` or ``.tab`` file, or of a list of mappings. Wrong rows go to ``bad``.

    Raises:
        DataError: the file is of another kind, has no header, or is not UTF-8.
        TypeError: ``data`` is neither a path nor an iterable of rows.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        readers = {".jsonl": _read_jsonl, ".csv": _read_table, ".tsv": _read_table, ".tab": _read_table}
        if path.suffix.lower() not in readers:
            raise DataError(f"{path}: expected a name that ends in {', '.join(readers)}")
        return _of_unicode(readers[path.suffix.lower()](path, bad), bad)
    if not isinstance(data, Iterable):
        raise TypeError(f"data: expected a path or a list of rows, got {type(data).__name__}")
    rows = []
    for index, values in enumerate(data):
        if isinstance(values, Mapping):
            rows.append(Row(values, f"row {index}"))
        else:
            bad.add(f"row {index}", f"expected a mapping of columns to values, got {type(values).__name__}")
    return _of_unicode(rows, bad)


def source_name(data: Any) -> str:
    """How messages call the data."""
    return os.fspath(data) if isinstance(data, str | os.PathLike) else "data"


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}") from error
            if "\0" in text:
                raise DataError(f"{path}:{number}: not text: it has a NUL byte")
            yield text


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4300 digits
            bad.add(place, f"not JSON: {error}")
            continue
        if isinstance(values, dict):
            yield Row(values, place)
        else:
            bad.add(place, f"expected a JSON object, got {type(values).__name__}")


def _of_unicode(rows: Iterable[Row], bad: BadRows) -> list[Row]:
    """The rows all of whose texts UTF-8 can hold."""
    good = []
    for row in rows:
        wrong = [name for name, value in row.values.items() if isinstance(value, str) and not is_unicode(value)]
        if wrong:
            bad.add(row.place, f"column {wrong[0]!r}: {HALF_A_PAIR}")
        else:
            good.append(row)
    return good


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: Python's strings and JSON's escapes can have half a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_table(path: Path, bad: BadRows) -> Iterator[Row]:
    previous_limit = csv.field_size_limit(_MAX_FIELD)
    try:
        delimiter = "," if path.suffix.lower() == ".csv" else "\t"
        reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1  # where the record begins: a quoted field may span lines
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}:{line}: {error}") from error
            place, line = f"{path}:{line}", reader.line_num + 1
            if fields is None:
                break
            if not fields:
                continue
            if header is None:
                header = fields
                if len(set(header)) != len(header):
                    raise DataError(f"{place}: a column name stands twice in the header {header}")
            elif len(fields) != len(header):
                bad.add(place, f"expected {len(header)} fields as in the header, got {len(fields)}")
            else:
                yield Row(dict(zip(header, fields, strict=True)), place)
        if header is None:
            raise DataError(f"{path}: expected a header line, got an empty file")
    finally:
        csv.field_size_limit(previous_limit)
