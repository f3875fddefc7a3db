"""A dry run: all that comes before a run's first step, a few steps that are undone, and what the run will take.

Nothing is written, and the model, its gradients and the generators of random numbers are as they were before.
"""

import contextlib
import dataclasses
import itertools
import random
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.text import Text

from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import count_tokens
from adapterkern.training.data.examples import E, Example
from adapterkern.training.feed import eval_batches
from adapterkern.training.loop import Run
from adapterkern.training.run.folder import check_output
from adapterkern.training.run.interrupt import StopRequest
from adapterkern.training.run.report import Reporter
from adapterkern.training.run.results import DryRun, TrainResult
from adapterkern.training.task import Task

_STEPS = 3  # that are taken: one of the longest rows, which is not timed unless it is the only one, and the first ones
_SHOWN = 3  # examples
_TOKENS = 400  # of an example that are shown; of a longer one its beginning and its end
_LEARNED = "bold green"
_MARKS = "⟦", "⟧"  # around what is learned, where there are no colors


@contextlib.contextmanager
def unchanged(task: Task[Any], config: TrainConfig) -> Iterator[None]:
    """In place of ``run_folder``: a run inside the block may train, and leaves everything as it found it.

    Raises:
        what ``check_output`` raises, which writes nothing.
        NotImplementedError: there are several processes.
    """
    if processes.world_size() > 1:
        raise NotImplementedError(f"dry_run: expected one process, got {processes.world_size()}")
    check_output(config, task.files)
    backbone = set(task.model.modules())
    own = [module for module in task.modules() if module not in backbone]
    attributes = [(vars(module), _shallow(vars(module))) for module in own]
    trainable = [p for p in task.parameters() if p.requires_grad]
    tensors = [*trainable, *(buffer for module in own for buffer in module.buffers())]
    values = [t.detach().clone() for t in tensors]
    gradients = [p.grad for p in trainable]
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for live, before in attributes:  # a head that the data have made, for example
            live.clear()
            live.update(_shallow(before))
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for parameter, gradient in zip(trainable, gradients, strict=True):
            parameter.grad = gradient
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in attributes.items()}


class Rehearsal(Run[E]):
    """A ``Run`` of a few steps inside ``unchanged``, which shows examples first and what it has measured at the end.

    ``go`` gives a ``TrainResult`` with ``dry_run``.

    Args:
        tokenizer: that shows the examples; None shows their ids.
    """

    def __init__(self, *args: Any, tokenizer: Any = None) -> None:
        super().__init__(*args)
        self.tokenizer = tokenizer
        self.taken: list[tuple[int, float]] = []  # tokens and seconds of each step
        self.prefix_rate = 0.0  # seconds per token
        self.found: DryRun | None = None

    def go(self) -> TrainResult:
        """The result of a run without steps, with ``dry_run``. After a signal ``stopped`` is True, and it has none."""
        self.config = dataclasses.replace(self.config, overwrite=False)  # by which the loop removes an earlier run
        result = super().go()
        first = result.steps - len(self.taken)
        return dataclasses.replace(
            result, steps=first, stopped=self.found is None, history=[], head=None, dry_run=self.found
        )

    def _reporter(self) -> Reporter:
        self.first = self.state.step
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        self.last = min(self.first + _STEPS, self.total_steps)
        return Reporter(None, self.last, self.first, self.config.progress)

    def _fill_cache(self, reporter: Reporter, stop: StopRequest) -> None:
        for example in self.data.train[:_SHOWN]:
            say(reporter, described(self.task, example, self.tokenizer))
        everything: list[Example] = [*self.task.reread(self.data.train), *self.data.eval, *self.data.texts]
        if not self._pays_to_cache(everything, reporter) or self.feed.cache is None:
            return
        steps = range(self.first, self.last)
        needed: list[Example] = [*self.task.reread([e for step in steps for e in self._examples(step)])]
        needed += [e for examples in (self._to_evaluate(), *self._samples()) for e in examples]
        needed += self.drift.sample if self.drift else []
        needed = list({example.row: example for example in needed}.values())
        times = [(time.perf_counter(), 0)]

        def on_batch(count: int) -> bool:
            times.append((time.perf_counter(), count))
            return True

        slots = self.feed.cache.fill(self.model, needed, self.config, self.engine.accelerator.autocast, on_batch)
        assert slots is not None
        self.feed.add(needed, slots)
        begun = 1 if len(times) > 2 else 0  # the first batch comes after a digest of the weights
        seconds, texts = times[-1][0] - times[begun][0], sum(count for _, count in times[begun + 1 :])
        self.prefix_rate = seconds / texts * len(needed) / count_tokens(needed)

    def _prepare(self, reporter: Reporter, stop: StopRequest) -> None:
        """Nothing: it would be written."""

    def _prepare_drift(self, reporter: Reporter, stop: StopRequest) -> None:
        """Nothing: ``_finish`` measures a batch."""

    def _samples(self) -> list[list[E]]:
        return super()._samples()[:1] if self.config.best else []

    def _to_evaluate(self) -> list[E]:
        """A batch of an evaluation: of one kind, and neither of the shortest rows nor of the longest."""
        kind = [example for example in self.data.eval if type(example) is type(self.data.eval[0])]
        batches = eval_batches(kind, self.config)
        return batches[len(batches) // 2] if batches else []

    def _examples(self, step: int) -> list[E]:
        if step > self.first:
            return super()._examples(step)
        return sorted(self.data.train, key=lambda example: len(example.input_ids))[-self.config.rows_per_step :]

    def _stopped(self, stop: StopRequest) -> bool:
        return bool(stop) or self.state.step == self.last

    def _timed_step(self, reporter: Reporter) -> None:
        started, before = time.perf_counter(), self.meter.tokens
        super()._timed_step(reporter)
        if self.pending:  # on a GPU: reading the numbers waits for the step
            self._drain()
        self.taken.append((self.meter.tokens - before, time.perf_counter() - started))

    def _after_step(self, reporter: Reporter) -> None:
        """No log line, no evaluation, no checkpoint."""

    def _stop(self, reporter: Reporter, signal_name: str | None) -> None:
        if signal_name is None:
            self._finish(reporter)
        else:
            reporter.say(f"{signal_name}: stopped; nothing was written")

    def _finish(self, reporter: Reporter) -> None:
        remaining = self.total_steps - self.first  # none of a finished run, which evaluates once more
        rate, beginning = self._step_rate()
        step_seconds = rate * count_tokens(self.data.train) / self.steps_per_epoch
        untouched, drift = self.drift.rehearse(self.engine.run) if self.drift else (0.0, 0.0)
        eval_seconds = self._eval_rate() * count_tokens(self.data.eval) + drift
        every = self.config.eval_every or self.steps_per_epoch
        between = max((self.total_steps - 1) // every - self.first // every, 0)
        evaluations = between + 1 if self.data.eval else 0
        everything = count_tokens([*self.data.train, *self.data.eval, *self.data.texts])
        prefix_seconds = self.prefix_rate * everything
        cached = everything * self.model.decoder.config.hidden_size * 4 if self.prefix_rate else 0
        on_gpu = self.model.device.type == "cuda"
        trained = self.state.parameters.values()
        self.found = DryRun(
            trainable_parameters=sum(p.numel() for p in trained),
            all_parameters=sum(p.numel() for p in self.task.parameters()),
            steps=remaining,
            step_seconds=step_seconds,
            evaluations=evaluations,
            eval_seconds=eval_seconds,
            prefix_seconds=prefix_seconds,
            seconds=beginning + remaining * step_seconds + evaluations * eval_seconds + prefix_seconds + untouched,
            peak_bytes=torch.cuda.max_memory_allocated(self.model.device) if on_gpu else peak_resident(),
            weights_bytes=sum(p.numel() * p.element_size() for p in self.task.parameters()),
            trained_bytes=sum(p.numel() * (p.element_size() + 8) for p in trained),
            cache_bytes=min(cached, self.config.prefix_cache_bytes),
        )
        rows = f"{self.config.rows_per_step} rows each, {self.steps_per_epoch:,} per epoch"
        for line in self.found.lines(rows, "GPU" if on_gpu else "process"):
            reporter.say(line)
        reporter.say(f"dry run: {len(self.taken)} steps were taken and undone, and nothing was written")

    def _step_rate(self) -> tuple[float, float]:
        """Seconds per token of a step, and the seconds that the first one needs beyond that, to compile for example."""
        if not self.taken:
            return 0.0, 0.0
        timed = self.taken[1:] or self.taken
        rate = sum(seconds for _, seconds in timed) / sum(tokens for tokens, _ in timed)
        tokens, seconds = self.taken[0]
        return rate, max(seconds - rate * tokens, 0.0)

    def _eval_rate(self) -> float:
        """Seconds per token of an evaluation."""
        batch = self._to_evaluate()
        if not batch:
            return 0.0
        self.engine.run.eval()
        seconds = []
        with torch.no_grad():
            for _ in range(2):  # the first may make what the second has
                started = time.perf_counter()
                loss, _ = self.engine.run(self.feed(batch))
                loss.item()
                seconds.append(time.perf_counter() - started)
        return min(seconds) / count_tokens(batch)


def peak_resident() -> int:
    """The most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # Linux counts KiB


def described(task: Task[E], example: E, tokenizer: Any) -> Text:
    """An example for a reader: its place, its tokens, those that are learned in color, its label, and what is cut.

    Args:
        tokenizer: None shows ids.
    """
    learned, label = task.shown(example)
    ids = example.input_ids.tolist()
    text = Text(f"{example.place or f'text {example.row}'}, {len(ids):,} tokens:\n  ")
    places = set(learned)
    hidden = range(_TOKENS // 2, len(ids) - _TOKENS // 2) if len(ids) > _TOKENS else range(0)
    borders = {0, len(ids), hidden.start, hidden.stop} | {
        place for place in range(1, len(ids)) if (place in places) != (place - 1 in places)
    }
    for start, end in itertools.pairwise(sorted(borders)):
        if start in hidden:
            if start == hidden.start:
                text.append(f" [... {len(hidden):,} more tokens ...] ", "dim")
            continue
        text.append(_plain(decoded(tokenizer, ids, start, end)), _LEARNED if start in places else "")
    if example.cuts[0]:
        text.append(f" [cut here: {example.cuts[0]:,} more]", "yellow")
    if label:
        text.append("\n  label: ").append(_plain(label), _LEARNED)
    return text


def decoded(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """The text of ``ids[start:end]`` with its special tokens, and with the space before it."""
    if tokenizer is None:
        return " ".join(map(str, ids[start:end])) + " "
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, whole = (tokenizer.decode(ids[:stop], **options) for stop in (start, end))
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(ids[start:end], **options)


def _plain(text: str) -> str:
    """The text with a visible end of each line, and its control characters as they are written in Python."""
    return "".join("↵\n  " if char == "\n" else char if char.isprintable() else ascii(char)[1:-1] for char in text)


def say(reporter: Reporter, text: Text) -> None:
    """Print a text in color, or with marks around what is learned where there are none; or log it."""
    if reporter.console.quiet or reporter.console.no_color or not reporter.console.color_system:
        reporter.say(_marked(text))
    else:
        reporter.console.print(text, soft_wrap=True)


def _marked(text: Text) -> str:
    marked, place = "", 0
    for span in sorted(text.spans):
        if span.style == _LEARNED:
            marked += text.plain[place : span.start] + _MARKS[0] + text.plain[span.start : span.end] + _MARKS[1]
            place = span.end
    return marked + text.plain[place:]
