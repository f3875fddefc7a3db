"""How a run ends: with a ``TrainResult``, or with a number that is not finite."""

import dataclasses
from pathlib import Path
from typing import Any

from adapterkern.training.heads import ClassificationHead


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite. ``step`` says when (from 1); that step has changed no parameter."""

    def __init__(self, step: int, problem: str, checkpoint: Path | None) -> None:
        where = f" The newest checkpoint is {checkpoint}." if checkpoint else ""
        super().__init__(
            f"step {step}: {problem}.{where} Look at that step's data, lower lr, lengthen the warmup, or, with fp16, "
            "use bf16 or fp32"
        )
        self.step = step


@dataclasses.dataclass
class TrainResult:
    """What a run came to."""

    steps: int  # optimizer steps, those before a resume included
    stopped: bool  # by a signal, before its end
    metrics: dict[str, float] | None  # of the last evaluation
    history: list[dict[str, Any]]  # the records of metrics.jsonl
    head: ClassificationHead | None
    labels: list[str]
    trainable_parameters: int
    skipped_steps: int  # by the fp16 scaler
    seconds: float  # in training steps
    prefix_seconds: float  # filling the prefix cache
    eval_seconds: float
    tokens_per_second: float  # real tokens, padding left out, over `seconds`
    prefix_layers: int  # layers whose activations were cached; 0 without the cache
    checkpoint: Path | None  # the newest
