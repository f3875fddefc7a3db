"""A classification head on the decoder's last hidden states.

It pools the states of the real tokens, whichever side the padding is on, and maps the result to label scores. It is
tiny, so it computes in fp32 even under autocast. It is saved beside the adapter as ``head.safetensors`` and
``head_config.json``, which includes the label names.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkern import checks
from adapterkern.files import find_weights, read_json, read_tensors, read_versioned, write_pair
from adapterkern.model.files.owner import check_folder
from adapterkern.training.config import POOLINGS

HEAD_WEIGHTS = "head.safetensors"
HEAD_CONFIG = "head_config.json"
FORMAT_VERSION = 1


class ClassificationHead(nn.Module):
    """Label scores from pooled hidden states: ``linear(pool(hidden, attention_mask))``.

    Args:
        hidden_size: d.
        labels: at least two different label names; score i belongs to ``labels[i]``.
        pooling: ``"mean"`` over the real tokens, or the ``"last"`` real token.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value; the message names it.
    """

    def __init__(self, hidden_size: int, labels: list[str], pooling: str = "mean") -> None:
        super().__init__()
        checks.integer("hidden_size", hidden_size, 1)
        checks.choice("pooling", pooling, POOLINGS)
        if not all(isinstance(label, str) for label in labels):
            raise TypeError(f"labels: expected strings, got {labels}")
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise ValueError(f"labels: expected at least two different names, got {labels}")
        self.labels = list(labels)
        self.pooling = pooling
        self.linear = nn.Linear(hidden_size, len(labels))

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """``hidden`` (B, L, d), ``attention_mask`` (B, L) with 1 on real tokens → scores (B, labels), fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = pool(hidden, attention_mask, self.pooling)
            return self.linear(pooled.to(self.linear.weight.dtype)).float()  # bf16 under DeepSpeed

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the two files: both or, if interrupted, neither."""
        fields = {"hidden_size": self.linear.in_features, "pooling": self.pooling, "labels": self.labels}
        write_head(Path(directory), "classification", self, fields)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "ClassificationHead":
        """Read a saved head.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged; the message names file and field.
        """
        kinds = {"hidden_size": int, "pooling": str, "labels": list}
        path, config = read_head_config(Path(directory), "classification", kinds)
        try:
            with torch.device("meta"):  # allocates nothing: a damaged size may be any number
                head = cls(config["hidden_size"], config["labels"], config["pooling"])
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: of a size that no tensor has
            raise ValueError(f"{path}: {error}") from error
        read_head_weights(Path(directory), head, config)
        return head


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


def saved_labels(directory: Path) -> list[str]:
    """The labels of the classification head in ``directory``. Raises as ``read_head_config``."""
    return read_head_config(directory, "classification", {"labels": list})[1]["labels"]


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
