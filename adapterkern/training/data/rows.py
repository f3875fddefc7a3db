"""Rows from JSONL, CSV and TSV files or from Python, each with its place for error messages.

A file that is not of the format its name says raises at once. Bad rows are collected, so that one message names all of
them. CSV and TSV files have a header line and use RFC 4180 quoting; every file is UTF-8.
"""

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)

HALF_A_PAIR = "half a surrogate pair, which is not a character"
_SHOWN = 10  # bad rows in one message
_MAX_FIELD = 64 << 20  # characters in a CSV field; Python's limit of 131,072 is shorter than a long document


class DataError(ValueError):
    """Unusable training or evaluation data; the message names file and line."""


class Row(NamedTuple):
    """One row as it was read."""

    values: Mapping[str, Any]
    place: str  # "reviews.csv:17", or "row 16" of a list


class BadRows:
    """Collects problems of single rows, to raise them together or to skip the rows."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[str] = []

    def add(self, place: str, problem: str) -> None:
        self.found.append(f"{place}: {problem}")

    def settle(self, skip: bool) -> None:
        """Raise ``DataError`` if there are bad rows; with ``skip``, log a warning instead."""
        if not self.found:
            return
        shown = "\n  ".join(self.found[:_SHOWN])
        more = f"\n  and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
        count = f"{len(self.found)} bad row{'s' if len(self.found) > 1 else ''}"
        if not skip:
            raise DataError(f"{self.source}: {count}:\n  {shown}{more}\nset skip_bad_rows to skip them")
        _log.warning("%s: skipped %s:\n  %s%s", self.source, count, shown, more)


def read_rows(data: str | os.PathLike[str] | Iterable[Mapping[str, Any]], bad: BadRows) -> list[Row]:
    """Rows of a ``.jsonl``, ``.csv``, ``.tsv`` or ``.tab`` file, or of a list of mappings. Bad rows go to ``bad``.

    Raises:
        DataError: the file has another suffix, has no header, or is not UTF-8.
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
    """The name of the data in messages."""
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
    """The rows all of whose strings can be encoded as UTF-8."""
    good = []
    for row in rows:
        wrong = [name for name, value in row.values.items() if isinstance(value, str) and not is_unicode(value)]
        if wrong:
            bad.add(row.place, f"column {wrong[0]!r}: {HALF_A_PAIR}")
        else:
            good.append(row)
    return good


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be encoded as UTF-8: Python strings and JSON escapes may hold half a surrogate pair."""
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
                    raise DataError(f"{place}: expected a header without duplicate column names, got {header}")
            elif len(fields) != len(header):
                bad.add(place, f"expected {len(header)} fields as in the header, got {len(fields)}")
            else:
                yield Row(dict(zip(header, fields, strict=True)), place)
        if header is None:
            raise DataError(f"{path}: expected a header line, got an empty file")
    finally:
        csv.field_size_limit(previous_limit)
