"""What both tasks share: a teacher of hidden states, the loss against it, its metrics, and ``distillation.json``.

The teacher is the model itself with its adapters off, or another causal language model with the same vocabulary. The
first takes no memory, and no time below the first adapter: the frozen prefix is computed once for both.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adapterkern import checks
from adapterkern.files import read_json, write_json
from adapterkern.model.copies import Replaceable
from adapterkern.model.digest import adapter_digest
from adapterkern.model.files.card import base_name
from adapterkern.model.llama import LlamaAdapter
from adapterkern.model.logits import LogitsPath, find_logits_path, logits_of
from adapterkern.model.saving import unloaded_on_error
from adapterkern.recipes.distillation.settings import SoftLabelSettings
from adapterkern.recipes.distillation.soft_labels import Labels, SoftLabelLoss, Teacher, soft_label_loss
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, inputs
from adapterkern.training.data.examples import Example
from adapterkern.training.drift import untouched
from adapterkern.training.heads import Head
from adapterkern.training.saved import load_model, load_run
from adapterkern.training.task import Task

DISTILLATION_CONFIG = "distillation.json"
_SAVED = ("temperature", "weight", "divergence")  # always; others if they are set: earlier versions do not have them


class Taught(Task[Example]):
    """A task with a teacher: what ``Distillation`` and ``KeepBehaviour`` share.

    Args:
        model: the student, with its adapters.
        teacher: None is ``model`` with its adapters off; or a transformers causal language model with the same
            vocabulary, on the same device, whose logits follow from its last hidden states. Over the same backbone that
            is ``model.reference(name)``, with another adapter, or one with a saved adapter,
            ``LlamaAdapter.from_pretrained(model.reference(), run)``. It is put into eval mode. It does not become part
            of this module: it is neither trained nor saved.
        head: a classification head, for a task that has one.
        settings: the fields of ``SoftLabelSettings``; later ``soft_labels``.

    Raises:
        ValueError: a setting out of its range, or a teacher that does not fit.
        TypeError: a setting of the wrong type.
    """

    records: ClassVar[tuple[type, ...]] = (SoftLabelSettings,)  # whose fields are keyword arguments, and settings
    files: ClassVar[tuple[str, ...]] = (*Task.files, DISTILLATION_CONFIG)
    uniform = False  # the teacher runs only where it has something to teach, and the LM head once per chunk of tokens
    teacher: Any

    def __init__(
        self,
        model: LlamaAdapter,
        teacher: Any = None,
        *,
        head: Head | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, head)
        self.soft_labels = SoftLabelSettings(**settings)
        if (top_k := self.soft_labels.top_k) is not None:
            checks.integer("top_k", top_k, 1, model.get_output_embeddings().weight.shape[0] - 1)
        if teacher is None and (model.trains_below() or isinstance(model.get_output_embeddings(), Replaceable)):
            raise ValueError(
                "modules_to_save: expected neither embeddings nor LM head where the model without its adapter is the "
                f"teacher, got {', '.join(model.adapter_config().modules_to_save or ())}"
            )
        if isinstance(model.get_output_embeddings(), Replaceable):
            raise ValueError(
                "modules_to_save: expected a frozen LM head, to which the loss of soft labels gives no gradient, got "
                f"{', '.join(model.adapter_config().modules_to_save or ())}"
            )
        if teacher is not None:
            self._teacher_logits = check_teacher(model, teacher)
            teacher.eval()
        self.__dict__["teacher"] = teacher  # not through setattr: a submodule would follow train() and be prepared

    def settings_in(self, directory: Path) -> dict[str, Any] | None:
        return read_json(directory / DISTILLATION_CONFIG)

    @property
    def backbones(self) -> list[Any]:
        return super().backbones if self.teacher is None else [*super().backbones, self.teacher]

    @property
    def settings(self) -> dict[str, Any]:
        """The teacher as ``described`` (None: the model itself), and the settings of the loss."""
        return {"teacher": None if self.teacher is None else described(self.teacher)} | saved_fields(self.soft_labels)

    # A forward

    def with_prefix(self, batch: Batch) -> Batch:
        """The batch with its ``prefix``, if the teacher is the model itself: student and teacher both start there.

        Without one if the decoder cannot be run in two calls; then both run all layers.
        """
        if "prefix" in batch or self.teacher is not None or self.model.split_obstacle:
            return batch
        where: dict[str, Any] = inputs(batch)
        return batch | {"prefix": self.model.run_prefix(**where)}

    def taught(self, batch: Batch) -> Tensor:
        """The teacher's last hidden states (B, L, its width), without gradient; ``batch`` from ``with_prefix``."""
        if self.teacher is not None:
            with torch.no_grad():
                return self.teacher.base_model(**inputs(batch), use_cache=False).last_hidden_state
        return untouched(self.model, batch)

    def as_teacher(self, taught: Tensor) -> Teacher:
        """The teacher's states (N, its width) with its head."""
        return Teacher(taught, self.model.logits_of if self.teacher is None else self._logits_of_teacher)

    def soft_label_loss(self, hidden: Tensor, taught: Tensor | Labels | None, **values: Any) -> SoftLabelLoss:
        """The loss of tokens' states (N, d), against the teacher's of the same tokens (N, its width), or None.

        ``values`` are further arguments of ``soft_labels.soft_label_loss``; they go before this task's settings.
        """
        teacher = self.as_teacher(taught) if isinstance(taught, Tensor) else taught
        settings = dataclasses.asdict(self.soft_labels) | {"count": not self.training}
        return soft_label_loss(hidden, self.model.logits_of, teacher, **(settings | values))

    def _logits_of_teacher(self, states: Tensor) -> Tensor:
        return logits_of(self.teacher, self._teacher_logits, states)

    # Files

    def save(self, directory: Path, config: TrainConfig) -> None:
        """What ``Task.save`` writes, and the settings in ``distillation.json``."""
        super().save(directory, config)
        write_json(directory / DISTILLATION_CONFIG, self.settings)

    @classmethod
    def from_pretrained(
        cls,
        llama: Any,
        directory: str | os.PathLike[str],
        *,
        fused: bool = True,
        liger: bool = False,
        teacher: Any = None,
    ) -> tuple[Self, TrainConfig]:
        """The task of a saved run or checkpoint on ``llama``, with the run's settings, and its configuration.

        The settings are those of ``distillation.json``. The teacher is not saved: a run whose teacher was another model
        needs it again, as ``teacher``. The student by itself, without scores against a teacher, is a plain task:
        ``Task.from_pretrained`` loads it, and ``adapterkern eval`` evaluates it so.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or does not fit, or ``teacher`` is missing, or given and the run had none.
        """
        saved, settings = _read_settings(Path(directory) / DISTILLATION_CONFIG, cls.records)
        if (saved is None) != (teacher is None):
            expected = f"the run's, {saved}" if saved else "None, the model itself as in the run"
            raise ValueError(f"teacher: expected {expected}, got {None if teacher is None else type(teacher).__name__}")
        config, head = load_run(directory)
        with unloaded_on_error(load_model(llama, directory, config, fused=fused, liger=liger)) as model:
            head = None if head is None else head.to(model.device)
            return cls(model, teacher, head=head, **settings), config


def described(teacher: Any) -> str:
    """A teacher by its name and its number of layers; one with an adapter also by a digest of its parameters."""
    words = [
        base_name(teacher) or type(teacher).__name__,
        f"{teacher.config.get_text_config().num_hidden_layers} layers",
    ]
    if isinstance(teacher, LlamaAdapter) and teacher.active_adapter is not None:
        digests = [adapter_digest(teacher.adapters[name])[:12] for name in teacher.active_adapters()]
        words.append(f"adapter {' on '.join(reversed(digests))}")
    return ", ".join(words)


def saved_fields(record: Any) -> dict[str, Any]:
    """What ``distillation.json`` holds of settings: all that the numbers depend on, and differs from the defaults."""
    fields = (field for field in dataclasses.fields(record) if field.name != "chunk_tokens")
    given = ((field, getattr(record, field.name)) for field in fields)
    return {field.name: value for field, value in given if field.name in _SAVED or value != field.default}


def _read_settings(path: Path, records: Sequence[Any]) -> tuple[str | None, dict[str, Any]]:
    """The teacher's description, and the keyword arguments that ``Taught.save`` wrote of settings of these kinds."""
    saved = read_json(path)
    missing = [name for name in ("teacher", *_SAVED) if name not in saved]
    if missing:
        raise ValueError(f"{path}: field {missing[0]!r} is missing")
    if not isinstance(saved["teacher"], str | None):
        raise ValueError(f"{path}: field 'teacher': expected a string or null, got {saved['teacher']!r}")
    try:
        found: dict[str, Any] = {}
        for record in records:
            given = {field.name: saved[field.name] for field in dataclasses.fields(record) if field.name in saved}
            found |= dataclasses.asdict(record(**given))
        return saved["teacher"], found
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_teacher(model: LlamaAdapter, teacher: Any) -> LogitsPath:
    """How ``teacher`` computes its logits. Raises ``ValueError`` if it cannot teach ``model``."""
    if teacher is model.base:
        raise ValueError("teacher: expected None for the model itself with its adapters off, got its backbone")
    head = getattr(teacher, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(f"teacher: expected a transformers causal language model, got {type(teacher).__name__}")
    sizes = [m.weight.shape[0] for m in (model.base.get_output_embeddings(), head)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"teacher: expected the student's vocabulary of {sizes[0]} tokens, got one of {sizes[1]}")
    if teacher.device != model.device:
        raise ValueError(f"teacher: expected it on the student's device {model.device}, got {teacher.device}")
    path = find_logits_path(teacher)
    if path.obstacle:
        raise ValueError(f"teacher: expected logits that follow from the last hidden states, but {path.obstacle}")
    return path


def token_metrics(sums: Sequence[float], tokens: int) -> dict[str, float]:
    """Means over tokens, from the sums of ``SoftLabelLoss`` without its loss.

    Cross-entropy, perplexity and accuracy of the student; the teacher's perplexity; the divergence D, without T², in
    nats; and ``agreement``, how often both have the same token on top.
    """
    cross_entropy, divergence, teacher_cross_entropy, correct, agreement = (value / tokens for value in sums)
    return {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700.0)),
        "teacher_perplexity": math.exp(min(teacher_cross_entropy, 700.0)),
        "divergence": divergence,
        "agreement": agreement,
        "accuracy": correct,
        "targets": tokens,
    }
