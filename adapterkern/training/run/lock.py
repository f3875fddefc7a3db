"""One run per folder: a lock that its process holds, and that ends with it however it ends. One run per model.

The kernel's ``flock`` on a hidden file is the lock, so a killed process leaves a file that locks nothing. The file says
who holds the lock. Its owner removes it before it lets go; whoever locked a removed file tries again.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

LOCK_NAME = ".adapterkern.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems

logger = logging.getLogger(__name__)

_in_use: "WeakKeyDictionary[Any, threading.Thread]" = WeakKeyDictionary()
_guard = threading.Lock()


@contextlib.contextmanager
def in_one_thread(model: Any) -> Iterator[None]:
    """Inside the block no other thread can begin such a block with ``model``; this one can.

    Raises:
        RuntimeError: another thread is inside one.
    """
    own = threading.current_thread()
    with _guard:
        before = _in_use.get(model)
        if before not in (None, own):
            raise RuntimeError(
                f"model: expected one that no other thread trains or evaluates, got one in use by {before.name}: wait "
                "for it, or give each thread a model over a backbone of its own"
            )
        _in_use[model] = own
    try:
        yield
    finally:
        if before is None:
            del _in_use[model]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold its lock inside the block. A folder that it made and that is still empty goes again.

    Raises:
        BlockingIOError: another process, or another run of this one, holds the lock; the message says which.
        OSError: the folder cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _named(folder):
            handle = _take(folder)
        try:
            yield
        finally:
            (folder / LOCK_NAME).unlink(missing_ok=True)
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()


def check_writable(folder: Path) -> None:
    """Raise what ``locked`` would raise now, and write nothing."""
    with _named(folder):
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder / LOCK_NAME, os.O_RDWR)
            try:
                _lock(handle, folder)
            finally:
                os.close(handle)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(existing))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(existing))


def _take(folder: Path) -> int:
    """The open lock file, locked."""
    path = folder / LOCK_NAME
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just removed its empty folder
            continue
        try:
            _lock(handle, folder)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):  # nobody has removed it since
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        raise BlockingIOError(
            f"output_dir: {folder} is in use by {holder}: wait for it, stop it, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: its file system has no locks: a second run into it would not be noticed", folder)


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors of the system name the argument."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        problem = f"{error.filename or folder}: {error.strerror}"
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise NotADirectoryError(f"output_dir: expected a folder, got {folder}, which is or is in a file") from None
        raise type(error)(f"output_dir: expected a folder to write to, got {folder}: {problem}") from error
