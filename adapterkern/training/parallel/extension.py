"""torch compiles an extension (DeepSpeed's) under a lock that is a bare file, and waits while there is one.

A process that is killed while it compiles leaves that file, and every later one would wait for it for ever without a
word. It cannot be told whose it is, so that nothing here removes it.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.file_baton import FileBaton

PATIENCE = 30.0  # seconds; DeepSpeed's extension for a CPU compiles in about as long

logger = logging.getLogger(__name__)


def locks() -> dict[Path, float]:
    """The locks in torch's folder of extensions, and the age of each in seconds."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    ages = {}
    for path in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            ages[path] = max(time.time() - path.stat().st_mtime, 0.0)
    return ages


@contextlib.contextmanager
def waits_told() -> Iterator[None]:
    """Inside the block, a wait of this thread for such a lock is told after half a minute, once per lock."""
    over, thread = threading.Event(), threading.get_ident()

    def watch() -> None:
        told, since = None, time.monotonic()
        while not over.wait(min(1.0, PATIENCE / 4)):
            path = _awaited(thread)
            if path is None or path == told:
                since = time.monotonic()
            elif time.monotonic() - since >= PATIENCE:
                told = path
                logger.warning(
                    "waiting for %s, by which another process compiles an extension; if none does, an earlier one "
                    "was killed: delete that file, and this run goes on",
                    path,
                )

    watcher = threading.Thread(target=watch, name="adapterkern: waits for extensions", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _awaited(thread: int) -> str | None:
    """The lock that a thread is waiting for in ``FileBaton.wait``."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is FileBaton.wait.__code__:
            return str(frame.f_locals["self"].lock_file_path)
        frame = frame.f_back
    return None
