"""Files that are whole or absent: written under a temporary name beside the target, flushed, then renamed over it."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write; on success it takes ``path``'s place in one step, on error it is removed.

    Raises:
        OSError: it cannot be written, by ``path``: no space, a folder that may not be written, ...
    """
    path = Path(path)
    try:
        with _replacing(path) as temporary:
            yield temporary
    except SafetensorError as error:  # how safetensors tells of a full disk
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
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinities are refused: they are not JSON."""
    text = json_text(value)
    with replacing(path) as temporary:
        write_text(temporary, text)


def json_text(value: Any) -> str:
    """``value`` as :func:`write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` and wait until it has reached the disk. Raises ``OSError`` with the file's name, as any write."""
    try:
        path.write_text(text, encoding="utf-8")
        flush(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def flush(path: str | os.PathLike[str]) -> None:
    """Wait until what was written to a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_pair(weights: Path, config: Path, save: Callable[[Path], None], fields: Mapping[str, Any]) -> None:
    """Write weights, and ``fields`` with their SHA-256 as ``weights_sha256``: both or, whenever it is killed, neither.

    The weights wait under a hidden name until the configuration that names their hash has taken its place; until then
    the earlier pair stands, and from then on :func:`find_weights` finds them under either name.
    """
    waiting = _waiting(weights)
    if _belong_together(waiting, config):
        waiting.replace(weights)  # of a process that was killed before it came to this
    try:
        with replacing(config) as described:
            with replacing(waiting) as temporary:
                save(temporary)
            write_text(described, json_text({**fields, "weights_sha256": sha256(waiting)}))
    except BaseException:
        if not _belong_together(waiting, config):  # an interrupt may come between the rename and here
            waiting.unlink(missing_ok=True)
        raise
    waiting.replace(weights)


def _belong_together(weights: Path, config: Path) -> bool:
    """Whether both files are there and ``config`` names the weights' hash."""
    try:
        return sha256(weights) == read_json(config).get("weights_sha256")
    except (ValueError, FileNotFoundError):  # a configuration that is damaged, or there is none
        return False


def find_weights(weights: Path, config: Path, digest: str) -> Path:
    """The file of these weights that has the SHA-256 ``digest``, which stands in ``config``.

    Raises:
        FileNotFoundError: there are none. ValueError: they have another one.
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
    """Remove what processes that were killed while they wrote ``path`` have left beside it."""
    for name in (path.name, _waiting(path).name):
        for temporary in path.parent.glob(f".{name}.????????"):  # as mkstemp names them
            temporary.unlink()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object. Raises ``FileNotFoundError``, or ``ValueError`` naming the file and what is wrong in it."""
    path = Path(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4300 digits
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_versioned(path: str | os.PathLike[str], version: int, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON object that :func:`write_json` has written with ``"format_version": version``.

    Args:
        kinds: the fields that it must have, and the type of each: ``{"names": list, "seed": int | None}``.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not JSON, of another version, or a field is missing or of another type.
    """
    saved = read_json(path)
    if saved.get("format_version") != version:
        raise ValueError(f"{path}: expected format_version {version}, got {saved.get('format_version')!r}")
    for name, kind in kinds.items():
        if name not in saved:
            raise ValueError(f"{path}: field {name!r} is missing")
        value = saved[name]
        kinds_of = getattr(kind, "__args__", (kind,))
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds_of):  # a bool is an int, too
            raise ValueError(f"{path}: field {name!r}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
    return saved


def check_owner(path: Path, owner: str, owns: Callable[[dict[str, Any]], bool]) -> None:
    """Raise ``ValueError`` if the JSON file at ``path`` is another program's: its only copy, perhaps.

    One that is damaged, or not there, may be written.
    """
    try:
        saved = read_json(path)
    except (ValueError, FileNotFoundError):
        return
    if not owns(saved):
        raise ValueError(f"{path}: expected {owner}'s or none, got one with the fields {', '.join(sorted(saved)[:6])}")


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
