"""What a string names: a file of rows by its suffix, or a dataset on the hub by its spelling."""

import os
import re
from typing import Any, NamedTuple

TABLES = (".csv", ".tsv", ".tab")
_TEXT = (".jsonl", *TABLES, ".json")
_PARQUET = ".parquet"
SUFFIXES = f"{', '.join(_TEXT)} (each may be followed by .gz) or {_PARQUET}"
SPELLING = "NAME:SPLIT, or NAME:CONFIGURATION:SPLIT"

# A split may be cut, as train[:100] and train[10%:20%]
_HUB = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w.+-]+)(?=:))?(?::(.+))?", re.ASCII)
_SUFFIX = re.compile(r"\.[a-z][a-z0-9]{1,6}", re.IGNORECASE)  # of a file, and not a version's .5


class HubName(NamedTuple):
    """A split of a dataset on the Hugging Face hub."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return ":".join(part for part in self if part is not None)


def format_of(path: str | os.PathLike[str]) -> str:
    """The suffix that names the format, in lower case and without ``.gz``; "" for a name without one of these."""
    name = os.path.basename(path).lower()
    suffix = os.path.splitext(name.removesuffix(".gz"))[1]
    return suffix if suffix in _TEXT or (suffix == _PARQUET and name.endswith(_PARQUET)) else ""


def hub_name(data: Any) -> HubName | None:
    """What ``NAME``, ``NAME:SPLIT`` or ``NAME:CONFIGURATION:SPLIT`` names; without a split, ``train``.

    None for what is there as a file or folder, and for what can only be a path: a ``Path``, or a string with the suffix
    of a file, a second slash, or a dot, slash or ``~`` at its beginning.
    """
    found = _HUB.fullmatch(data) if isinstance(data, str) else None
    if found is None or os.path.exists(data) or _SUFFIX.fullmatch(os.path.splitext(found[1])[1]):
        return None
    return HubName(found[1], found[2], found[3] or "train")
