"""A classification run as transformers knows one: ``model(**inputs).logits``, ``pipeline("text-classification")``."""

import copy
import os
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as SUPPORTED

from adapterkern.training.config import TrainConfig
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.task import Task


class Classifier(PreTrainedModel):
    """Label scores from a task with a classification head, as one of transformers' ``...ForSequenceClassification``.

    Args:
        task: with a head; ``RoutedTask``, too.
        config: that of the training.

    Attributes:
        config: the backbone's, with ``id2label``, ``label2id`` and ``problem_type``.
        task: what computes; ``task.model`` is the ``LlamaAdapter``.
    """

    # transformers reads these from the class; the backbone has been checked.
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, task: Task[Any], config: TrainConfig) -> None:
        head = task.head
        if not isinstance(head, ClassificationHead):
            raise TypeError(f"task: expected one with a classification head, got {type(head).__name__}")
        described = copy.deepcopy(task.model.config)
        described.id2label = dict(enumerate(head.labels))
        described.label2id = {label: number for number, label in described.id2label.items()}
        described.problem_type = "single_label_classification"
        super().__init__(described)
        # pipeline looks for the name of the class among those that it supports
        name = SUPPORTED.get(described.model_type, type(self).__name__)
        self.__class__ = type(name, (type(self),), {"__module__": type(self).__module__})
        self.task = task
        self._trained_with = config
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Scores (B, labels), fp32, of ``input_ids`` (B, L), padded on either side as ``attention_mask`` (B, L) says.

        With ``labels`` (B,) also their mean cross-entropy. ``TypeError`` for arguments but ``return_dict`` and
        ``use_cache``.
        """
        if unknown := sorted(kwargs.keys() - {"return_dict", "use_cache"}):
            raise TypeError(f"forward: expected input_ids, attention_mask and labels, got {unknown[0]!r}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        head: Any = self.task.head
        with self.task.running(self._trained_with):
            scores = head(self.task.hidden({"input_ids": input_ids, "attention_mask": mask}), mask)
        loss = None if labels is None else F.cross_entropy(scores, labels)
        return SequenceClassifierOutput(loss=loss, logits=scores)

    def save_pretrained(self, directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Write what the training has written: adapters, head and ``task.json``, never the backbone."""
        if kwargs:
            raise TypeError(f"save_pretrained: unexpected argument {sorted(kwargs)[0]!r}")
        self.task.save(Path(directory), self._trained_with)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """Not here: ``ak.load(directory)`` makes one."""
        raise NotImplementedError(
            "from_pretrained: expected a call of ak.load(directory), which returns the classifier"
        )
