"""Ctrl-C where the command ``adapterkern`` is at its imports: one line and status 130 instead of a traceback.

Importing takes seconds, and begins before any code of the command could catch ``KeyboardInterrupt``. Nothing is open
then, so that the process may end on the spot. In any other program this module does nothing.
"""

import os
import signal
import sys
import threading
from types import FrameType

STATUS = 130  # 128 + SIGINT, as shells have it


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"adapterkern: interrupted\n")
    os._exit(STATUS)


def end_at_once() -> None:
    """Until ``raise_again``, in the command's process, SIGINT ends it."""
    by_name = os.path.basename(sys.argv[0] if sys.argv else "") == "adapterkern"
    as_module = ("-m", "adapterkern") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    if not (by_name or as_module) or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """SIGINT raises ``KeyboardInterrupt`` again, if ``end_at_once`` had changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


end_at_once()
