"""A path's reader, by the suffix of its name."""

from collections.abc import Callable, Iterator
from pathlib import Path

from adapterkern.training.data.formats.arrow import read_parquet
from adapterkern.training.data.formats.folder import read_folder
from adapterkern.training.data.formats.names import SUFFIXES, TABLES, format_of
from adapterkern.training.data.formats.text import read_json, read_jsonl, read_table
from adapterkern.training.data.rows import BadRows, DataError, Row

_READERS: dict[str, Callable[[Path, BadRows], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    **dict.fromkeys(TABLES, read_table),
}


def read_path(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a file or folder. Raises as ``iter_rows``: at once where the path itself is wrong."""
    reader = _READERS.get(format_of(path))
    if reader is None:
        if path.is_dir():
            return read_folder(path, bad)
        if path.suffix or path.exists():
            hint = "; of texts, one per file, name the folder" if path.suffix.lower() == ".txt" else ""
            raise DataError(f"{path}: expected a name that ends in {SUFFIXES}{hint}")
    if path.is_dir() or not path.exists():
        kind, what = (IsADirectoryError, "a folder") if path.is_dir() else (FileNotFoundError, "not there")
        raise kind(f"data: expected a file of rows, got {path}, which is {what}")
    assert reader is not None
    return reader(path, bad)
