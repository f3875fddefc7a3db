"""``Distillation``: soft labels of a teacher for the targets of causal-lm rows.

It suits a student that is smaller than its teacher: ``first_layers`` makes one that shares the teacher's
parameters. The loss, its temperature T and its mixing weight λ are those of soft_labels.py.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern import checks
from adapterkern.model.decoder import eval_mode
from adapterkern.model.decoder import first_layers as first_layers  # users import it from here
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.distillation.context import TeacherContext, of_teacher
from adapterkern.recipes.distillation.keeping import KeepBehaviour as KeepBehaviour  # the old module had both
from adapterkern.recipes.distillation.keeping import WithKept as WithKept
from adapterkern.recipes.distillation.labels import StoredLabels, about, check_labels, key, teacher_digest
from adapterkern.recipes.distillation.rollouts import Rollout, Rollouts, check_prompts, with_streams
from adapterkern.recipes.distillation.settings import ContextSettings, RolloutSettings, SoftLabelSettings
from adapterkern.recipes.distillation.soft_labels import Labels, labels_of
from adapterkern.recipes.distillation.teacher import Taught, described, saved_fields, token_metrics
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, count_targets
from adapterkern.training.data.examples import Example, Rows
from adapterkern.training.data.padding import check_positions
from adapterkern.training.data.prefix import Context
from adapterkern.training.feed import Bar, Feed, eval_batches

_LABELS = "label_"  # begins the names of stored labels in a batch

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
        teacher_labels: a folder for the teacher's likeliest tokens, with ``top_k``, see labels.py: the teacher runs on
            texts that have none there, before the first step. None: it runs in every step and evaluation.
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
        teacher_labels: str | os.PathLike[str] | None = None,
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

        self.teacher_labels = teacher_labels
        self.labels: StoredLabels | None = None

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
        if self.teacher_labels is not None:
            self._open_labels(self.teacher_labels, config)
        return examples

    def _open_labels(self, directory: str | os.PathLike[str], config: TrainConfig) -> None:
        check_labels(directory, self.soft_labels, self.rollouts.settings, config)
        teacher, labels = self.model.base if self.teacher is None else self.teacher, self.soft_labels
        found = {"teacher": teacher_digest(teacher, self.context.ids), **about(labels, config)}
        if self.labels is None or self.labels.about != found:
            vocabulary = len(self.model.get_output_embeddings().weight)
            self.labels = StoredLabels(directory, found, described(teacher), vocabulary)

    def prepare(self, examples: Sequence[Example], feed: Feed, bar: Bar) -> str:
        """Store the labels of texts that have none. Returns how many there are; "" without ``teacher_labels``."""
        if self.labels is None:
            return ""
        missing, known = self.labels.missing(examples), len({key(example) for example in examples})
        with bar("teacher", len(missing)) as on_batch, torch.no_grad(), eval_mode(self.model):
            try:
                for rows in eval_batches(missing, feed.config):
                    batch = feed(rows)
                    states = self._taught(batch if self.context else self.with_prefix(batch))
                    labels = labels_of(self.as_teacher(states), batch["targets"], self.soft_labels)
                    self.labels.add(rows, labels)
                    if not on_batch(len(rows)):
                        break
            finally:
                self.labels.flush()
        texts = f"{known - len(missing)} of {known} texts known in {self.labels.directory}"
        return f"teacher's labels: {texts}, {self.labels.token_bytes} bytes per token"

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
        rollouts = [example for example in examples if isinstance(example, Rollout)]
        labels = None if self.labels is None or rollouts else self.labels.of(examples)
        if labels is not None:
            return batch | {_LABELS + name: tensor for name, tensor in labels._asdict().items()}
        if self.context:
            batch |= self.context.of_batch(examples, config)
        return with_streams(batch, rollouts, config) if rollouts else batch

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss, and the other sums (5,) of ``SoftLabelLoss``."""
        runs = self._teaches and _LABELS + "tokens" not in batch
        return super().forward(self.with_prefix(batch) if runs and not self.context else batch)

    @property
    def _teaches(self) -> bool:
        return self.soft_labels.weight > 0 or not self.training

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """As ``forward``; ``batch`` from ``with_prefix``."""
        taught: Tensor | Labels | None = None
        if _LABELS + "tokens" in batch:
            taught = Labels(*(batch[_LABELS + name] for name in Labels._fields))
        elif self._teaches:
            taught = self._taught(batch)
        states = hidden.flatten(0, 1)[batch["positions"]]
        loss, *others = self.soft_label_loss(states, taught, targets=batch.get("targets"))
        return loss, torch.stack(others)

    def _taught(self, batch: Batch) -> Tensor:
        """The teacher's states (N, its width) that predict the targets; ``batch`` from ``with_prefix``."""
        read = of_teacher(batch)
        return self.taught(read).flatten(0, 1)[read["positions"]]

    def metrics(self, sums: Sequence[float], examples: Sequence[Example], config: TrainConfig) -> dict[str, float]:
        """``loss`` as in training, and the metrics of ``token_metrics``."""
        targets = count_targets(examples)
        return {"loss": sums[0] / targets} | token_metrics(sums[1:], targets)
