"""Padding examples to batches; counting, ordering and fingerprinting them.

A batch is a dict of tensors: ``input_ids`` (B, L) int64, ``attention_mask`` (B, L) int64 with 1 on real tokens,
``targets`` (K,), those of all rows in a row, and for causal-lm ``positions`` (K,) int64, flat indices into (B·L). These
are computed on the host, so that no step waits for the device to learn which states it needs. For classification and
regression K = B, for multi-label K = B · labels. A task may add entries of its own. packing.py makes batches whose rows
hold several texts.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Example

Batch = dict[str, Tensor]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of ``count`` rows in an epoch, a function of (seed, epoch) alone, so that resuming needs no state."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count).tolist()


def by_length(order: Sequence[int], lengths: Sequence[int], step: int, seed: int, epoch: int) -> list[int]:
    """An epoch's ``order`` of rows, rearranged so that the ``step`` rows of a step are of alike length.

    Each run of ``_MEGABATCH`` steps is sorted by length and cut into steps, and then all steps are shuffled. With few
    steps the runs are shorter, so that an epoch has several, and its steps are not those of every other epoch. Rows
    left over for a last, smaller step keep their place. A function of the arguments alone.

    Args:
        lengths: of all rows, by their numbers in ``order``.
    """
    whole = len(order) // step
    together = max(min(_MEGABATCH, whole // _MEGABATCHES), 2) * step
    full = order[: whole * step]
    runs = (sorted(full[at : at + together], key=lambda row: lengths[row]) for at in range(0, len(full), together))
    steps = np.array([row for run in runs for row in run], dtype=np.int64).reshape(whole, step)
    draw = np.random.Generator(np.random.PCG64([seed, epoch, _STEPS]))
    return [*draw.permutation(steps).flatten().tolist(), *order[whole * step :]]


_MEGABATCH = 50  # steps that are sorted together
_MEGABATCHES = 4  # at least, if there are steps enough
_STEPS = 1  # separates the order of steps from that of rows, of the same seed


def collate(examples: Sequence[Example], config: TrainConfig, length: int | None = None) -> Batch:
    """Pad to ``length``, by default by ``config.padding``. Padding has token id 0, mask 0 and no target.

    Raises:
        ValueError: an example has several packed texts, which would attend to each other.
    """
    if packed := [example for example in examples if len(example.starts) > 1]:
        got = f"{len(packed[0].starts)} that are packed ({packed[0].place})"
        raise ValueError(f"examples: expected one text in each, see unpacked, got {got}")
    length = padded_length(examples, config) if length is None else length
    ids = np.zeros((len(examples), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    positions = []
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        start = 0 if config.padding_side == "right" else length - n
        ids[row, start : start + n] = example.input_ids
        mask[row, start : start + n] = 1
        positions.append(example.positions + (row * length + start))
    batch = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "targets": torch.from_numpy(np.concatenate([example.targets for example in examples])),
    }
    return batch | ({"positions": torch.from_numpy(np.concatenate(positions))} if not config.labeled else {})


def padded_length(examples: Sequence[Example], config: TrainConfig) -> int:
    """The length of a batch's rows."""
    longest = max(len(example.input_ids) for example in examples)
    return config.max_length if config.padding == "max_length" else longest


def count_tokens(examples: Iterable[Example]) -> int:
    """The number of real tokens, without padding."""
    return sum(len(example.input_ids) for example in examples)


def count_targets(examples: Iterable[Example]) -> int:
    """The number of terms a mean loss has: target tokens for causal-lm, labels times examples for multi-label, else
    examples.
    """
    return sum(len(example.targets) for example in examples)


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of the tokenized data: token ids, targets, exactly, and the order of the examples."""
    digest = hashlib.sha256()
    for example in examples:
        for array in example.arrays():
            exact = array.astype("<f8" if array.dtype.kind == "f" else "<i8")
            digest.update(len(array).to_bytes(8, "little") + exact.tobytes())
    return digest.hexdigest()


def inputs(batch: Batch) -> Batch:
    """What a decoder takes of a batch, padded or packed."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; does not wait for the copies."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
