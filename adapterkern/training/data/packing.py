"""Several texts in one row: where each goes, the batch that they make, and whether a backbone keeps them apart.

A packed batch has the examples of an unpacked one in fewer rows of the same length, so that attention, which costs
rows × length², costs less too. In place of ``attention_mask`` it has ``position_ids`` (B, L) int64, which count up from
0 in each text and in each stretch of padding. transformers takes them, where there is no mask, for texts that attend to
themselves alone. ``starts`` (N,) int64 are the flat indices into (B·L) at which the N examples begin.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapterkern.model.asking import decoder_of, described, same_numbers
from adapterkern.model.decoder import eval_mode
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, collate, inputs, padded_length, to_device
from adapterkern.training.data.examples import Example

_LEAK = {False: 1e-5, True: 1e-3}  # how far rounding alone may move a state, by whether it is of 16 bits


def best_fit(lengths: Sequence[int], room: int, kinds: Sequence[int] | None = None) -> list[list[int]]:
    """The items of each row: longest first, each into the fullest row of its kind that has room for it.

    Args:
        lengths: of the items, none longer than ``room``.
        kinds: items of different kinds share no row; by default all are of one.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [
            row
            for row, free in enumerate(left)
            if free >= lengths[item] and (kinds is None or kinds[rows[row][0]] == kinds[item])
        ]
        if not fits:
            fits = [len(rows)]
            rows.append([])
            left.append(room)
        row = min(fits, key=lambda r: left[r])
        rows[row].append(item)
        left[row] -= lengths[item]
    return rows


def pack(
    examples: Sequence[Example], config: TrainConfig, kinds: Sequence[int] | None = None, length: int | None = None
) -> Batch:
    """The packed causal-lm batch of ``examples``, each of one text. Targets are in the examples' order.

    Args:
        kinds: examples of different kinds share no row.
        length: of a row; by default as ``collate`` pads.
    """
    length = padded_length(examples, config) if length is None else length
    rows = best_fit([len(example.input_ids) for example in examples], length, kinds)
    ids = np.zeros((len(rows), length), dtype=np.int64)
    places = np.zeros_like(ids)
    starts = np.zeros(len(examples), dtype=np.int64)
    for row, items in enumerate(rows):
        gap = length - sum(len(examples[item].input_ids) for item in items)
        at = 0 if config.padding_side == "right" else gap
        places[row, slice(length - gap, length) if at == 0 else slice(gap)] = np.arange(gap)
        for item in items:
            n = len(examples[item].input_ids)
            ids[row, at : at + n] = examples[item].input_ids
            places[row, at : at + n] = np.arange(n)
            starts[item] = row * length + at
            at += n
    positions = [example.positions + start for example, start in zip(examples, starts, strict=True)]
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(places),
        "targets": torch.from_numpy(np.concatenate([example.targets for example in examples])),
        "positions": torch.from_numpy(np.concatenate(positions)),
        "starts": torch.from_numpy(starts),
    }


def packing_obstacle(llama: Any, config: TrainConfig, examples: Sequence[Example]) -> str:
    """Why texts cannot share a row; "" if they can.

    Found by running the longest example and its halves, in two packed rows and in three padded ones: a text has other
    states in a packed row, or they depend on the text before it.
    """
    longest = max((example.input_ids for example in examples), key=len)
    half = len(longest) // 2
    if not half:
        return ""
    whole, first, second = (_example(ids) for ids in (longest, longest[: len(longest) - half], longest[-half:]))
    # Other tokens in the place of the first half, of which the second's states must not know
    other = _example(np.roll(longest, half)[: len(longest) - half])
    length = padded_length([whole], config)
    with torch.no_grad(), eval_mode(llama):
        padded = _states(llama, collate([whole, first, second], config, length))
        apart = [
            state[:n] if config.padding_side == "right" else state[length - n :]
            for state, n in zip(padded, (len(longest), len(longest) - half, half), strict=True)
        ]
        try:
            packed = _texts(llama, [whole, first, second], config, length)
            beside = _texts(llama, [whole, other, second], config, length)
        except Exception as error:  # of any kind: a decoder may take no positions, or need a mask
            return f"cannot run packed rows ({described(error)})"
    if not same_numbers(llama, torch.cat(packed), torch.cat(apart)):
        return "gives a text other states in a row with others"
    if _moved(packed[2], beside[2]):
        return "lets a text see those before it in its row"
    return ""


def _example(ids: np.ndarray) -> Example:
    none = np.empty(0, dtype=np.int64)
    return Example(ids, none, none)


def _texts(llama: Any, examples: Sequence[Example], config: TrainConfig, length: int) -> list[Tensor]:
    """The states (n, d) of each example in packed rows."""
    batch = pack(examples, config, length=length)
    states = _states(llama, batch).flatten(0, 1)
    starts = batch["starts"].tolist()
    return [states[at : at + len(example.input_ids)] for at, example in zip(starts, examples, strict=True)]


def _states(llama: Any, batch: Batch) -> Tensor:
    return decoder_of(llama)(**to_device(inputs(batch), llama.device), use_cache=False).last_hidden_state


def _moved(states: Tensor, others: Tensor) -> bool:
    """Whether at least half of the states (n, d) differ by more than the rounding of experts' groups."""
    low = states.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(states.device.type)
    change = (states - others).float().norm(dim=-1) > _LEAK[low] * states.float().norm(dim=-1)
    return bool(change.float().mean() >= 0.5)
