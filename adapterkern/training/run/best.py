"""The best evaluation of a run: which one it is, what was trained then, and for how long none has been better.

The trained parameters of that step are kept in memory, on the host: adapters are small, and there may be no folder. Its
checkpoint is written at once and is not removed for newer ones, so a run that is resumed, or never ends, has them too.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from adapterkern.model.files.card import NOT_SCORES

_LOWER = ("loss", "perplexity", "cross_entropy", "divergence", "drift", "rmse", "mse", "mae")


@dataclasses.dataclass
class Best:
    """The best of the evaluations so far by ``metric``; see ``TrainConfig.best``.

    Attributes:
        step: of the best evaluation; 0 if there is none yet.
        metrics: its metrics.
        evaluations: how many there have been.
        since: how many of them came after the best one.
        last: the step of the latest one.
        parameters: what was trained, by name, after ``step`` steps.
    """

    metric: str
    step: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluations: int = 0
    since: int = 0
    last: int = 0
    parameters: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def value(self) -> float:
        return self.metrics[self.metric]

    def update(
        self, step: int, metrics: Mapping[str, float], trained: Callable[[], Mapping[str, Tensor]] = dict
    ) -> bool:
        """Count an evaluation; whether it is the best so far, of which what is ``trained`` is kept.

        One that was counted before a resume is not counted again.
        """
        check_metric(self.metric, metrics)
        if step <= self.last:
            return False
        self.last, self.evaluations, self.since = step, self.evaluations + 1, self.since + 1
        value = metrics[self.metric]
        lower = self.metric.endswith(_LOWER)
        if math.isnan(value) or (self.step and (value >= self.value if lower else value <= self.value)):
            return False
        self.step, self.metrics, self.since = step, dict(metrics), 0
        self.parameters = {name: p.detach().to("cpu", copy=True) for name, p in trained().items()}
        return True

    def __str__(self) -> str:
        return f"step {self.step}, the best of {self.evaluations} evaluations by {self.metric} ({self.value:.4g})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values: everything but the parameters."""
        return {name: value for name, value in vars(self).items() if name != "parameters"}

    @classmethod
    def from_dict(cls, saved: Any) -> "Best":
        """The inverse of ``to_dict``. Raises ``ValueError`` for values of another kind."""
        counts = ("step", "evaluations", "since", "last")
        if (
            not isinstance(saved, dict)
            or saved.keys() != {"metric", "metrics", *counts}
            or not all(type(saved[name]) is int and saved[name] >= 0 for name in counts)
            or not (isinstance(saved["metric"], str) and isinstance(saved["metrics"], dict))
            or not all(isinstance(value, int | float) for value in saved["metrics"].values())
            or (saved["step"] and saved["metric"] not in saved["metrics"])
        ):
            raise ValueError(f"expected what is known of a run's best evaluation, got {saved!r:.80}")
        return cls(**saved)


def check_metric(metric: str, found: Iterable[str]) -> None:
    """Raise ``ValueError`` if an evaluation with the metrics ``found`` has none of this name."""
    scores = [name for name in found if name.rpartition("/")[2] not in NOT_SCORES]
    if metric not in scores:
        raise ValueError(f"best: expected a metric of the evaluations: {' or '.join(scores)}; got {metric!r:.80}")
