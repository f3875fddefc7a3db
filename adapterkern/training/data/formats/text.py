"""JSONL, JSON, CSV and TSV files in UTF-8, also compressed by gzip."""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from adapterkern.files import unique_keys
from adapterkern.training.data.formats.names import format_of
from adapterkern.training.data.rows import BadRows, DataError, JsonObject, Row, json_kind, listed, shown

_MAX_FIELD = 64 << 20  # characters in a CSV field; Python's limit of 131,072 is shorter than a long document
_BLOCK = 1 << 20  # bytes of a .json file that are read at once
_SHOWN = 20  # characters of it in a message
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)  # what gzip raises for a file that is cut or is none
_DECODER = json.JSONDecoder(object_pairs_hook=JsonObject)


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}") from error
                if "\0" in text:
                    raise DataError(f"{path}:{number}: not text: it has a NUL byte")
                yield text
    except _DAMAGED as error:
        raise DataError(f"{path}:{number + 1}: not a whole gzip file: {error}") from error


def read_jsonl(path: Path, bad: BadRows) -> Iterator[Row]:
    """One JSON object per line."""
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line.rstrip("\r\n"), object_pairs_hook=JsonObject)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4300 digits
            reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
            if number == 1 and line.lstrip().startswith("["):
                raise DataError(f"{place}: expected one JSON object per line, got a list over several lines") from error
            cut = "" if line.endswith("\n") else "; the file ends here and may have been cut off"
            bad.add(place, f"not JSON: {reason}{cut}")
            continue
        yield from _row(values, place, bad)


def _row(values: Any, place: str, bad: BadRows) -> Iterator[Row]:
    """The row of a JSON value; none if it is no object, or has a key twice."""
    if not isinstance(values, JsonObject):
        bad.add(place, f"expected a JSON object, got {json_kind(values)}")
        return
    if len(values) != len(values.pairs):
        try:
            unique_keys(values.pairs)  # chat.py looks into messages; nothing else reads what is inside a column
        except ValueError as error:
            bad.add(place, str(error))
            return
    yield Row(values, place)


def read_json(path: Path, bad: BadRows) -> Iterator[Row]:
    """A list of objects."""
    text = _Json(path)
    first = text.peek()
    if first != "[":
        got = "an object" if first == "{" else text.got()
        hint = "; name a file of one object per line .jsonl" if first == "{" else ""
        raise DataError(f"{path}: expected a list of objects, got {got}{hint}")
    text.at += 1
    index = 0
    while text.peek() != "]" or index:
        place = f"{path}:{text.line} (row {index})"
        yield from _row(text.value(), place, bad)
        index += 1
        if (after := text.peek()) == "]":
            break
        if after != ",":
            raise text.error(f"expected a comma or the end of the list after row {index - 1}, got {text.got()}")
        text.at += 1
    text.at += 1
    if text.peek():
        raise text.error(f"expected nothing after the list, got {text.got()}")


class _Json:
    """The text of a JSON file, of which a part is in memory: the value that is being read, and a block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 1  # of `at`
        self.at = 0
        self._buffer = ""
        self._blocks = self._decoded()
        self._more = True

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        line = 1
        try:
            with _open(self.path) as file:
                block = b"more"
                while block:
                    block = file.read(_BLOCK)
                    yield (text := decoder.decode(block, final=not block))
                    line += text.count("\n")
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self.path}:{line}: not UTF-8: {error.reason}") from error
        except _DAMAGED as error:
            raise DataError(f"{self.path}: not a whole gzip file: {error}") from error

    def _read(self, size: int) -> None:
        """Forget what is before ``at``, and read until the buffer has ``size`` characters, or all that there are."""
        parts = [self._buffer[self.at :]]
        self.at = 0
        length = len(parts[0])
        while length < size and self._more:
            block = next(self._blocks, None)
            self._more = block is not None
            parts.append(block or "")
            length += len(parts[-1])
        self._buffer = "".join(parts)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            for at in range(self.at, len(self._buffer)):
                if (char := self._buffer[at]) not in " \t\r\n":
                    self.at = at
                    return char
                self.line += char == "\n"
            self.at = len(self._buffer)
            if not self._more:
                return ""
            self._read(1)

    def value(self) -> Any:
        """The JSON value that is next. Raises ``DataError`` for what is none."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self.at)
            except json.JSONDecodeError as error:
                # What a value that goes on beyond the buffer looks like
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - 16
                if not (cut and self._more):
                    self._go(error.pos)
                    raise self.error(f"not JSON: {error.msg.removesuffix(' at')}, at {self.got()}") from error
            except (ValueError, RecursionError) as error:  # a number of more than 4300 digits, and lists in lists
                raise self.error(f"not JSON: {error}") from error
            else:
                if end < len(self._buffer) or not self._more:  # else a number may go on
                    self._go(end)
                    return value
            self._read(2 * (len(self._buffer) - self.at) + 1)  # twice as much: the time is linear in the length

    def _go(self, at: int) -> None:
        self.line += self._buffer.count("\n", self.at, at)
        self.at = at

    def got(self) -> str:
        """What is next, for a message."""
        if not self.peek():
            return "the end of the file"
        self._read(_SHOWN)
        return shown(self._buffer[:_SHOWN])

    def error(self, problem: str) -> DataError:
        ends = not self.peek() or "Unterminated string" in problem
        cut = "; the file ends here and may have been cut off" if ends else ""
        return DataError(f"{self.path}:{self.line}: {problem}{cut}")


def read_table(path: Path, bad: BadRows) -> Iterator[Row]:
    """CSV (``.csv``) or tab-separated values, with RFC 4180's quoting and a header line."""
    reader = csv.reader(_lines(path), delimiter="," if format_of(path) == ".csv" else "\t", strict=True)
    header: list[str] | None = None
    line = 1  # where the record begins: a quoted field may span lines
    while True:
        limit = csv.field_size_limit(_MAX_FIELD)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            cut = "; a quote is not closed, or the file has been cut off" if "end of data" in str(error) else ""
            problem = str(error).replace("\t", "\\t")
            raise DataError(f"{path}:{line}: {problem}{cut}") from error
        finally:
            csv.field_size_limit(limit)  # of the process: another reader may run before the next record
        place, line = f"{path}:{line}", reader.line_num + 1
        if fields is None:
            break
        if not fields:
            continue
        if header is None:
            header = fields
            if len(set(header)) != len(header):
                raise DataError(f"{place}: expected a line that names the columns, each once, got {listed(header)}")
        elif len(fields) != len(header):
            bad.add(place, f"expected {len(header)} fields as in the header, got {len(fields)}")
        else:
            yield Row(dict(zip(header, fields, strict=True)), place)
    if header is None:
        raise DataError(f"{path}: expected a header line, got an empty file")
