"""How a run ends: with a ``TrainResult``, or with an error of its numbers or its checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

from adapterkern.training.heads import Head


class NonFiniteError(FloatingPointError):
    """A loss, gradient or drift that is not finite. ``step`` counts from 1; that step has changed no parameter."""

    def __init__(self, step: int, problem: str, checkpoint: Path | None) -> None:
        where = f" The newest checkpoint is {checkpoint}." if checkpoint else ""
        super().__init__(
            f"step {step}: {problem}.{where} Check that step's data, lower lr, lengthen the warmup, or use bf16 or "
            "fp32 instead of fp16"
        )
        self.step = step


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another run; the message names the file or field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run is expected to take, from a few steps that were taken and undone.

    Attributes:
        trainable_parameters, all_parameters: how many.
        steps: from the first, or the one that is resumed after, to the last.
        step_seconds: of one step.
        evaluations: how many.
        eval_seconds: of one evaluation, with its drift.
        prefix_seconds: to fill the prefix cache; 0 without it.
        seconds: of all this, and of the untouched model's pass that drift needs once.
        peak_bytes: the most that was allocated on the GPU, or resident of the process, in a step of the longest rows.
        weights_bytes: of these, the weights of backbone, adapters and head.
        trained_bytes: of these, fp32 gradients and AdamW's moments.
        cache_bytes: what the prefix cache will have in memory.
    """

    trainable_parameters: int
    all_parameters: int
    steps: int
    step_seconds: float
    evaluations: int
    eval_seconds: float
    prefix_seconds: float
    seconds: float
    peak_bytes: int
    weights_bytes: int
    trained_bytes: int
    cache_bytes: int

    def lines(self, rows: str, where: str) -> list[str]:
        """For a reader. ``rows``: those of a step; ``where``: whose memory it is."""
        share = self.trainable_parameters / self.all_parameters
        cache = f"; and {_size(self.cache_bytes)} in the prefix cache" if self.cache_bytes else ""
        parts = [f"{counted(self.steps, 'step')} of {_time(self.step_seconds)}"]
        parts += [f"{counted(self.evaluations, 'evaluation')} of {_time(self.eval_seconds)}"] * bool(self.evaluations)
        parts += [f"the prefix cache {_time(self.prefix_seconds)}"] if self.prefix_seconds else []
        return [
            f"parameters  {self.trainable_parameters:,} trained of {self.all_parameters:,} ({share:.4%})",
            f"steps       {self.steps:,}; {rows}",
            f"memory      {_size(self.peak_bytes)} of this {where} at the peak, a step of the longest rows included; "
            f"weights are {_size(self.weights_bytes)} of it, gradients and moments {_size(self.trained_bytes)}{cache}",
            f"time        about {_time(self.seconds)}: {', '.join(parts)}",
        ]


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count / 1024:.3g} KiB"


def counted(number: int, what: str) -> str:
    """``2 steps``, ``1 step``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


@dataclasses.dataclass
class TrainResult:
    """The outcome of a run.

    Attributes:
        steps: optimizer steps, including those before a resume.
        stopped: by a signal, before the last step.
        ended: why, of a run that ended before its last step by ``patience`` or a callback; None of any other.
        best_step: with ``TrainConfig.best``, the step whose state was saved and is in the model; else None.
        metrics: of the last evaluation; of a finished run with ``best`` those of ``best_step``.
        history: the records of metrics.jsonl.
        head: the one that was trained; None for causal-lm.
        labels: the label names; empty for regression and causal-lm.
        trainable_parameters: how many.
        skipped_steps: by the fp16 scaler.
        seconds: spent in training steps.
        prefix_seconds: spent filling the prefix cache.
        eval_seconds: spent in evaluations.
        tokens_per_second: real tokens, without padding, over ``seconds``.
        prefix_layers: layers whose activations were cached; 0 without the cache.
        checkpoint: the newest one.
        dry_run: what the run is expected to take; None of a run that was no dry run.
    """

    steps: int
    stopped: bool
    metrics: dict[str, float] | None
    history: list[dict[str, Any]]
    head: Head | None
    labels: list[str]
    trainable_parameters: int
    skipped_steps: int
    seconds: float
    prefix_seconds: float
    eval_seconds: float
    tokens_per_second: float
    prefix_layers: int
    checkpoint: Path | None
    dry_run: DryRun | None = None
    ended: str | None = None
    best_step: int | None = None
