"""The heads of multi-label and regression, and which head a task has.

    multi-label    a score z per label, each by itself: loss −t log σ(z) − (1 − t) log(1 − σ(z)), predicted where z > 0
    regression     one score z for (y − mean) / std: loss (z − (y − mean) / std)², predicted is mean + std · z

Mean and standard deviation are those of the training targets, and are saved with the head. A new head begins near
z = 0, which is the mean, and what the loss, the learning rate and the clipping see does not depend on the unit of y:
AdamW moves a weight by about lr a step, so that a bias alone would take 10⁶ steps of 1e-3 to targets around 1000. So a
loss of 1 is that of always predicting the mean; ``rmse`` and ``mae`` are in the unit of y.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern import checks
from adapterkern.training.heads import ClassificationHead, Head
from adapterkern.training.scores import label_scores, number_scores


class LabelsPrediction(NamedTuple):
    """The labels that are predicted for a row, those of a probability above 0.5, and the probability of each label."""

    labels: list[str]
    probabilities: dict[str, float]

    def columns(self) -> dict[str, Any]:
        """What a table of predictions has of it."""
        return {"prediction": self.labels, "probabilities": self.probabilities}


class NumberPrediction(NamedTuple):
    """The number that is predicted for a row, in the unit of the training's."""

    value: float

    def columns(self) -> dict[str, Any]:
        """What a table of predictions has of it."""
        return {"prediction": self.value}


class MultiLabelHead(Head):
    """A score per label, each of which a text has or has not.

    Args:
        hidden_size: d.
        labels: different label names, at least one; score i belongs to ``labels[i]``.
        pooling: ``"mean"`` over the real tokens, or the ``"last"`` real token.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value; the message names it.
    """

    task, problem_type = "multi-label", "multi_label_classification"
    loss_unit = "cross-entropy (nats per label)"

    def __init__(self, hidden_size: int, labels: Sequence[str], pooling: str = "mean") -> None:
        super().__init__(hidden_size, len(labels), labels, pooling)
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"labels: expected different names, at least one, got {list(labels)}")

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["hidden_size"], config["labels"], config["pooling"])

    def loss(self, scores: Tensor, targets: Tensor, *, count: bool, **options: Any) -> tuple[Tensor, Tensor]:
        wanted = targets.view(scores.shape)
        loss = F.binary_cross_entropy_with_logits(scores.float(), wanted.float(), reduction="sum")
        right = ((scores > 0) == wanted.bool()).all(-1).sum()[None] if count else loss.new_zeros(1)
        return loss, right

    def predictions(self, scores: Tensor) -> list[LabelsPrediction]:
        return [
            LabelsPrediction(
                [name for name, there in zip(self.labels, predicted, strict=True) if there],
                dict(zip(self.labels, of_row, strict=True)),
            )
            for predicted, of_row in zip((scores > 0).tolist(), scores.sigmoid().tolist(), strict=True)
        ]

    def metrics(self, scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """``f1_micro`` over all labels of all rows, and ``f1_macro``, the mean of the labels'; 0 / 0 counts as 0."""
        return label_scores(targets, scores > 0)

    def shown(self, targets: np.ndarray) -> str:
        return ", ".join(self.labels[number] for number in np.flatnonzero(targets)) or "none"


class RegressionHead(Head):
    """One score, for a number.

    Args:
        hidden_size: d.
        mean, std: of the training targets, finite; ``std`` above 0.
        pooling: ``"mean"`` over the real tokens, or the ``"last"`` real token.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value; the message names it.
    """

    task, problem_type, right = "regression", "regression", False
    fields: ClassVar[Mapping[str, Any]] = {"mean": float, "std": float}
    loss_unit = "squared error (in variances of the training)"

    def __init__(self, hidden_size: int, mean: float = 0.0, std: float = 1.0, pooling: str = "mean") -> None:
        super().__init__(hidden_size, 1, (), pooling)
        self.mean = float(checks.number("mean", mean, "(-inf, inf)"))
        self.std = float(checks.number("std", std, "(0, inf)"))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["hidden_size"], config["mean"], config["std"], config["pooling"])

    @classmethod
    def of_data(cls, hidden_size: int, labels: Sequence[str], targets: Sequence[np.ndarray], pooling: str) -> Self:
        values = np.concatenate(targets)
        return cls(hidden_size, float(values.mean()), float(values.std()), pooling)

    def values(self, scores: np.ndarray) -> np.ndarray:
        """The numbers that scores predict, fp64, of the same shape."""
        return self.mean + self.std * scores.astype(np.float64)

    def loss(self, scores: Tensor, targets: Tensor, *, count: bool, **options: Any) -> tuple[Tensor, Tensor]:
        wanted = ((targets.double() - self.mean) / self.std).to(torch.float32)  # a mean may be far beyond fp32's digits
        loss = F.mse_loss(scores.float()[:, 0], wanted, reduction="sum")
        return loss, loss.new_zeros(1)

    def predictions(self, scores: Tensor) -> list[NumberPrediction]:
        return [NumberPrediction(value) for value in self.values(scores[:, 0].cpu().numpy()).tolist()]

    def logits(self, scores: Tensor) -> Tensor:
        return (self.mean + self.std * scores.double()).to(scores.dtype)

    def metrics(self, scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """``rmse`` and ``mae`` in the unit of the targets, ``r2``, ``pearson`` and ``spearman`` where defined."""
        return number_scores(targets[:, 0], self.values(scores[:, 0]))

    def shown(self, targets: np.ndarray) -> str:
        return f"{targets[0]:g}"


HEADS: Mapping[str, type[Head]] = {head.task: head for head in (ClassificationHead, MultiLabelHead, RegressionHead)}
