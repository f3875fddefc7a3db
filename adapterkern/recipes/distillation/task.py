"""``Distillation``: soft labels of a teacher for the targets of causal-lm rows.

It suits a student that is smaller than its teacher: ``first_layers`` makes one that shares the teacher's
parameters. The loss, its temperature T and its mixing weight λ are those of soft_labels.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern.model.decoder import first_layers as first_layers  # users import it from here
from adapterkern.recipes.distillation.keeping import KeepBehaviour as KeepBehaviour  # the old module had both
from adapterkern.recipes.distillation.keeping import WithKept as WithKept
from adapterkern.recipes.distillation.teacher import Taught, token_metrics
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, count_targets
from adapterkern.training.data.examples import Example, Rows


class Distillation(Taught):
    """Soft labels for the targets of causal-lm rows: (1 − λ) · CE + λ · T² · D at each of them.

    With ``weight=0`` the teacher runs in evaluations only, which always measure how far the student is from it.
    """

    def load(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> list[Example]:
        """As ``Task.load``. Raises ``ValueError`` also where ``config.task`` is not causal-lm."""
        if config.task != "causal-lm":
            raise ValueError(f"task: expected causal-lm for Distillation, whose labels are tokens, got {config.task!r}")
        return super().load(rows, config, tokenizer)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss, and the other sums (5,) of ``SoftLabelLoss``."""
        return super().forward(self.with_prefix(batch) if self._teaches else batch)

    @property
    def _teaches(self) -> bool:
        return self.soft_labels.weight > 0 or not self.training

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """As ``forward``; ``batch`` from ``with_prefix``."""
        positions = batch["positions"]
        taught = self.taught(batch).flatten(0, 1)[positions] if self._teaches else None
        loss, *others = self.soft_label_loss(hidden.flatten(0, 1)[positions], taught, targets=batch["targets"])
        return loss, torch.stack(others)

    def metrics(self, sums: Sequence[float], examples: Sequence[Example], config: TrainConfig) -> dict[str, float]:
        """``loss`` as in training, and the metrics of ``token_metrics``."""
        targets = count_targets(examples)
        return {"loss": sums[0] / targets} | token_metrics(sums[1:], targets)
