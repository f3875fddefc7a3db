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
    """The outcome of a run."""

    steps: int  # optimizer steps, including those before a resume
    stopped: bool  # by a signal, before the last step
    metrics: dict[str, float] | None  # of the last evaluation
    history: list[dict[str, Any]]  # the records of metrics.jsonl
    head: ClassificationHead | None
    labels: list[str]
    trainable_parameters: int
    skipped_steps: int  # by the fp16 scaler
    seconds: float  # spent in training steps
    prefix_seconds: float  # spent filling the prefix cache
    eval_seconds: float  # spent in evaluations
    tokens_per_second: float  # real tokens, without padding, over `seconds`
    prefix_layers: int  # layers whose activations were cached; 0 without the cache
    checkpoint: Path | None  # the newest one
