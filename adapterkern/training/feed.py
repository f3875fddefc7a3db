"""A task's batches on its device, with their prefix; and what is summed over those of an evaluation."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data import batches
from adapterkern.training.data.batches import Batch
from adapterkern.training.data.examples import E, Example
from adapterkern.training.data.prefix import PrefixCache, Slot

if TYPE_CHECKING:
    from adapterkern.training.task import Task

Bar = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], bool]]]


class Feed:
    """Makes a task's batches on its device, with their prefix activations if the cache has them."""

    def __init__(self, task: "Task[Any]", config: TrainConfig, cache: PrefixCache | None) -> None:
        self.task = task
        self.config = config
        self.cache = cache
        self.examples: Sequence[Any] = ()  # of the last batch
        self._slots: dict[int, Slot] = {}  # by the example's row

    def add(self, examples: Sequence[Example], slots: Sequence[Slot]) -> None:
        """Use these slots of the cache for the examples, which must be numbered."""
        self._slots |= {example.row: slot for example, slot in zip(examples, slots, strict=True)}

    def __call__(self, examples: Sequence[Any]) -> Batch:
        self.examples = examples
        return self.fed(examples, self.task.collate(examples, self.config))

    def fed(self, examples: Sequence[Any], batch: Batch) -> Batch:
        """The ``batch`` that was made of the examples, on the device and with their prefix."""
        starts = batch.pop("starts").tolist() if "starts" in batch else None
        if self._slots and self.cache is not None and examples[0].row in self._slots:  # not of a step's own
            slots = [self._slots[example.row] for example in examples]
            batch["prefix"] = self.cache.gather(slots, batch["input_ids"].shape[1], self.config, starts)
        return batches.to_device(batch, self.task.model.device)


def eval_batches(examples: Sequence[E], config: TrainConfig) -> list[list[E]]:
    """``examples`` in evaluation batches, sorted by length to save padding."""
    size = config.eval_batch_size or config.batch_size
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def sums_over(run: nn.Module, examples: Sequence[Example], feed: Feed, config: TrainConfig) -> list[float]:
    """The sums over all batches of what a forward in eval mode returns: its loss, then its other numbers."""

    def of(batch: Sequence[Example]) -> Tensor:
        loss, others = run(feed(batch))
        return torch.cat([loss[None], others])

    return processes.sum_over_batches(eval_batches(examples, config), of, feed.task.model.device).tolist()


def run_evaluation(
    task: "Task[E]", run: nn.Module, examples: Sequence[E], feed: Feed, config: TrainConfig
) -> dict[str, float]:
    """``task.evaluate`` in eval mode and without gradients."""
    with evaluating(run):
        return task.evaluate(run, examples, feed, config)


@contextlib.contextmanager
def evaluating(run: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients, inside the block."""
    was_training = run.training
    run.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        run.train(was_training)
