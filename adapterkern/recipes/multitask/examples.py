"""One tokenized row of one of several tasks, and what is predicted for it."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Example


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TaskExample(Example):
    """One tokenized row of a task."""

    task: int  # its number among the names

    def arrays(self) -> tuple[np.ndarray, ...]:
        return *Example.arrays(self), np.array([self.task])

    def text(self) -> bytes:
        raise NotImplementedError(
            "eval_data: expected a mapping from tasks to rows, got a share of the training rows, for one task alone"
        )


class Prediction(NamedTuple):
    """The label that a task's head gives a text; otherwise as ``training.heads.Prediction``."""

    task: str
    label: str
    probability: float
    probabilities: dict[str, float]

    def columns(self) -> dict[str, Any]:
        """What a table of predictions has of it; the task is a column of its rows."""
        return {"prediction": self.label, "probability": self.probability, "probabilities": self.probabilities}


def check_task(config: TrainConfig) -> None:
    """Raise ``ValueError`` for a task that several adapters cannot learn in mixed batches."""
    if config.task not in ("classification", "causal-lm"):  # whose targets are one per row, or those of tokens
        raise ValueError(
            f"task: expected classification or causal-lm for several tasks at once, got {config.task}; train each alone"
        )


def as_example(example: Example, number: int) -> TaskExample:
    """The example as one of the task with this number."""
    return TaskExample(**{f.name: getattr(example, f.name) for f in dataclasses.fields(Example)}, task=number)
