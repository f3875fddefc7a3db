"""A classification head on the decoder's last hidden states.

It pools the states of the real tokens, whichever side the padding is on, and maps the result to
label scores; it computes in fp32 also under autocast, since it is tiny and its input is not. It is saved beside the
adapter as ``head.safetensors`` and ``head_config.json``, label names included.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkern.files import find_weights, read_json, write_pair
from adapterkern.training.config import POOLINGS

HEAD_WEIGHTS = "head.safetensors"
HEAD_CONFIG = "head_config.json"
FORMAT_VERSION = 1


class ClassificationHead(nn.Module):
    """Label scores from pooled hidden states: ``linear(pool(hidden, attention_mask))``.

    Args:
        hidden_size: d.
        labels: the label names; score i belongs to ``labels[i]``.
        pooling: ``"mean"`` over the real tokens, or the ``"last"`` real token.
    """

    def __init__(self, hidden_size: int, labels: list[str], pooling: str = "mean") -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
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
        """Write the two files, each atomically; the configuration holds the weights' SHA-256."""
        fields = {"hidden_size": self.linear.in_features, "pooling": self.pooling, "labels": self.labels}
        write_head(Path(directory), "classification", self, fields)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "ClassificationHead":
        """Read a saved head. Raises ``FileNotFoundError``, or ``ValueError`` naming the file and what is wrong."""
        kinds: dict[str, type] = {"hidden_size": int, "pooling": str, "labels": list}
        path, config = read_head_config(Path(directory), "classification", kinds)
        if not all(isinstance(label, str) for label in config["labels"]) or config["hidden_size"] < 1:
            raise ValueError(f"{path}: expected hidden_size >= 1 and labels that are texts")
        try:
            with torch.device("meta"):  # a damaged size may be any number
                head = cls(config["hidden_size"], config["labels"], config["pooling"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        read_head_weights(Path(directory), head, config)
        return head


def write_head(directory: Path, kind: str, head: nn.Module, fields: dict[str, Any]) -> None:
    """Write a head's two files, each atomically: its weights, and ``fields`` with what identifies them."""
    tensors = {key: t.detach().to("cpu").contiguous() for key, t in head.state_dict().items()}

    def save(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})

    config = {"format_version": FORMAT_VERSION, "head": kind, **fields}
    write_pair(directory / HEAD_WEIGHTS, directory / HEAD_CONFIG, save, config)


def head_kind(directory: Path) -> str | None:
    """The kind of the head that is saved in ``directory``; None if there is none. Raises ``ValueError`` if damaged."""
    try:
        return read_json(directory / HEAD_CONFIG).get("head")
    except FileNotFoundError:
        return None


def read_head_config(directory: Path, kind: str, kinds: dict[str, type]) -> tuple[Path, dict[str, Any]]:
    """The path and the content of a head's configuration, its fields of the ``kinds`` that are expected."""
    path = directory / HEAD_CONFIG
    config = read_json(path)
    if (config.get("format_version"), config.get("head")) != (FORMAT_VERSION, kind):
        raise ValueError(f"{path}: expected a {kind} head of format_version {FORMAT_VERSION}, got {config.get('head')}")
    for name, expected in (kinds | {"weights_sha256": str}).items():
        if type(config.get(name)) is not expected:
            raise ValueError(f"{path}: field {name!r}: expected {expected.__name__}, got {config.get(name)!r}")
    return path, config


def read_head_weights(directory: Path, head: nn.Module, config: dict[str, Any]) -> None:
    """Put the saved weights into ``head``, if they are those that its configuration was saved with."""
    weights = directory / HEAD_WEIGHTS
    try:
        found = find_weights(weights, directory / HEAD_CONFIG, config["weights_sha256"])
        head.load_state_dict(load_file(found), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights}: not this head's weights: {error}") from error


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """(B, L, d) → (B, d) in fp32: the mean of the real tokens' states, or the last real token's."""
    if pooling == "last":
        # The last 1 of each row; argmax of the running count finds it whichever side the padding is on.
        last = attention_mask.cumsum(1).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    mask = attention_mask.to(torch.float32)
    summed = torch.bmm(mask[:, None], hidden.float())[:, 0]
    return summed / mask.sum(1, keepdim=True)
