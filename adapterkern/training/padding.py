"""Whether a run's batches can be packed; how much of them is padding, and what would be left of it otherwise."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import by_length, padded_length
from adapterkern.training.data.examples import Example
from adapterkern.training.data.packing import best_fit, packing_obstacle
from adapterkern.training.data.sets import Data
from adapterkern.training.task import Task

_MUCH = 0.3  # of the tokens: the share from which a run names what would save it,
_WORTH = 0.1  # if it saves so much
_SHORT = 100  # steps, in which there is little to save
_COUNTED = 10_000  # rows of the first epoch, at most


def check_packing(task: Task[Any], config: TrainConfig, examples: Sequence[Any]) -> None:
    """Raise ``ValueError`` if ``config.packing`` and the task makes no packed batches, or a backbone mixes texts.

    Adapters must be off.
    """
    if not config.packing:
        return
    if not _is_packed(task, config, examples):
        raise ValueError(f"packing: expected False for {task.kind}, which makes batches in its own way, got True")
    for llama in task.backbones:
        if obstacle := packing_obstacle(llama, config, examples):
            raise ValueError(f"packing: expected False, because {type(llama).__name__} {obstacle}; got True")


def _is_packed(task: Task[Any], config: TrainConfig, examples: Sequence[Any]) -> bool:
    return "position_ids" in task.collate(examples[:1], config)


def padding_line(task: Task[Any], data: Data[Any], config: TrainConfig) -> str:
    """The share of padding in the first epoch's batches, with and without ``packing`` and ``group_by_length``.

    "" where neither is set and they would save little, or could not be set.
    """
    examples, saves = data.train, config.packing or config.group_by_length
    if data.total_steps(config) < _SHORT and not saves:
        return ""
    plain = dataclasses.replace(config, packing=False, group_by_length=False)
    order = task.order(examples, config, 0)
    before = padding_share(examples, order, plain)
    if saves:
        set_ = " and ".join(name for name in ("packing", "group_by_length") if getattr(config, name))
        return f"{_line(padding_share(examples, order, config))}; without {set_} {100 * before:.0f} %"
    if before < _MUCH:
        return ""
    others: dict[str, float] = {}
    if config.task == "causal-lm" and task.packs:
        packed = dataclasses.replace(plain, packing=True)
        if _is_packed(task, packed, examples) and _keeps_apart(task, config, examples):
            others["packing"] = padding_share(examples, order, packed)
    if config.padding == "longest":
        grouped = dataclasses.replace(plain, group_by_length=True)
        others["group_by_length"] = padding_share(examples, order, grouped)
    told = ", ".join(f"with {name} {100 * share:.0f} %" for name, share in others.items() if before - share >= _WORTH)
    return f"{_line(before)}; {told}" if told else ""


def _line(share: float) -> str:
    return f"padding: {100 * share:.0f} % of the tokens in a batch"


def _keeps_apart(task: Task[Any], config: TrainConfig, examples: Sequence[Example]) -> bool:
    with task.model.disable_adapter():
        return not any(packing_obstacle(llama, config, examples) for llama in task.backbones)


def padding_share(examples: Sequence[Example], order: Sequence[int], config: TrainConfig) -> float:
    """The share of padding, 0 to 1, in an epoch's batches. Several adapters per batch, which share no row, have more.

    Args:
        order: of the examples, without ``group_by_length``.
    """
    if config.group_by_length:
        lengths = [len(example.input_ids) for example in examples]
        order = by_length(order, lengths, config.rows_per_step, config.seed, 0)
    tokens = room = 0
    for at in range(0, min(len(order), _COUNTED), config.batch_size):
        batch = [examples[row] for row in order[at : at + config.batch_size]]
        of_texts, length = [len(example.input_ids) for example in batch], padded_length(batch, config)
        tokens += sum(of_texts)
        room += length * (len(best_fit(of_texts, length)) if config.packing else len(batch))
    return 1 - tokens / room
