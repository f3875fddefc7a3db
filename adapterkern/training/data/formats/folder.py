"""A folder of texts, or a dataset that ``datasets.Dataset.save_to_disk`` has written.

Each ``.txt`` file is a row, whose column ``text`` is the file's content and whose place is its path. The files of a
subfolder also have the column ``label``, the subfolder's name:

    reviews/positive/0001.txt
    reviews/negative/0001.txt

The rows are sorted by path. Whatever else is there is not read, and named in a warning: other files, and folders inside
subfolders.
"""

from collections.abc import Iterator
from pathlib import Path

from adapterkern.training.data.formats.hub import read_saved
from adapterkern.training.data.rows import BadRows, DataError, Row, listed, warn_once


def read_folder(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a folder. Raises ``DataError`` if it has none."""
    if (path / "dataset_dict.json").is_file():
        splits = listed(sorted(inner.name for inner in path.iterdir() if inner.is_dir()))
        raise DataError(f"{path}: expected one split, got the folder of the splits {splits}; name one of these folders")
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return read_saved(path, bad)
    texts, others = _listing(path)
    if not texts:
        got = f"a folder with {listed(others)}" if others else "an empty folder"
        raise DataError(f"{path}: expected .txt files, or a subfolder of them for each label, got {got}")
    if others:
        warn_once(f"{path}: not read, for only .txt files are, there and in its subfolders: {listed(others)}")
    return _texts(texts, bad)


def _listing(path: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """The texts with their labels ("" for none), and the names of whatever else is there."""
    texts: list[tuple[Path, str]] = []
    others = []
    for entry in sorted(path.iterdir()):
        inside = sorted(entry.iterdir()) if entry.is_dir() else [entry]
        label = entry.name if entry.is_dir() else ""
        for file in inside or [entry]:
            if file.suffix.lower() == ".txt" and file.is_file():
                texts.append((file, label))
            else:
                others.append(str(file.relative_to(path)))
    return texts, others


def _texts(texts: list[tuple[Path, str]], bad: BadRows) -> Iterator[Row]:
    for file, label in texts:
        content = file.read_bytes()
        if b"\0" in content:
            bad.add(str(file), "not text: it has a NUL byte")
            continue
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            bad.add(str(file), f"not UTF-8: {error.reason} at byte {error.start}")
            continue
        yield Row({"text": text, "label": label} if label else {"text": text}, str(file))
