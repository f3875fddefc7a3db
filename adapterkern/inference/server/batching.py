"""Which requests share a call of ``generate``: those of a short window with the same sampling, whatever their adapters.

One thread runs one batch after another. A batch is complete when it begins: a request that comes later waits for the
next one. There is no scheduler, and no request is preempted.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many requests wait as may."""


class ClosedError(Exception):
    """The server is about to end."""


class Sampling(NamedTuple):
    """How the next token is chosen. ``temperature`` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def shares(self, other: "Sampling") -> bool:
        """Whether both can be in one batch. What is drawn with a seed may not depend on the other rows."""
        if self.temperature == 0 or other.temperature == 0:
            return self.temperature == other.temperature
        return self == other and self.seed is None


class Piece(NamedTuple):
    """What is new of an answer.

    Attributes:
        tokens: generated so far.
        finish: why this is the last piece, ``"stop"``, ``"length"`` or ``"error"``; None if it is not.
    """

    text: str
    tokens: int
    finish: str | None = None


@dataclass(eq=False)
class Request:
    """A prompt on its way to an answer.

    Args:
        adapter: its name in the model, ``"__base__"`` for none.
        prompt: token ids.
        emit: called for each piece, from the thread that generates.
        ends: tokens that end the answer.
        stop: strings that end it, and are not part of it.
        after: the tokens that the text follows on, see ``Text``.
    """

    adapter: str
    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    emit: Callable[[Piece], None]
    ends: frozenset[int] = frozenset()
    stop: Sequence[str] = ()
    after: Sequence[int] = ()
    cancelled: bool = False  # nobody waits for it
    finished: bool = False

    def give(self, piece: Piece) -> None:
        """Pass a piece on, unless the last one has been."""
        if not self.finished:
            self.finished = piece.finish is not None
            self.emit(piece)


class Batcher:
    """A queue, and the thread that empties it.

    Args:
        run: generates for a batch and gives each request its pieces.
        max_batch: rows in a batch.
        window: seconds that the first request of a batch waits for others.
        queue: requests that may wait.
    """

    def __init__(
        self, run: Callable[[list[Request]], None], *, max_batch: int = 8, window: float = 0.005, queue: int = 64
    ) -> None:
        self._run, self._max_batch, self._window, self.queue = run, max_batch, window, queue
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)

    def start(self) -> None:
        """Begin to run what has been submitted."""
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all of ``requests``.

        Raises:
            QueueFullError: there is no room for all of them; none is queued.
            ClosedError: ``close`` has been called.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            if len(self._waiting) + len(requests) > self.queue:
                raise QueueFullError
            self._waiting += requests
            self._changed.notify()

    def cancel(self, requests: Sequence[Request]) -> None:
        """Drop those that wait; those that run stop at their next token."""
        with self._changed:
            for request in requests:
                request.cancelled = True
            self._waiting = [request for request in self._waiting if not request.cancelled]

    def counts(self) -> tuple[int, int]:
        """How many requests wait, and how many run."""
        with self._changed:
            return len(self._waiting), len(self._running)

    def close(self) -> None:
        """Accept no more, and return when all that were accepted are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            try:
                self._run(batch)
            except Exception:
                logger.exception("a batch of %d requests failed", len(batch))
            finally:
                for request in batch:  # no one may wait forever, whatever has happened
                    request.give(Piece("", 0, "error"))
                with self._changed:
                    self._running = []

    def _next(self) -> list[Request] | None:
        """The oldest request and those that can join it; None after the last."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return None
                until = time.monotonic() + self._window
                while len(self._waiting) < self._max_batch and not self._closed:
                    if (left := until - time.monotonic()) <= 0:
                        break
                    self._changed.wait(left)
                if not self._waiting:  # all were cancelled meanwhile
                    continue
                first = self._waiting[0]
                # A request with a seed shares with none, itself included.
                fits = [r for r in self._waiting if r is first or first.sampling.shares(r.sampling)]
                self._running = fits[: self._max_batch]
                self._waiting = [request for request in self._waiting if request not in self._running]
                return list(self._running)
