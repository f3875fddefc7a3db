"""Rows from files, folders, the hub or Python, each with its place for error messages; see formats/ for the readers.

A file that is not of the format its name says raises at once. Bad rows are collected, so that one message names all of
them.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adapterkern.files import unique_keys
from adapterkern.training import processes
from adapterkern.training.data.formats.names import TABLES, format_of, hub_name

_log = logging.getLogger(__name__)

HALF_A_PAIR = "half a surrogate pair, which is not a character"
_SHOWN = 10  # bad rows, or names, in one message
_WIDTH = 60  # characters of a value in a message
_named: set[str] = set()  # what `warn_once` has said
_JSON = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


class DataError(ValueError):
    """Unusable training or evaluation data; the message names file and line."""


class ColumnError(DataError):
    """Columns are missing: the data may be for another task."""


class Row(NamedTuple):
    """One row as it was read."""

    values: Mapping[str, Any]
    place: str  # "reviews.csv:17", or "row 16" of a list


class JsonObject(dict[str, Any]):
    """A JSON object that knows its pairs."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def check_keys(value: Any, where: str) -> None:
    """Raise ``ValueError`` for an object of JSON, inside others too, that has a key twice: one value would be lost."""
    if isinstance(value, JsonObject) and len(value) != len(value.pairs):
        try:
            unique_keys(value.pairs)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    for inside in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        check_keys(inside, where)


class BadRows:
    """Collects problems of single rows, to raise them together or to skip the rows."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._problems: dict[str, list[str]] = {}  # by place

    def add(self, place: str, problem: str) -> None:
        self._problems.setdefault(place, []).append(problem)

    @property
    def found(self) -> list[str]:
        """One line per bad row, in the order of the rows."""
        places = sorted(self._problems, key=_natural)
        return [f"{place}: {'; '.join(dict.fromkeys(self._problems[place]))}" for place in places]

    def settle(self, skip: bool) -> None:
        """Raise ``DataError`` if there are bad rows; with ``skip``, log a warning instead."""
        found = self.found
        if not found:
            return
        lines = "\n  ".join(found[:_SHOWN]) + (f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        count = f"{len(found)} bad row{'s' if len(found) > 1 else ''}"
        if not skip:
            raise DataError(f"{self.source}: {count}:\n  {lines}\nset skip_bad_rows=True to skip them")
        warn("%s: skipped %s:\n  %s", self.source, count, lines)


def _natural(place: str) -> list[Any]:
    """A sorting key by which line 9 comes before line 10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]{1,18})", place))]


def warn(message: str, *values: Any) -> None:
    """Log a warning about data, on rank 0 alone: every rank reads the same."""
    if processes.is_rank_zero():
        _log.warning(message, *values)


def warn_once(line: str) -> None:
    """``warn``, but only once per process, however many runs read the same data."""
    if line not in _named:
        _named.add(line)
        warn("%s", line)


def shown(value: Any) -> str:
    """``value`` for a message: its repr, on one line and cut to a readable length."""
    try:
        text = repr(value[:_WIDTH] if isinstance(value, str | list | tuple) else value)
    except Exception:  # what a value's own repr raises: int's beyond 4300 digits, for one
        text = f"a value of type {type(value).__name__}"
    text = text if isinstance(value, str) else " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ..."


def listed(names: Iterable[Any]) -> str:
    """Names for a message: quoted, and the first few if there are many."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN + 2 else ""
    return ", ".join(shown(name) for name in (names[:_SHOWN] if more else names)) + more


def scalar(value: Any) -> Any:
    """``value``; of a scalar of NumPy, or a tensor without dimensions, the Python number or string that it holds."""
    if isinstance(value, str):
        return str(value)  # np.str_ has another repr
    if value is None or isinstance(value, int | float) or getattr(value, "shape", None) != ():
        return value
    return value.item()


def columns(rows: Iterable[Row]) -> list[str]:
    """The columns that any of the rows has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def alike(name: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that differ from ``name`` only in case, spaces or form."""
    seen = plain(name)
    return [other for other in names if plain(other) == seen]


def plain(name: str) -> str:
    """What a reader sees in a name: no case, no spaces around, no invisible characters; 1.0 and 01 are 1."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = " ".join("".join(char for char in text if unicodedata.category(char) != "Cf").split())
    try:
        return repr(float(text))
    except ValueError:
        return text


def kind(row: Row, value: Any) -> str:
    """What a value is, in the words of JSON for a row of JSON, else of Python."""
    if isinstance(row.values, JsonObject):
        return json_kind(value)
    return "None" if value is None else type(value).__name__


def json_kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return _JSON.get(type(value), "an object")


def problem(row: Row, column: str, expected: str) -> str:
    """What is wrong with a value that was expected to be something else, and not to be empty."""
    if column not in row.values:
        return f"column {shown(column)} is missing"
    value = scalar(row.values[column])
    if (isinstance(value, str) and not value.strip()) or (isinstance(value, list | tuple) and not value):
        got = "an empty one"
    elif isinstance(value, float):
        got = f"the number {value}"
    else:
        got = kind(row, value)
    return f"column {shown(column)}: expected {expected}, got {got}"


def check_columns(rows: list[Row], needed: Mapping[str, str], source: str, pair: str = "") -> None:
    """Raise ``ColumnError`` for the columns that none of the rows has: once, with the columns that there are.

    Args:
        needed: the columns, and what chooses each: the name of a setting, or "".
        pair: two settings that may choose others instead of one.
    """
    found = columns(rows)
    if missing := [name for name in needed if name not in found]:
        no_header = len(missing) == len(needed) and format_of(source) in TABLES
        problem = no_columns({name: needed[name] for name in missing}, found, no_header, pair)
        raise ColumnError(f"{source}: {problem}")


def no_columns(missing: Mapping[str, str], found: list[str], no_header: bool, pair: str) -> str:
    """What to say of columns that no row has.

    Args:
        missing, pair: as ``needed`` and ``pair`` of ``check_columns``.
        no_header: a row may have been taken for the header.
    """
    settings = [setting for setting in missing.values() if setting]
    setting = settings[0] if settings else ""
    chosen = f"; {' and '.join(settings)} name{'s another' if len(settings) == 1 else ' others'}" if settings else ""
    chosen += f", or {pair} a pair" if pair else ""
    hint = ""
    if len(found) == 1 and isinstance(found[0], str) and (separators := [char for char in ";\t,|" if char in found[0]]):
        hint = f". The header seems to be separated by {separators[0]!r}: .csv files have ',', .tsv files a tab"
    elif setting == "text_column" and not pair and (chats := [f for f in ("messages", "conversations") if f in found]):
        hint = ". Make a text of chat messages first: tokenizer.apply_chat_template(messages, tokenize=False)"
        if len(missing) > 1:  # no labels either: a file to learn to answer from
            hint = f". {chats[0]} are for task='causal-lm'"
    elif setting == "text_column" and {"prompt", "completion"} <= set(found):
        hint = ". prompt and completion are for task='causal-lm'"
    elif setting == "text_column" and not pair and {"instruction", "output"} <= set(found):
        hint = ". instruction and output are for task='causal-lm'"
    elif likely := [near for name in missing for near in alike(name, [f for f in found if isinstance(f, str)])]:
        hint = f". Did you mean {listed(likely)}?"
    elif no_header:
        hint = ". If these are values, the file lacks a first line with the names of its columns"
    what = f"column {listed(missing)} is" if len(missing) == 1 else f"columns {listed(missing)} are"
    return f"{what} missing; there are {listed(found) or 'no columns'}{chosen}{hint}"


def warn_unused(source: str, names: Iterable[str], why: str = "") -> None:
    """Name the columns that a task does not read, in one line; of a file, once per process."""
    if not (names := list(names)):
        return
    line = f"{source}: column{'s' if len(names) > 1 else ''} not used{why}: {listed(names)}"
    if source == source_name(None):
        warn("%s", line)
    else:
        warn_once(line)


def read_rows(data: Any, bad: BadRows) -> list[Row]:
    """All rows of ``iter_rows``, which raises the same."""
    return list(iter_rows(data, bad))


def iter_rows(data: Any, bad: BadRows) -> Iterator[Row]:
    """Rows of a file, a folder, a dataset on the hub, or of Python's objects, one by one. Bad rows go to ``bad``.

    Args:
        data: what ``load_examples`` reads.

    Raises:
        DataError: the file has another suffix, has no header, is not UTF-8, or is damaged; there is no such split.
        ImportError: a package that reads it is not installed: pyarrow for Parquet, datasets for the hub.
        OSError: there is no such file, folder or dataset, or it cannot be read.
        TypeError: ``data`` is none of these.
    """
    # They import this module.
    from adapterkern.training.data.formats import files, hub, objects

    if isinstance(data, str | os.PathLike):
        named = hub_name(data)
        rows = files.read_path(Path(data), bad) if named is None else hub.read_hub(named, bad)
    else:
        rows = objects.read_object(data, bad)
    return _of_unicode(rows, bad)


def source_name(data: Any) -> str:
    """The name of the data in messages: the path; of a dataset on the hub also the split; "data" for objects."""
    if isinstance(data, str | os.PathLike):
        return str(hub_name(data) or Path(data))
    return "data"


def _of_unicode(rows: Iterable[Row], bad: BadRows) -> Iterator[Row]:
    """The rows all of whose strings can be encoded as UTF-8."""
    for row in rows:
        wrong = [name for name, value in row.values.items() if isinstance(value, str) and not is_unicode(value)]
        if wrong:
            bad.add(row.place, f"column {shown(wrong[0])}: {HALF_A_PAIR}")
        else:
            yield row


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be encoded as UTF-8: Python strings and JSON escapes may hold half a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
