"""The C library's memory of a command: large tensors keep their pages from one step to the next."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
# Some versions of glibc take no more than half of an arena.
_SIZES = (1 << 30, 32 << 20)
_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_pages() -> bool:
    """Make glibc reuse freed blocks of up to 1 GiB instead of giving them back; whether it does.

    By default it maps every block above 32 MiB anew, and each page then costs a fault of 1 to 2 µs at its first write:
    a third of an adapter's time at 8192 × 4096. Nothing is changed on another C library, or where the user has set
    one of glibc's own variables. It holds for the whole process, so that a library must not do it: commands do.
    """
    if any(name in os.environ for name in _OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, musl, Windows
        return False
    return any(mallopt(_MMAP_THRESHOLD, size) and mallopt(_TRIM_THRESHOLD, size) for size in _SIZES)
