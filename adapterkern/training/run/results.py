"""How a run ends: with a ``TrainResult``, or with a ``NonFiniteError``."""

import dataclasses
from pathlib import Path
from typing import Any

from adapterkern.training.heads import ClassificationHead


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite. ``step`` counts from 1; that step has changed no parameter."""

    def __init__(self, step: int, problem: str, checkpoint: Path | None) -> None:
        where = f" The newest checkpoint is {checkpoint}." if checkpoint else ""
        super().__init__(
            f"step {step}: {problem}.{where} Check that step's data, lower lr, lengthen the warmup, or use bf16 or "
            "fp32 instead of fp16"
        )
        self.step = step


@dataclasses.dataclass
class TrainResult:
    """The outcome of a run.

    Attributes:
        steps: optimizer steps, including those before a resume.
        stopped: by a signal, before the last step.
        metrics: of the last evaluation.
        history: the records of metrics.jsonl.
        head: the classification head; None for causal-lm.
        labels: the label names; empty for causal-lm.
        trainable_parameters: how many.
        skipped_steps: by the fp16 scaler.
        seconds: spent in training steps.
        prefix_seconds: spent filling the prefix cache.
        eval_seconds: spent in evaluations.
        tokens_per_second: real tokens, without padding, over ``seconds``.
        prefix_layers: layers whose activations were cached; 0 without the cache.
        checkpoint: the newest one.
    """

    steps: int
    stopped: bool
    metrics: dict[str, float] | None
    history: list[dict[str, Any]]
    head: ClassificationHead | None
    labels: list[str]
    trainable_parameters: int
    skipped_steps: int
    seconds: float
    prefix_seconds: float
    eval_seconds: float
    tokens_per_second: float
    prefix_layers: int
    checkpoint: Path | None
