"""A head on the decoder's last hidden states, and the one of a classification; the others are in head_kinds.py.

It pools the states of the real tokens, whichever side the padding is on, and maps the result to scores. It is tiny, so
it computes in fp32 even under autocast. It is saved beside the adapter as ``head.safetensors`` and
``head_config.json``, which includes its kind and the label names. What its scores mean only the head knows: their loss,
their metrics, what they predict.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkern import checks
from adapterkern.files import find_weights, read_json, read_tensors, read_versioned, write_pair
from adapterkern.model.files.owner import check_folder
from adapterkern.training import processes
from adapterkern.training.config import POOLINGS

HEAD_WEIGHTS = "head.safetensors"
HEAD_CONFIG = "head_config.json"
FORMAT_VERSION = 1


class Prediction(NamedTuple):
    """The label that a classification head predicts for a row, its probability (0 to 1), and that of each label."""

    label: str
    probability: float
    probabilities: dict[str, float]

    def columns(self) -> dict[str, Any]:
        """What a table of predictions has of it."""
        return {"prediction": self.label, "probability": self.probability, "probabilities": self.probabilities}


class Head(nn.Module):
    """Scores from pooled hidden states: ``linear(pool(hidden, attention_mask))``.

    Attributes:
        task: of ``TrainConfig``, and the kind of head in ``head_config.json``.
        problem_type: what transformers calls it.
        fields: those of ``head_config.json`` that a kind of head has besides, and their types.
        right: a prediction is right or wrong, so that there is an accuracy.
        whole: ``metrics`` has more than sums over rows.
        loss_unit: of the mean loss, for a reader.
        labels: the label names; empty where the score is a number.
    """

    task: ClassVar[str]
    problem_type: ClassVar[Literal["single_label_classification", "multi_label_classification", "regression"]]
    fields: ClassVar[Mapping[str, Any]] = {}
    right: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    loss_unit: ClassVar[str]

    def __init__(self, hidden_size: int, outputs: int, labels: Sequence[str], pooling: str) -> None:
        super().__init__()
        checks.integer("hidden_size", hidden_size, 1)
        checks.choice("pooling", pooling, POOLINGS)
        if not all(isinstance(label, str) for label in labels):
            raise TypeError(f"labels: expected strings, got {labels}")
        self.labels = list(labels)
        self.pooling = pooling
        self.linear = nn.Linear(hidden_size, outputs)

    @classmethod
    def of_data(cls, hidden_size: int, labels: Sequence[str], targets: Sequence[np.ndarray], pooling: str) -> Self:
        """A new head for training data with these labels and targets."""
        return cls.of_config({"hidden_size": hidden_size, "labels": labels, "pooling": pooling})

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        """A new head as a ``head_config.json`` describes it. Raises ``TypeError`` or ``ValueError`` as ``__init__``."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """``hidden`` (B, L, d), ``attention_mask`` (B, L) with 1 on real tokens → scores (B, outputs), fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = pool(hidden, attention_mask, self.pooling)
            return self.linear(pooled.to(self.linear.weight.dtype)).float()  # bf16 under DeepSpeed

    def loss(self, scores: Tensor, targets: Tensor, *, count: bool, **options: Any) -> tuple[Tensor, Tensor]:
        """The summed loss of scores (B, outputs), and (1,) how many rows are right, 0 unless ``count``.

        ``targets`` are those of all rows in a row, as ``collate`` gives them. ``options`` are those of
        ``TrainingLoss``, which a classification alone has.
        """
        raise NotImplementedError

    def predictions(self, scores: Tensor) -> list[Any]:
        """What each row of scores (B, outputs) predicts."""
        raise NotImplementedError

    def logits(self, scores: Tensor) -> Tensor:
        """The scores (B, outputs) as transformers' ``...ForSequenceClassification`` give them."""
        return scores

    def metrics(self, scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """What is more than sums over rows, from all rows' scores and targets, one row each."""
        return {}

    def shown(self, targets: np.ndarray) -> str:
        """An example's targets, for a reader."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values that its scores depend on besides its weights."""
        return {"pooling": self.pooling} | {name: getattr(self, name) for name in self.fields}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the two files: both or, if interrupted, neither."""
        write_head(
            Path(directory),
            self.task,
            self,
            {"hidden_size": self.linear.in_features, "labels": self.labels, **self.settings},
        )

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Read a saved head.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged; the message names file and field.
        """
        kinds = {"hidden_size": int, "pooling": str, "labels": list, **cls.fields}
        path, config = read_head_config(Path(directory), cls.task, kinds)
        try:
            with torch.device("meta"):  # allocates nothing: a damaged size may be any number
                head = cls.of_config(config)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: of a size that no tensor has
            raise ValueError(f"{path}: {error}") from error
        read_head_weights(Path(directory), head, config)
        return head


class ClassificationHead(Head):
    """A score per label, of which the highest is predicted.

    Args:
        hidden_size: d.
        labels: at least two different label names; score i belongs to ``labels[i]``.
        pooling: ``"mean"`` over the real tokens, or the ``"last"`` real token.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value; the message names it.
    """

    task, problem_type, whole = "classification", "single_label_classification", False
    loss_unit = "cross-entropy (nats per text)"

    def __init__(self, hidden_size: int, labels: list[str], pooling: str = "mean") -> None:
        super().__init__(hidden_size, len(labels), labels, pooling)
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise ValueError(f"labels: expected at least two different names, got {labels}")

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["hidden_size"], config["labels"], config["pooling"])

    def loss(self, scores: Tensor, targets: Tensor, *, count: bool, **options: Any) -> tuple[Tensor, Tensor]:
        return scored(scores, targets, count, **options)

    def predictions(self, scores: Tensor) -> list[Prediction]:
        best = scores.argmax(-1).tolist()  # as an evaluation counts: two probabilities may both round to 1
        return [
            Prediction(self.labels[number], of_row[number], dict(zip(self.labels, of_row, strict=True)))
            for number, of_row in zip(best, scores.softmax(-1).tolist(), strict=True)
        ]

    def shown(self, targets: np.ndarray) -> str:
        return self.labels[int(targets[0])]


def scored(scores: Tensor, targets: Tensor, count: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """From scores (K, classes): the summed cross-entropy, and (1,) how many targets have the highest score.

    ``options`` are further ones of torch's ``cross_entropy``.
    """
    loss = F.cross_entropy(scores.float(), targets, reduction="sum", **options)
    return loss, (scores.argmax(-1) == targets).sum()[None] if count else targets.new_zeros(1)


Kept = list[tuple[Sequence[Any], Tensor]]  # the examples of a batch, and the scores (B, outputs) of each


@contextlib.contextmanager
def scores_kept(head: Head | None, feed: Any) -> Iterator[Kept]:
    """Context in which each forward adds the scores of a ``head`` that needs all, of the batch that ``feed`` made."""
    kept: Kept = []
    if head is None or not head.whole:
        yield kept
        return
    hook = head.register_forward_hook(lambda _, __, scores: kept.append((feed.examples, scores.detach())))
    try:
        yield kept
    finally:
        hook.remove()


def gathered(kept: Kept) -> dict[int, np.ndarray]:
    """The scores (outputs,) by the number of the example's row, of all processes on each."""
    return processes.merged(
        {e.row: of_row for batch, scores in kept for e, of_row in zip(batch, scores.cpu().numpy(), strict=True)}
    )


def write_head(directory: Path, kind: str, head: nn.Module, fields: dict[str, Any]) -> None:
    """Write a head's weights, and ``fields`` with what identifies them: both files or, if interrupted, neither.

    Raises ``ValueError`` if the folder holds a model, or files of these names that are not a head's.
    """
    check_folder(directory)
    tensors = {key: t.detach().to("cpu").contiguous() for key, t in head.state_dict().items()}

    def save(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})

    config = {"format_version": FORMAT_VERSION, "head": kind, **fields}
    write_pair(directory / HEAD_WEIGHTS, directory / HEAD_CONFIG, save, config)


def head_kind(directory: Path) -> str | None:
    """The kind of the head saved in ``directory``; None if there is none. Raises ``ValueError`` if it is damaged."""
    try:
        return read_json(directory / HEAD_CONFIG).get("head")
    except FileNotFoundError:
        return None


def read_head_config(directory: Path, kind: str, kinds: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The path and the content of the configuration of a head of this ``kind``.

    Args:
        kinds: the fields that it must have, and their types, as ``read_versioned`` takes them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another kind of head; the message names the file.
    """
    path = directory / HEAD_CONFIG
    found = read_versioned(path, FORMAT_VERSION, {"head": str})["head"]
    if found != kind:  # before its fields: another kind of head has others
        raise ValueError(f"{path}: expected a {kind} head of format_version {FORMAT_VERSION}, got {found}")
    return path, read_versioned(path, FORMAT_VERSION, {**kinds, "weights_sha256": str})


def saved_labels(directory: Path, task: str) -> list[str]:
    """The labels of the head in ``directory``, which is of this ``task``. Raises as ``read_head_config``."""
    return read_head_config(directory, task, {"labels": list})[1]["labels"]


def read_head_weights(directory: Path, head: nn.Module, config: dict[str, Any]) -> None:
    """Load the saved weights into ``head``, which takes their dtype.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are not the ones that ``config`` was saved with, or do not fit ``head``.
    """
    weights = directory / HEAD_WEIGHTS
    tensors = read_tensors(find_weights(weights, directory / HEAD_CONFIG, config["weights_sha256"]))
    try:
        head.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights}: not this head's weights: {error}") from error


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """(B, L, d) → (B, d) in fp32: the mean of the real tokens' states, or the last real token's state."""
    if pooling == "last":
        # argmax of the running count is the first position that reaches it: the last 1, whichever side is padded.
        last = attention_mask.cumsum(1).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    mask = attention_mask.to(torch.float32)
    summed = torch.bmm(mask[:, None], hidden.float())[:, 0]
    return summed / mask.sum(1, keepdim=True)
