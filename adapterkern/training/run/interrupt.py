"""Ctrl-C as a request: the current step finishes, a checkpoint is written, and then the run stops."""

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Inside the block the first SIGINT or SIGTERM only sets ``signal_name``; a second raises ``KeyboardInterrupt``.

    Outside the main thread it does nothing, because Python delivers signals only there.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
