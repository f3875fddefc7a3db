"""The examples of a run."""

import dataclasses
import math
from typing import Any, Generic

from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import by_length
from adapterkern.training.data.examples import E, Example
from adapterkern.training.data.summary import Summary


@dataclasses.dataclass(frozen=True)
class Data(Generic[E]):
    """Training and evaluation examples, with the names that the model card gives them."""

    train: list[E]
    eval: list[E]
    train_name: str
    eval_name: str | None
    summaries: dict[str, Summary]
    padding: str = ""  # what is to be said of it
    texts: list[Example] = dataclasses.field(default_factory=list)  # to measure drift on
    texts_name: str | None = None

    def steps_per_epoch(self, config: TrainConfig) -> int:
        return math.ceil(len(self.train) / config.rows_per_step)

    def total_steps(self, config: TrainConfig) -> int:
        return config.max_steps or config.epochs * self.steps_per_epoch(config)

    def order(self, task: Any, config: TrainConfig, epoch: int) -> list[int]:
        """The task's order of an epoch's rows, rearranged if ``config.group_by_length``."""
        order: list[int] = task.order(self.train, config, epoch)
        if not config.group_by_length:
            return order
        lengths = [len(example.input_ids) for example in self.train]
        return by_length(order, lengths, config.rows_per_step, config.seed, epoch)
