"""What a caller of ``train`` may have called while a run goes on."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.run.results import TrainResult

_METHODS = ("on_start", "on_step", "on_evaluation", "on_end")


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """A run that begins.

    Attributes:
        config: its configuration.
        step: the step that it is resumed after; 0 for a new one.
        total_steps: the number of its last step.
        steps_per_epoch: how many.
        trainable_parameters: how many.
    """

    config: TrainConfig
    step: int
    total_steps: int
    steps_per_epoch: int
    trainable_parameters: int


class Callback:
    """Called while a run goes on: ``ak.train(..., callbacks=[MyCallback()])``. Override what you need of its methods.

    With several processes rank 0 alone calls them. None may change the model. An error in one ends the run with a
    ``RuntimeError`` that names the callback, the step and the newest checkpoint, which stays as it is. A dry run calls
    none.

    Raises ``TypeError`` for a class with another method ``on_...``, which would never be called.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if unknown := sorted(name for name in vars(cls) if name.startswith("on_") and name not in _METHODS):
            raise TypeError(f"{cls.__name__}.{unknown[0]}: expected a method among {', '.join(_METHODS)}")

    def on_start(self, run: RunInfo) -> None:
        """Before the first step."""

    def on_step(self, record: dict[str, Any]) -> bool | None:
        """After a step with a log line: every ``log_every`` steps, and the last. More often would wait for the device.

        Args:
            record: the line of metrics.jsonl: ``step``, ``epoch``, ``loss`` (mean since the last one), ``lr``,
                ``grad_norm``, ``tokens_per_second``, ``skipped_steps``.

        Returns:
            True to end the run after this step, with its files and exit status 0 as after its last one.
        """

    def on_evaluation(self, record: dict[str, Any]) -> bool | None:
        """After an evaluation. ``record`` has its ``step``, ``epoch`` and metrics. Returns as ``on_step``."""

    def on_end(self, result: TrainResult) -> None:
        """After the run has ended, and its files have been written; not after an error."""

    def close(self) -> None:
        """The last call, after an error too."""


class Callbacks:
    """Those of a run, in a context manager around it. Rank 0 calls them, and all ranks learn what they say."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    def __enter__(self) -> "Callbacks":
        return self

    def __exit__(self, *exc: object) -> None:
        if processes.rank() == 0:  # no collective: other ranks may have failed
            with contextlib.ExitStack() as stack:
                for callback in self._callbacks:
                    stack.callback(_close, callback)

    def start(self, run: RunInfo) -> None:
        self._call("on_start", run.step, None, lambda: run)

    def ask(self, method: str, record: dict[str, Any], checkpoint: Path | None) -> str | None:
        """Call ``on_step`` or ``on_evaluation``; the name of the callback that ends the run, if one does."""
        return self._call(method, record["step"], checkpoint, lambda: dict(record))

    def end(self, result: TrainResult) -> None:
        self._call("on_end", result.steps, result.checkpoint, lambda: result)

    def _call(self, method: str, step: int, checkpoint: Path | None, value: Callable[[], Any]) -> str | None:
        def call() -> str | None:
            ends = None
            for callback in self._callbacks:
                name = type(callback).__name__
                try:
                    answer = getattr(callback, method)(value())
                except Exception as error:
                    where = f"; the newest checkpoint is {checkpoint}" if checkpoint else ""
                    raise RuntimeError(
                        f"callbacks: {name}.{method} at step {step}: {type(error).__name__}: {error}{where}"
                    ) from error
                if answer is not None and not isinstance(answer, bool):
                    raise TypeError(
                        f"callbacks: {name}.{method}: expected it to return True, False or None, got {answer!r:.80}"
                    )
                ends = ends or (name if answer else None)
            return ends

        return processes.on_rank_zero(call) if self._callbacks else None


def _close(callback: Callback) -> None:
    try:
        callback.close()
    except Exception as error:
        raise RuntimeError(f"callbacks: {type(callback).__name__}.close: {type(error).__name__}: {error}") from error


def check_callbacks(callbacks: object) -> None:
    """Raise ``TypeError`` unless they are a list of ``Callback`` objects."""
    if not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks: expected a list of Callback objects, got {type(callbacks).__name__}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            hint = ", a class: call it" if isinstance(callback, type) else ""
            name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise TypeError(f"callbacks: expected Callback objects (ak.Callback), got {name}{hint}")
