"""The loss of training steps: cross-entropy with smoothed labels and weighted classes, as torch's has them.

Of targets y_i among C classes, p_i the softmax of their scores, the smoothing ε and the classes' weights w, a step has

    Σ_i [ (1 − ε) · w_{y_i} · (−log p_{i, y_i}) + ε/C · Σ_c w_c · (−log p_{i, c}) ] / Σ_i w_{y_i}

The divisor is that of the whole step, so the rows of a step count alike in whatever forwards they are. Evaluations have
the plain cross-entropy.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import count_targets
from adapterkern.training.data.examples import Example


@dataclasses.dataclass(frozen=True)
class TrainingLoss:
    """ε, and w: (C,) fp32 on the device of the scores; None weighs all classes alike."""

    label_smoothing: float = 0.0
    weight: Tensor | None = None
    weights: tuple[float, ...] = ()  # the same on the host

    def options(self, training: bool) -> dict[str, Any]:
        """The arguments of ``cross_entropy``: none but in training."""
        if not training:
            return {}
        smoothed = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return smoothed if self.weight is None else smoothed | {"weight": self.weight}

    def divisor(self, examples: Sequence[Example]) -> float:
        """Σ_i w_{y_i}: the number of targets unless classes are weighted."""
        if not self.weights:
            return count_targets(examples)
        return sum(self.weights[target] for example in examples for target in example.targets.tolist())


def check_loss(config: TrainConfig, kind: str, own: bool) -> None:
    """Raise ``ValueError`` for a setting that a loss of a task's ``own`` does not read. ``kind``: the task's class."""
    for name in ("label_smoothing", "class_weights"):
        if own and getattr(config, name):
            default = getattr(TrainConfig, name)
            raise ValueError(
                f"{name}: expected {default} for {kind}, which has a loss of its own, got {getattr(config, name)!r:.80}"
            )


@contextlib.contextmanager
def trained_with(task: Any, config: TrainConfig, examples: Sequence[Example]) -> Iterator[None]:
    """Inside the block the training loss of ``task`` is that of ``config`` for these training examples.

    Raises:
        ValueError: ``config.class_weights`` has not one weight for each label of the task's head.
    """
    task.training_loss = _training_loss(config, examples, None if task.head is None else task.head.labels, task)
    try:
        yield
    finally:
        task.training_loss = TrainingLoss()


def _training_loss(
    config: TrainConfig, examples: Sequence[Example], labels: list[str] | None, task: Any
) -> TrainingLoss:
    if config.class_weights is None or labels is None:
        return TrainingLoss(config.label_smoothing)
    if isinstance(config.class_weights, dict):
        weights = _by_label(config.class_weights, labels)
    else:
        weights = balanced(np.array([example.targets[0] for example in examples]), len(labels))
    return TrainingLoss(config.label_smoothing, torch.tensor(weights, device=task.model.device), tuple(weights))


def balanced(targets: np.ndarray, classes: int) -> list[float]:
    """n / (k · n_c) of each class, for n targets, n_c of the class, and k classes that have any; 0 of the others."""
    counts = np.bincount(targets, minlength=classes).tolist()
    present = sum(n > 0 for n in counts)
    return [len(targets) / (present * n) if n else 0.0 for n in counts]


def _by_label(weights: dict[str, float], labels: list[str]) -> list[float]:
    if odd := [label for label in weights if label not in labels] or [la for la in labels if la not in weights]:
        got = "is none of them" if odd[0] in weights else "is missing"
        names = ", ".join(map(repr, labels))[:200]
        raise ValueError(f"class_weights: expected a weight for each label, {names}; {odd[0]!r:.80} {got}")
    return [float(weights[label]) for label in labels]
