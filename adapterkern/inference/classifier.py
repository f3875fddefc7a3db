"""A run with a head as transformers knows one: ``model(**inputs).logits``, ``pipeline("text-classification")``."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as SUPPORTED

from adapterkern.model.backbone import DTYPES
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.rows import warn_once
from adapterkern.training.heads import Head
from adapterkern.training.run.lock import in_one_thread
from adapterkern.training.task import Task

_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "single_label_classification": F.cross_entropy,
    "multi_label_classification": lambda scores, labels: F.binary_cross_entropy_with_logits(scores, labels.float()),
    "regression": lambda scores, labels: F.mse_loss(scores[:, 0], labels.view(-1).float()),
}


class Classifier(PreTrainedModel):
    """Scores from a task with a head, as one of transformers' ``...ForSequenceClassification``.

    Args:
        task: with a head; ``RoutedTask``, too.
        config: that of the training.

    Attributes:
        config: the backbone's, with ``id2label``, ``label2id`` and ``problem_type``, by which a pipeline knows what
            to do with the scores. The one label of a regression is ``"value"``.
        task: what computes; ``task.model`` is the ``LlamaAdapter``.
    """

    # transformers reads these from the class; the backbone has been checked.
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, task: Task[Any], config: TrainConfig) -> None:
        head = task.head
        if not isinstance(head, Head):
            raise TypeError(f"task: expected one with a head for labeled texts, got {type(head).__name__}")
        described = copy.deepcopy(task.model.config)
        described.id2label = dict(enumerate(head.labels or ["value"]))
        described.label2id = {label: number for number, label in described.id2label.items()}
        described.problem_type = head.problem_type
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

        They are those of ``predict``: in the precision of the training, and of its ``max_length`` first tokens, with a
        warning. Of a regression (B, 1), the numbers. With ``labels`` also their mean loss as transformers has it:
        cross-entropy of (B,) numbers of labels, binary cross-entropy of (B, labels) 0 or 1, mean squared error of (B,)
        numbers.

        Raises:
            TypeError: an argument but these, ``return_dict`` and ``use_cache``.
            RuntimeError: another thread uses the model, and a forward switches its adapters (routed, head alone).
        """
        if unknown := sorted(kwargs.keys() - {"return_dict", "use_cache"}):
            raise TypeError(f"forward: expected input_ids, attention_mask and labels, got {unknown[0]!r}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        input_ids, mask = self._cut(input_ids, mask)
        head: Any = self.task.head
        with self._as_trained():
            scores = head.logits(head(self.task.hidden({"input_ids": input_ids, "attention_mask": mask}), mask))
        loss = None if labels is None else _LOSSES[head.problem_type](scores, labels)
        return SequenceClassifierOutput(loss=loss, logits=scores)

    def _cut(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, L) without the tokens that a row of data would lose."""
        most = self._trained_with.max_length
        if input_ids.shape[1] <= most:
            return input_ids, mask
        kept = mask * (mask.cumsum(-1) <= most)
        if not torch.equal(kept, mask):
            warn_once(f"texts are cut to the {most} tokens (max_length) that the model was trained with")
        end = int(kept.any(0).nonzero().amax()) + 1 if kept.any() else most
        return input_ids[:, :end], kept[:, :end]

    @contextlib.contextmanager
    def _as_trained(self) -> Iterator[None]:
        """Context of a forward with the adapters and in the precision of the training."""
        task, config = self.task, self._trained_with
        with contextlib.ExitStack() as stack:
            if type(task) is not Task or not config.train_adapters:
                stack.enter_context(in_one_thread(task.model))
            stack.enter_context(task.running(config))
            if config.precision != "fp32":
                stack.enter_context(torch.autocast(task.model.device.type, DTYPES[config.precision]))
            yield

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
