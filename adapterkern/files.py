"""Atomic files: written under a temporary name in the target's folder, flushed, then renamed to the target.

A file is therefore complete or absent, and so is a pair of weights and configuration (``write_pair``).
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces ``path`` on success, in one step, and is removed on error.

    Raises:
        OSError: it cannot be written (no space, no permission, ...); the message names ``path``.
    """
    path = Path(path)
    try:
        with _replacing(path) as temporary:
            yield temporary
    except SafetensorError as error:  # what safetensors raises if the disk is full
        raise OSError(f"{path}: not written: {error}") from error
    except OSError as error:
        named = error.filename is not None and not Path(error.filename).name.startswith(f".{path.name}.")
        if named or error.errno is None:
            raise
        raise OSError(error.errno, f"not written: {error.strerror}", os.fspath(path)) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        flush(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as open() would create it; mkstemp's 0600 is for secrets
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ``ValueError`` for NaN and infinities, which JSON lacks."""
    text = json_text(value)
    with replacing(path) as temporary:
        write_text(temporary, text)


def json_text(value: Any) -> str:
    """The text that ``write_json`` writes for ``value``."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` and wait until it is on disk. Raises ``OSError`` that names the file."""
    try:
        path.write_text(text, encoding="utf-8")
        flush(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def flush(path: str | os.PathLike[str]) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_pair(weights: Path, config: Path, save: Callable[[Path], None], fields: Mapping[str, Any]) -> None:
    """Write weights, and a JSON file of ``fields`` and the weights' SHA-256, so that a reader finds both or neither.

    The weights are written under a hidden name. Renaming the new configuration to ``config`` decides: before it, the
    old pair is valid; after it, the new one is, and ``find_weights`` finds the weights under either name. The last
    step renames the weights to ``weights``. The process may be killed at any point.

    Args:
        weights, config: the two paths, in one folder.
        save: writes the weights to the path that it is given.
        fields: the configuration; ``weights_sha256`` is added.

    Raises:
        OSError: a file cannot be written; the old pair stays.
        ValueError: one of the two paths has a file that is not of such a pair.
    """
    check_pair(weights, config)
    waiting = _waiting(weights)
    if _belong_together(waiting, config):
        waiting.replace(weights)  # an earlier process was killed before its last step
    try:
        with replacing(config) as described:
            with replacing(waiting) as temporary:
                save(temporary)
            write_text(described, json_text({**fields, "weights_sha256": sha256(waiting)}))
    except BaseException:
        if not _belong_together(waiting, config):  # an interrupt may come right after the rename
            waiting.unlink(missing_ok=True)
        raise
    waiting.replace(weights)


def check_pair(weights: Path, config: Path) -> None:
    """Raise ``ValueError`` if one of the two paths has a file that ``write_pair`` did not write."""
    check_owner(config, "adapterkern", lambda saved: "weights_sha256" in saved)
    if weights.exists() and not config.exists():  # a pair is written and removed so that this is never ours
        raise ValueError(
            f"{weights}: expected adapterkern's file or none, got another program's: it has no {config.name} beside it"
        )


def remove_pair(weights: Path, config: Path) -> None:
    """Remove what ``write_pair`` wrote, the configuration last: while it is there, the files are known to be ours."""
    for path in (weights, _waiting(weights), config):
        path.unlink(missing_ok=True)


def _belong_together(weights: Path, config: Path) -> bool:
    """Whether both files exist and ``config`` has the weights' hash."""
    try:
        return sha256(weights) == read_json(config).get("weights_sha256")
    except (ValueError, FileNotFoundError):  # ValueError: the configuration is damaged
        return False


def find_weights(weights: Path, config: Path, digest: str) -> Path:
    """The file that holds the weights of ``write_pair``: the one whose SHA-256 is ``digest``.

    Args:
        weights, config: the paths given to ``write_pair``.
        digest: ``weights_sha256`` from ``config``.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the weights have another hash.
    """
    waiting = _waiting(weights)
    if waiting.exists() and sha256(waiting) == digest:
        return waiting
    if sha256(weights) != digest:
        raise ValueError(f"{weights}: SHA-256 differs from the one in {config.name}: damaged, or of another save")
    return weights


def _waiting(weights: Path) -> Path:
    return weights.with_name(f".{weights.name}.next")


def remove_temporaries(path: Path) -> None:
    """Remove the temporary files that killed processes left when they were writing ``path``."""
    for name in (path.name, _waiting(path).name):
        for temporary in path.parent.glob(f".{name}.????????"):  # mkstemp appends 8 characters
            temporary.unlink()


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` for json: of a key that is there twice, one value would be dropped in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
    return found


def read_json(path: str | os.PathLike[str], *, ours: bool = True) -> dict[str, Any]:
    """Read a JSON object. Raises ``FileNotFoundError``, or ``ValueError`` that names the file and what is wrong.

    Args:
        ours: refuse a key that is there twice. Another program's file may be read that way.
    """
    return _json_object(path, Path(path).read_bytes(), ours)


def _json_object(where: str | os.PathLike[str], content: bytes, ours: bool) -> dict[str, Any]:
    where = os.fspath(where)
    try:
        value = json.loads(content, object_pairs_hook=unique_keys if ours else None)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4300 digits
        raise ValueError(f"{where}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def read_versioned(
    path: str | os.PathLike[str],
    version: int,
    kinds: Mapping[str, Any],
    content: bytes | None = None,
    newer: Mapping[str, tuple[int, Any]] | None = None,
) -> dict[str, Any]:
    """Read a JSON object that has ``"format_version": version``.

    Args:
        content: what the file holds; ``path`` is then what a message calls it, and is not read.
        kinds: the required fields and the type of each: ``{"names": list, "seed": int | None}``.
        newer: fields that only a file of another version has, with this version and the field's type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON or has another version, or a field is missing or has another type.
    """
    saved = read_json(path) if content is None else _json_object(path, content, ours=True)
    for name, (with_it, kind) in (newer or {}).items():
        if name in saved:
            version, kinds = with_it, {**kinds, name: kind}
    if saved.get("format_version") != version:
        raise ValueError(f"{path}: expected format_version {version}, got {saved.get('format_version')!r:.80}")
    for name, kind in kinds.items():
        if name not in saved:
            raise ValueError(f"{path}: field {name!r} is missing")
        value = saved[name]
        kinds_of = getattr(kind, "__args__", (kind,))
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds_of):  # a bool is an int, too
            raise ValueError(f"{path}: field {name!r}: expected {getattr(kind, '__name__', kind)}, got {value!r:.80}")
    return saved


def read_tensors(path: str | os.PathLike[str], *, weights: bool = True) -> dict[str, "Tensor"]:
    """The tensors of a safetensors file.

    Args:
        weights: each must be of 16, 32 or 64 bits of floating point: what a damaged file has instead would otherwise
            be converted in silence. Values that are not finite are loaded, with a warning: a mask may have them, and
            training may have diverged.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not a safetensors file, or has other tensors; the message names file and tensor.
    """
    from safetensors.torch import load_file  # here: torch takes long to import, and most files here are JSON

    with open(path, "rb"):  # names the file where safetensors says "No such device"
        pass
    try:
        tensors = load_file(path)
    except Exception as error:  # also what torch raises for a shape or dtype that it does not have
        raise ValueError(f"{os.fspath(path)}: not a safetensors file: {error}") from error
    if weights:
        for name, tensor in tensors.items():
            what = f"{os.fspath(path)}: tensor {name:.80}"
            check_values(what, tensor, finite=False)
            if wrong := _count_not_finite(tensor):
                logger.warning("%s: %d of its %d values are not finite", what, wrong, tensor.numel())
    return tensors


def check_values(what: str, tensor: "Tensor", *, finite: bool = True) -> None:
    """Raise ``ValueError`` that begins with ``what`` unless the values are of 16 to 64 bits, and ``finite``."""
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        raise ValueError(f"{what}: expected 16, 32 or 64 bits of floating point, got {tensor.dtype}")
    if finite and (wrong := _count_not_finite(tensor)):
        raise ValueError(f"{what}: expected finite values, got {wrong} that are not")


def _count_not_finite(tensor: "Tensor") -> int:
    return int((~tensor.float().isfinite()).sum())  # as fp32, which fp64 may be too large for


def check_owner(path: Path, owner: str, owns: Callable[[dict[str, Any]], bool]) -> None:
    """Raise ``ValueError`` if the JSON file at ``path`` belongs to another program, so that it is not overwritten.

    A file that is missing or damaged may be written.

    Args:
        owner: the program that is about to write, for the message.
        owns: whether a file with this content is ``owner``'s.
    """
    try:
        saved = read_json(path, ours=False)
    except (ValueError, FileNotFoundError):
        return
    if not owns(saved):
        raise ValueError(
            f"{path}: expected {owner}'s file or none, got another program's, with the fields "
            f"{', '.join(sorted(saved)[:6])}"
        )


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
