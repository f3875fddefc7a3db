"""``Distillation``: soft labels of a teacher for the targets of causal-lm rows.

It suits a student that is smaller than its teacher: ``first_layers`` makes one that shares the teacher's
parameters. The loss, its temperature T and its mixing weight λ are those of soft_labels.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern import checks
from adapterkern.model.decoder import first_layers as first_layers  # users import it from here
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.distillation.context import TeacherContext, of_teacher
from adapterkern.recipes.distillation.keeping import KeepBehaviour as KeepBehaviour  # the old module had both
from adapterkern.recipes.distillation.keeping import WithKept as WithKept
from adapterkern.recipes.distillation.rollouts import Rollout, Rollouts, check_prompts, with_streams
from adapterkern.recipes.distillation.settings import ContextSettings, RolloutSettings, SoftLabelSettings
from adapterkern.recipes.distillation.teacher import Taught, saved_fields, token_metrics
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, count_targets
from adapterkern.training.data.examples import Example, Rows
from adapterkern.training.data.padding import check_positions
from adapterkern.training.data.prefix import Context

# What TRL's trainers for it call an argument
_OTHER_NAMES = {"lmbda": "on_policy", "teacher_model": "teacher", "max_completion_length": "max_new_tokens"}
_OTHER_NAMES |= {"loss_top_k": "top_k", "teacher_model_name_or_path": "teacher, a model"}


@checks.other_names(**_OTHER_NAMES)
class Distillation(Taught):
    """Soft labels for the targets of causal-lm rows: (1 − λ) · CE + λ · T² · D at each of them.

    With ``weight=0`` the teacher runs in evaluations only, which always measure how far the student is from it.

    Args:
        model, teacher, settings: see ``Taught``, which has more settings.
        teacher_context: see ``ContextSettings``; later ``context``.
        on_policy, max_new_tokens, rollout_temperature: see ``RolloutSettings``; later ``rollouts``. On-policy steps
            have λ · T² · D at the tokens that the student itself has generated, see rollouts.py.
    """

    records = (SoftLabelSettings, ContextSettings, RolloutSettings)

    def __init__(
        self,
        model: LlamaAdapter,
        teacher: Any = None,
        *,
        teacher_context: str | None = None,
        on_policy: float = 0.0,
        max_new_tokens: int | None = None,
        rollout_temperature: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, teacher, **settings)
        self.context = TeacherContext(ContextSettings(teacher_context=teacher_context))
        self.rollouts = Rollouts(
            model,
            RolloutSettings(
                on_policy=on_policy, max_new_tokens=max_new_tokens, rollout_temperature=rollout_temperature
            ),
        )

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | saved_fields(self.context.settings) | saved_fields(self.rollouts.settings)

    def load(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> list[Example]:
        """As ``Task.load``. Raises ``ValueError`` also where ``config.task`` is not causal-lm."""
        if config.task != "causal-lm":
            raise ValueError(f"task: expected causal-lm for Distillation, whose labels are tokens, got {config.task!r}")
        self.rollouts.settings.check(self.soft_labels, config)
        self.context.settings.check(config)
        examples = super().load(rows, config, tokenizer)
        if self.rollouts.settings.on_policy and not self.rollouts.ends:
            self.rollouts.read_ends(tokenizer, examples)
        if self.context:
            self.context.read(tokenizer)
            check_positions(
                self.model if self.teacher is None else self.teacher, list(map(self.context.before, examples))
            )
        return examples

    def order(self, examples: Sequence[Example], config: TrainConfig, epoch: int) -> list[int]:
        """As ``Task.order``. Raises ``DataError`` for rows that have no prompt if some steps are on-policy."""
        if self.rollouts.settings.on_policy and epoch == 0:
            check_prompts(examples, self.rollouts.settings, config)
        return super().order(examples, config, epoch)

    def reread(self, examples: list[Example]) -> list[Example]:
        """None if all steps are on-policy."""
        return [] if self.rollouts.settings.on_policy == 1 else examples

    def step_examples(
        self, examples: list[Example], config: TrainConfig, epoch: int, index: int, autocast: Context
    ) -> list[Example]:
        """The rows themselves, or rollouts from their prompts."""
        if self.rollouts.chosen(config, epoch, index):
            return self.rollouts.of_step(examples, config, epoch, index, autocast)
        return examples

    def collate(self, examples: Sequence[Example], config: TrainConfig) -> Batch:
        """The batch that ``forward`` takes: of rollouts without ``targets``, since they have no cross-entropy."""
        batch = super().collate(examples, config)
        if self.context:
            batch |= self.context.of_batch(examples, config)
        rollouts = [example for example in examples if isinstance(example, Rollout)]
        return with_streams(batch, rollouts, config) if rollouts else batch

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss, and the other sums (5,) of ``SoftLabelLoss``."""
        return super().forward(self.with_prefix(batch) if self._teaches and not self.context else batch)

    @property
    def _teaches(self) -> bool:
        return self.soft_labels.weight > 0 or not self.training

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """As ``forward``; ``batch`` from ``with_prefix``."""
        taught = None
        if self._teaches:
            read = of_teacher(batch)
            taught = self.taught(read).flatten(0, 1)[read["positions"]]
        states = hidden.flatten(0, 1)[batch["positions"]]
        loss, *others = self.soft_label_loss(states, taught, targets=batch.get("targets"))
        return loss, torch.stack(others)

    def metrics(self, sums: Sequence[float], examples: Sequence[Example], config: TrainConfig) -> dict[str, float]:
        """``loss`` as in training, and the metrics of ``token_metrics``."""
        targets = count_targets(examples)
        return {"loss": sums[0] / targets} | token_metrics(sums[1:], targets)
