"""Stored soft labels: a teacher's likeliest tokens for each text, computed once and kept in a folder.

Of a target token the loss with ``top_k`` reads k + 1 numbers of the teacher, and its metrics one more:

    tokens  (k,)      the likeliest, 2 bytes each in a vocabulary of up to 65,536 tokens, else 4
    log p'  (k + 1,)  fp32, at the temperature: of these, and of all others together
    target  ()        fp32, at temperature 1

So a token takes 6 k + 8 bytes (8 k + 8), and the divergences are exactly those of a teacher that runs each time, all of
them, except for rounding: a teacher's states differ in the last digits from one shape of batch to another. fp16 numbers
would take a third less and be wrong by 1e-3.

    folder/teacher_labels.json         of which teacher they are, and for which settings
    folder/labels-DIGEST.safetensors   of some texts, each known by a digest of its tokens and targets

A file is named by its content's SHA-256, and written whole or not at all. So a folder whose writer was killed has the
texts of the files before, several runs may write to it at a time, and a damaged file is found.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from adapterkern.files import read_tensors, read_versioned, replacing, write_json
from adapterkern.model.digest import adapter_digest
from adapterkern.model.files.owner import check_folder
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.distillation.settings import RolloutSettings, SoftLabelSettings
from adapterkern.recipes.distillation.soft_labels import Labels
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import fingerprint
from adapterkern.training.data.examples import Example
from adapterkern.training.data.prefix import add_tensors

NAME = "teacher_labels.json"
FORMAT_VERSION = 1
_FILE_BYTES = 32 << 20  # about the size of a file: what a killed writer loses at most
_KEY_BYTES = 16
_SHORT = 1 << 16  # tokens of a vocabulary whose numbers have 2 bytes


def check_labels(
    directory: Any, soft_labels: SoftLabelSettings, rollouts: RolloutSettings, config: TrainConfig
) -> None:
    """Raise ``ValueError``, ``TypeError`` or ``OSError`` for what a training with stored labels cannot have."""
    if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
        raise TypeError(f"teacher_labels: expected a folder, got {directory!r}")
    if soft_labels.top_k is None:
        raise ValueError("top_k: expected an integer beside teacher_labels: it has these tokens alone; got None")
    if soft_labels.weight == 0:
        raise ValueError("weight: expected more than 0 beside teacher_labels, got 0")
    if rollouts.on_policy == 1:
        raise ValueError("teacher_labels: expected None with on_policy=1, where no step reads its rows as they are")
    if config.shard:
        raise ValueError("shard: expected False beside teacher_labels: ranks compute those of other texts; got True")
    check_folder(Path(directory), "teacher_labels")
    _check_about(Path(directory), about(soft_labels, config))


def about(soft_labels: SoftLabelSettings, config: TrainConfig) -> dict[str, Any]:
    """What labels depend on besides text and teacher."""
    return {
        "precision": config.precision,
        "temperature": float(soft_labels.temperature),
        "top_k": soft_labels.top_k,
    }


def _check_about(directory: Path, about: dict[str, Any], described: str = "") -> None:
    path = directory / NAME
    if not path.exists():
        return
    saved = read_versioned(path, FORMAT_VERSION, {"described": str, **dict.fromkeys(about, object)})
    for name, value in about.items():
        if saved[name] == value:
            continue
        expected, got = f"{name}={value}", f"{name}={saved[name]}"
        if name == "teacher":
            expected = f"those of {described}"
            got = f"those of {saved['described']} with other weights, another adapter or another context"
        raise ValueError(f"teacher_labels: {path}: expected {expected}, got {got}; name another folder")


def teacher_digest(teacher: Any, context: Sequence[int]) -> str:
    """SHA-256 of what a teacher's distributions depend on besides a text: weights, adapters, configuration, context.

    Raises:
        ValueError: its weights are offloaded.
    """
    digest = hashlib.sha256(repr(list(context)).encode())
    llama = teacher
    if isinstance(teacher, LlamaAdapter):
        for name in teacher.active_adapters():
            fields = teacher.adapter_config(name).to_dict()
            digest.update(f"{adapter_digest(teacher.adapters[name])} {json.dumps(fields, sort_keys=True)}".encode())
        llama = teacher.base
    tensors = llama.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("teacher_labels: expected a teacher whose weights are in memory, got one that is offloaded")
    config = {k: v for k, v in llama.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
    digest.update(f"{type(llama).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    add_tensors(digest, tensors.items())
    return digest.hexdigest()


class StoredLabels:
    """The soft labels in a folder, and those that are added.

    Args:
        directory: need not exist; the first labels that are added make it.
        about: what they depend on besides a text, JSON values by name: ``teacher`` a digest, ``top_k``, ...
        described: the teacher, for a message.
        vocabulary: its number of tokens.

    Raises:
        ValueError: the folder has labels that depend on something else, or a damaged file; the message names it.
    """

    def __init__(self, directory: Any, about: dict[str, Any], described: str, vocabulary: int) -> None:
        self.directory, self.about, self.described = Path(directory), about, described
        self._short = vocabulary <= _SHORT
        self._files: list[Labels] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}  # by text: its file, and where its tokens begin and end
        self._new: list[tuple[bytes, Labels]] = []  # in no file yet
        self._waiting = 0  # their bytes
        _check_about(self.directory, about, described)
        for path in sorted(self.directory.glob("labels-*.safetensors")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def token_bytes(self) -> int:
        """The bytes of a target token."""
        return self.about["top_k"] * (6 if self._short else 8) + 8

    def _read(self, path: Path) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.stem != f"labels-{digest[:16]}":
            raise ValueError(f"teacher_labels: {path}: SHA-256 differs from the one in its name: damaged; remove it")
        tensors = read_tensors(path, weights=False)
        keys = [bytes(key) for key in tensors["keys"].numpy()]
        self._put(keys, tensors["counts"].tolist(), Labels(tensors["tokens"], tensors["log_p"], tensors["target"]))

    def _put(self, keys: Sequence[bytes], counts: Sequence[int], labels: Labels) -> None:
        ends = np.cumsum(counts).tolist()
        places = ((len(self._files), end - count, end) for count, end in zip(counts, ends, strict=True))
        self._places |= dict(zip(keys, places, strict=True))
        self._files.append(labels)

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Those of the examples, each once, that have no labels yet."""
        keyed = {key(example): example for example in examples}
        return [example for name, example in keyed.items() if name not in self._places]

    def of(self, examples: Sequence[Example]) -> Labels | None:
        """The labels of all examples' targets, in their order, on the CPU; None if they are not all known."""
        places = [self._places.get(key(example)) for example in examples]
        parts = [
            Labels(*(tensor[start:end] for tensor in self._files[number]))
            for number, start, end in (place for place in places if place is not None)
        ]
        if len(parts) < len(places):
            return None
        tokens, log_p, target = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Labels(tokens.long() & (_SHORT - 1) if self._short else tokens.long(), log_p, target)

    def add(self, examples: Sequence[Example], labels: Labels) -> None:
        """Keep the labels of the examples' targets, in their order; ``flush`` writes those that no file has yet."""
        tokens = labels.tokens.to(torch.int16 if self._short else torch.int32)  # modulo 65,536
        kept = [tensor.cpu() for tensor in (tokens, labels.log_p.float(), labels.target.float())]
        counts = [len(example.targets) for example in examples]
        parts: Iterator[Any] = zip(*(tensor.split(counts) for tensor in kept), strict=True)
        self._new += [(key(example), Labels(*part)) for example, part in zip(examples, parts, strict=True)]
        self._waiting += sum(counts) * self.token_bytes
        if self._waiting >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has been added. Raises ``OSError`` if it cannot be written."""
        if not self._new:
            return
        keys, parts = zip(*self._new, strict=True)
        counts = [len(part.target) for part in parts]
        labels = Labels(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        found: dict[str, Tensor] = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES).copy()),
            "counts": torch.tensor(counts, dtype=torch.int32),
            **{name: tensor.contiguous() for name, tensor in labels._asdict().items()},
        }
        content = save(found)
        if not (self.directory / NAME).exists():
            described = {"described": self.described, **self.about}
            write_json(self.directory / NAME, {"format_version": FORMAT_VERSION, **described})
        with replacing(self.directory / f"labels-{hashlib.sha256(content).hexdigest()[:16]}.safetensors") as temporary:
            temporary.write_bytes(content)
        self._put(keys, counts, labels)
        self._new, self._waiting = [], 0


def key(example: Example) -> bytes:
    """A digest of a text's tokens and targets."""
    return bytes.fromhex(fingerprint([example]))[:_KEY_BYTES]
