"""What a run reports: its data, a progress bar, and ``metrics.jsonl``.

``metrics.jsonl`` has one JSON object per line, of ``"kind"`` ``"train"`` (means since the previous such line) or
``"eval"``; with ``TrainConfig.best`` an evaluation that was the best so far has ``"best": true``. A resumed run first
drops the lines after its checkpoint, so the file reads like an uninterrupted run's.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from adapterkern.files import replacing
from adapterkern.training import processes
from adapterkern.training.data.summary import Summary

logger = logging.getLogger(__name__)

DATA_NAME = "data_summary.json"
METRICS_NAME = "metrics.jsonl"
_NUMBERS = {
    "train": ("loss", "grad_norm", "skipped_steps"),
    "eval": ("loss", "accuracy", "drift"),
}  # what plots are made of
PLOT_NAME = "training.png"
_SCORES = {  # in the line of an evaluation, where there are such
    "perplexity": ("perplexity {:.2f}", 1),
    "accuracy": ("accuracy {:.2f} %", 100),
    "f1_micro": ("F1 {:.4f}", 1),
    "rmse": ("RMSE {:.4g}", 1),
    "r2": ("R² {:.4f}", 1),
    "drift": ("drift {:.3g}", 1),
}
_KEPT = (MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)  # however narrow the terminal is


class _Stderr:
    """``sys.stderr``, whose loss (a closed terminal, ``| head``) stops no run: metrics.jsonl has all that is shown."""

    @property
    def file(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # while a bar is shown rich stands in its place

    @property
    def encoding(self) -> str:
        return self.file.encoding

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.file.flush()

    def isatty(self) -> bool:
        return self.file.isatty()

    def fileno(self) -> int:
        return self.file.fileno()


class Reporter:
    """Shows and records a run; a context manager around it.

    With several processes each has one, and all record the same lines at the same steps. Rank 0 writes them; if it
    fails, all ranks raise.

    Args:
        directory: the folder of ``metrics.jsonl``; None records in ``history`` only.
        total_steps: length of the progress bar.
        step: the step that a resumed run continues from.
        show: whether to print; otherwise all but the steps' lines goes to the log.
    """

    def __init__(self, directory: Path | None, total_steps: int, step: int = 0, show: bool = True) -> None:
        self.path = None if directory is None else directory / METRICS_NAME
        self.history: list[dict[str, Any]] = []
        if self.path is not None and step:
            self.history = [record for record in read_metrics(self.path) if record["step"] <= step]
            if step == total_steps:  # a finished run evaluates once more
                self.history = [r for r in self.history if (r["step"], r["kind"]) != (step, "eval")]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in self.history), encoding="utf-8")
        self.console = Console(file=cast("IO[str]", _Stderr()), quiet=not show)
        # Without ipywidgets rich shows nothing in a notebook.
        in_notebook = self.console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20, table_column=Column(ratio=1)),
            *(column(table_column=Column(no_wrap=True)) for column in _KEPT),
            TextColumn("{task.fields[status]}", table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis")),
            expand=True,
            console=self.console,
            disable=not (show and (self.console.is_terminal or in_notebook)),
        )
        self._total_steps = total_steps
        self._first_step = step
        self._bar: Any = None

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.refresh()  # in a notebook `stop` draws no last state
        self._progress.stop()

    def say(self, message: str) -> None:
        """Print a line above the bar, or log it."""
        if self.console.quiet:
            logger.info("%s", message)
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def side_task(self, name: str, total: int, stop: object) -> Iterator[Callable[[int], bool]]:
        """Gives what moves a second bar, for work outside training steps, and says whether to go on: until ``stop``."""
        task = self._progress.add_task(name, total=total, status="")

        def on_batch(count: int) -> bool:
            self._progress.advance(task, count)
            return not stop

        yield on_batch
        self._progress.remove_task(task)

    def step(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self._bar is None:
            self._bar = self._progress.add_task("train", total=self._total_steps, status="")
        self._progress.update(self._bar, completed=step)

    def train(self, record: dict[str, Any]) -> dict[str, Any]:
        """Record a train line and show it in the bar. Returns what was recorded."""
        recorded = self._record({"kind": "train", **record})
        status = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad norm {record['grad_norm']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        if record["skipped_steps"]:
            status += f"  {record['skipped_steps']} skipped"
        if self._bar is not None:
            self._progress.update(self._bar, status=status)
        if self._progress.disable and not self.console.quiet:
            self.say(f"step {record['step']}/{self._total_steps}  {status}")
        return recorded

    def evaluation(self, record: dict[str, Any]) -> dict[str, Any]:
        """Record an eval line and print it. Returns what was recorded."""
        recorded = self._record({"kind": "eval", **record})
        scores = [form.format(record[name] * scale) for name, (form, scale) in _SCORES.items() if name in record]
        scores += ["best so far"] * record.get("best", False)
        self.say(
            f"step {record['step']}, epoch {record['epoch']:.2f}: "
            + "  ".join([f"eval loss {record['loss']:.4f}", *scores])
        )
        return recorded

    def _record(self, record: dict[str, Any]) -> dict[str, Any]:
        self.history.append(record)
        processes.on_rank_zero(lambda: self._write(record))
        return record

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"not written: {error.strerror}", os.fspath(self.path)) from error


def show_data(summaries: Mapping[str, Summary], show: bool) -> None:
    """Print what a run learns from and is evaluated on, by names that begin with train and eval; or log it."""
    console = Console(stderr=True, quiet=not show)
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        for number, line in enumerate(summary.lines()):
            said = f"{'' if number else name:{width}}  {line}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
            if not show:
                logger.info("%s", said.strip())
        for line in (*summary.cut_warning(), *(summary.suspicious if name.startswith("train") else ())):
            console.print(
                f"{'':{width}}  warning: {line}", markup=False, highlight=False, soft_wrap=True, style="yellow"
            )
            if not show:
                logger.warning("%s: %s", name, line)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, without an incomplete last line; none if there is no file.

    Raises:
        ValueError: another line is not a record; the message names it.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int or "kind" not in record:
            raise ValueError(
                f"{path}:{number}: expected an object with an integer 'step' and a 'kind', got {str(record)[:80]}"
            )
        for name in _NUMBERS.get(record["kind"] if isinstance(record["kind"], str) else "", ()):
            value = record.get(name, None if name == "loss" else 0)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or math.inf > abs(value) > sys.float_info.max
            ):
                raise ValueError(f"{path}:{number}: {name}: expected a number, got {value!r:.80}")
        records.append(record)
    return records
