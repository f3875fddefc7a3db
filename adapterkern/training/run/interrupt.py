"""Ctrl-C as a request: the current step finishes, a checkpoint is written, and then the run stops."""

import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal is gone, as when ssh loses its line
# Under a launcher one Ctrl-C comes twice: from the terminal, and from the launcher, which passes it on.
_SAME_REQUEST = 0.5  # seconds
_open: list["StopRequest"] = []


def is_stopping() -> bool:
    """Whether a run of this process has been asked to stop, and has not yet."""
    return any(_open)


class StopRequest:
    """Inside the block a first signal to stop only sets ``signal_name``; a later one raises ``KeyboardInterrupt``.

    A signal that was ignored stays ignored: SIGHUP under nohup. Outside the main thread it does nothing, because
    Python delivers signals only there.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> "StopRequest":
        _open.append(self)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None: set by a program that Python is embedded in, and not to be set back by Python
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        _open.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self:
            self.signal_name, self._at = signal.Signals(number).name, now
        elif now - self._at > _SAME_REQUEST:
            raise KeyboardInterrupt
