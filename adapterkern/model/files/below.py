"""What a saved adapter was saved on: the adapters below it in a stack, each a folder like any saved adapter's.

    adapterkern.safetensors, adapterkern.json    the top one
    below/0-domain-1a2b3c4d/                     the lowest one, then below/1-…

The top one's ``adapterkern.json`` has them in their order, each with the SHA-256 of its ``adapterkern.json``, which has
that of its weights: one that was changed or is missing is found. Names end with this digest, so a save leaves the
folders of an earlier one as they are; replacing the top one's ``adapterkern.json`` decides which count, and the others
are removed after it. Its format_version is 2: earlier versions refuse it, where they would run the top one alone.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterkern.files import read_json, sha256
from adapterkern.model.config import AdapterConfig, check_name
from adapterkern.model.digest import Digest
from adapterkern.model.files.card import CARD_NAME
from adapterkern.model.files.folder import (
    BELOW,
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_files,
    read_adapter,
    read_described,
    write_adapter,
)

_FOLDER = re.compile(r"\d+-[\w-]+-[0-9a-f]{8}")
_FIELDS = ("name", "folder", "sha256")


def write_below(
    directory: Path,
    number: int,
    name: str,
    llama: Any,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    digest: Digest,
) -> dict[str, str]:
    """Write one of the adapters below, of this number from 0; returns what the top one's configuration has of it.

    Arguments and errors are those of ``write_adapter``.
    """
    shown = f"{number}-{re.sub(r'[^a-zA-Z0-9_-]', '_', name)}"
    temporary = directory / BELOW / f".{shown}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_adapter(temporary, llama, config, tensors, digest)
        found = sha256(temporary / CONFIG_NAME)
        target = temporary.with_name(f"{shown}-{found[:8]}")
        if target.exists() and not _same(target, temporary):
            shutil.rmtree(target)  # damaged
        if not target.exists():
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"name": name, "folder": f"{BELOW}/{target.name}", "sha256": found}


def _same(one: Path, other: Path) -> bool:
    try:
        return all(sha256(one / name) == sha256(other / name) for name in (CONFIG_NAME, WEIGHTS_NAME))
    except FileNotFoundError:
        return False


def remove_others(directory: Path, kept: Sequence[Mapping[str, str]]) -> None:
    """Remove what earlier saves, or killed ones, have left of adapters below others than those that are ``kept``."""
    place, names = directory / BELOW, {Path(entry["folder"]).name for entry in kept}
    for folder in place.iterdir() if place.is_dir() else ():
        ours = _FOLDER.fullmatch(re.sub(r"^\.(.*)\.\d+$", r"\1-00000000", folder.name)) and folder.is_dir()
        if ours and folder.name not in names:
            shutil.rmtree(folder)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def read_below(
    llama: Any, directory: Path, *, strict: bool = False
) -> list[tuple[str, tuple[AdapterConfig, dict[str, Tensor]]]]:
    """The adapters below the one saved in ``directory``: their names and what ``read_adapter`` returns, lowest first.

    Raises:
        FileNotFoundError, ValueError: as ``read_adapter``; or one is missing, or is another than the one that the top
            one was saved on.
    """
    files = adapter_files(directory)
    if files is None:
        return []
    path = directory / files[1]
    saved, _ = read_described(path, llama)
    found = []
    for entry in saved.get(BELOW, ()):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(field), str) for field in _FIELDS):
            raise ValueError(f"{path}: field {BELOW!r}: expected objects with {', '.join(_FIELDS)}, got {entry!r:.80}")
        name, (top, _, last) = check_name(entry["name"], f"{path}: {BELOW}"), entry["folder"].partition("/")
        if top != BELOW or not _FOLDER.fullmatch(last):
            raise ValueError(f"{path}: field {BELOW!r}: expected a folder in {BELOW}, got {entry['folder']!r:.80}")
        inside = directory / BELOW / last / CONFIG_NAME
        if not inside.exists():
            raise FileNotFoundError(f"{path}: expected {name!r}, which the adapter was saved on, got no {inside}")
        if sha256(inside) != entry["sha256"]:
            raise ValueError(f"{inside}: expected {name!r} as {path} was saved on it, got another: its SHA-256 differs")
        found.append((name, read_adapter(llama, inside.parent, strict=strict)))
    return found


def files_below(directory: str | os.PathLike[str]) -> list[str]:
    """The files of the adapters below the one saved in ``directory``, relative to it; none if it is damaged."""
    directory, files = Path(directory), adapter_files(directory)
    try:
        entries = () if files is None else read_json(directory / files[1]).get(BELOW) or ()
        folders = [Path(entry["folder"]).name for entry in entries]
    except (ValueError, TypeError, KeyError, FileNotFoundError):
        return []
    names = (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME)
    return [f"{BELOW}/{folder}/{name}" for folder in folders if _FOLDER.fullmatch(folder) for name in names]
