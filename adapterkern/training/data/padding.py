"""Whether padding changes what a backbone computes for a row, found by asking it once before a run; or its length."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapterkern.model.asking import decoder_of, same_numbers
from adapterkern.model.decoder import eval_mode
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import collate, to_device
from adapterkern.training.data.examples import Example
from adapterkern.training.data.rows import warn_once

logger = logging.getLogger(__name__)


def check_padding(llama: Any, config: TrainConfig, examples: Sequence[Example]) -> None:
    """Run half of the longest example, by itself and padded as in the longest batch, through the decoder of ``llama``.

    Positions count from the first token of a row only if the backbone does not mind how many precede it. Most do not:
    RoPE and attention masks know differences alone. Warns if the states of a row depend on the length of its batch.

    Raises:
        ValueError: padding on the left gives other states than padding on the right.
    """
    if not _pads(config, examples):
        return
    longest = max(examples, key=lambda example: len(example.input_ids)).input_ids
    length = config.max_length if config.padding == "max_length" else len(longest)
    row, name = longest[: max(1, len(longest) // 2)], type(llama).__name__
    # First and last a short one: RoPE that was scaled for a long batch may stay so until a short one comes.
    lengths = ((row[:1], "right", 1), (row, "right", len(row)), (row, "right", length), (row, "left", length))
    _, alone, right, left = (_states(llama, config, *one) for one in lengths)
    _states(llama, config, *lengths[0])
    if config.padding_side == "left" and not same_numbers(llama, left, right):
        raise ValueError(
            f"padding_side: expected 'right' for {name}, in which a row has other states if it is padded on the left; "
            "got 'left'"
        )
    if config.padding == "longest" and not same_numbers(llama, right, alone):
        logger.warning(
            "padding: in %s the states of a row depend on how far it is padded, so on the other rows of its batch; "
            "padding='max_length' makes them the same in every batch",
            name,
        )


def check_positions(llama: Any, examples: Sequence[Example]) -> None:
    """Warn of texts that are longer than what ``llama`` was made for."""
    most = context_length(llama.config)
    if longer := [n for n in (len(example.input_ids) for example in examples) if n > most]:
        warn_once(
            f"max_length: {len(longer):,} texts, the longest of {max(longer):,} tokens, are longer than what "
            f"{type(llama).__name__} was made for (max_position_embeddings={most:g}); a smaller max_length cuts them"
        )


def context_length(config: Any) -> float:
    """The number of positions that a model was made for; infinity where its configuration has no bound.

    RoPE may be scaled, ``factor`` times, by what the configuration says of all layers, or of each kind.
    """
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = math.inf
    if isinstance(most, int):
        found = most
        for one in (rope, *rope.values()):
            if isinstance(one, dict) and "dynamic" in (one.get("rope_type"), one.get("type")):  # grows with the text
                return math.inf
            if isinstance(one, dict) and isinstance(factor := one.get("factor"), int | float):
                found = max(found, factor * (one.get("original_max_position_embeddings") or most))
    return found


def _pads(config: TrainConfig, examples: Sequence[Example]) -> bool:
    """Whether there is anything to ask: padding that varies from batch to batch, or is on the left."""
    if config.padding == "max_length":
        return config.padding_side == "left"
    several = max(config.batch_size, config.eval_batch_size or 1) > 1
    return several and len({len(example.input_ids) for example in examples}) > 1


def _states(llama: Any, config: TrainConfig, row: np.ndarray, side: str, length: int) -> Tensor:
    """The decoder's last hidden states (n, d) of a row's n tokens, padded to ``length``."""
    none = np.empty(0, dtype=np.int64)
    config = dataclasses.replace(config, padding_side=side, output_dir=None, overwrite=False, resume=False)
    batch = to_device(collate([Example(row, none, none)], config, length), llama.device)
    with torch.no_grad(), eval_mode(llama):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states = decoder_of(llama)(**inputs, use_cache=False).last_hidden_state[0]
    return states[: len(row)] if side == "right" else states[length - len(row) :]
