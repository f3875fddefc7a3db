"""The examples of a run."""

import dataclasses
import math
from typing import Generic

from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import E
from adapterkern.training.data.summary import Summary


@dataclasses.dataclass(frozen=True)
class Data(Generic[E]):
    """Training and evaluation examples, with the names that the model card gives them."""

    train: list[E]
    eval: list[E]
    train_name: str
    eval_name: str | None
    summaries: dict[str, Summary]

    def steps_per_epoch(self, config: TrainConfig) -> int:
        return math.ceil(len(self.train) / config.rows_per_step)

    def total_steps(self, config: TrainConfig) -> int:
        return config.max_steps or config.epochs * self.steps_per_epoch(config)
