"""Which runs there are, and which follow from those that are done.

A group is a method in one place with one budget. First its learning rates are tried with seed 0 and judged on the
validation texts; while the best is the first or the last, one more is tried beyond it. Then the seeds from 1 on run at
the best rate, and only they see the test set. So a choice is a function of the rows of the search, and an interrupted
study goes on where it was. The head's rate is in all groups the one that the search of the head alone has found on R8.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from experiments.quality.methods import INITS, METHODS
from experiments.quality.rows import Rows
from experiments.quality.training import LAYERS, Spec

LADDER = tuple(float(f"{digit}e-{power}") for power in range(6, 0, -1) for digit in (2, 6))  # 2e-6, 6e-6, …, 0.6
# Where a search begins
MIDDLE = dict.fromkeys(METHODS, 6e-3) | {"head": 2e-2, "ia3": 2e-2, "prompts": 2e-2, "last-layer": 6e-4, "full": 2e-4}
MOST_RATES = 9
HEAD_LR = 6e-3  # the best of the head alone on R8
LOW, HIGH = 0.003, 0.03  # budgets, as shares of the backbone's parameters
HALF, ALL_LAYERS, WHOLE = (LAYERS, LAYERS // 2), (LAYERS, 0), (30, 22)  # layers of the backbone, the first changed
EPOCHS = {100: 16, 400: 4, 800: 4, 1600: 2, 0: 1}  # by texts; 0 is all
MAIN = ("head", "lora", "adapter", "adapter-parallel")
WIDE = (*MAIN, "last-layer", "prompts")
SIZED = ("lora", "lora-attention", "adapter", "adapter-attention", "adapter-parallel", "adapter-low-rank")


@dataclasses.dataclass(frozen=True)
class Group:
    """A method in one place with one budget.

    ``width`` 0 takes the best rate of ``like`` without a search.
    """

    at: Spec  # rate, seed and final are those of each run
    seeds: int  # that see the test set
    width: int = 2  # rates on each side of the middle, at first
    like: "Group | None" = None  # whose best rate is the middle

    def tried(self, rate: float) -> Spec:
        """The run of the search at a rate."""
        return dataclasses.replace(self._at(rate), seed=0, final=False)

    def _at(self, rate: float) -> Spec:
        head_lr = rate if self.at.method == "head" else HEAD_LR
        return dataclasses.replace(self.at, lr=rate, head_lr=head_lr)

    def searched(self, done: Rows) -> tuple[list[Spec], float | None]:
        """The runs that the search still needs, and if it needs none the best rate."""
        if self.like is None:
            middle = MIDDLE[self.at.method]
        else:
            missing, found = self.like.searched(done)
            if found is None:
                return missing, None
            middle = found
            if not self.width:
                return [], found
        at = LADDER.index(middle)
        low, high = max(at - self.width, 0), min(at + self.width, len(LADDER) - 1)
        while True:
            rates = LADDER[low : high + 1]
            if missing := [spec for spec in map(self.tried, rates) if spec not in done]:
                return missing, None
            best = max(rates, key=lambda rate: _validation(done, self.tried(rate)))
            if high - low + 1 >= MOST_RATES or best not in (rates[0], rates[-1]):
                return [], best
            low, high = max(low - (best == rates[0]), 0), min(high + (best == rates[-1]), len(LADDER) - 1)
            if LADDER[low : high + 1] == rates:  # the ladder's end
                return [], best

    def final(self, done: Rows) -> list[Spec]:
        """The runs that see the test set, once the search is done."""
        _, rate = self.searched(done)
        if rate is None:
            return []
        return [dataclasses.replace(self._at(rate), seed=seed, final=True) for seed in range(1, self.seeds + 1)]

    def missing(self, done: Rows) -> list[Spec]:
        """The runs that can be done now."""
        searching, _ = self.searched(done)
        return searching or [spec for spec in self.final(done) if spec not in done]


def _validation(done: Rows, spec: Spec) -> tuple[float, float]:
    row = done[spec]
    if row["status"] != "finished":
        return -1.0, 0.0
    return float(row["validation"]), -float(row["validation_loss"])


def _at(data: str, place: tuple[int, int], method: str, budget: float, texts: int = 400, **more: Any) -> Spec:
    place = (LAYERS, 0) if method == "full" else place
    return Spec(
        data, *place, method, budget, texts, **{"epochs": EPOCHS[texts], "lr": 0.0, "head_lr": 0.0, "seed": 0} | more
    )


def parts() -> dict[str, list[Group]]:
    """The groups of each part of the study, in the order in which they run."""
    main = {method: Group(_at("r8", HALF, method, LOW), 5) for method in METHODS}
    whole = {method: Group(_at("r8", WHOLE, method, LOW), 3, 1, main[method]) for method in (*MAIN, "last-layer")}
    adapter = main["adapter"]
    many = {method: Group(_at("r8", HALF, method, LOW, 1600), 3, 1, main[method]) for method in MAIN[:3]}
    return {
        "r8": [main[method] for method in (*MAIN, *(m for m in METHODS if m not in MAIN and m != "full"), "full")],
        "epochs": [Group(_at("r8", HALF, method, LOW, epochs=8), 3, 1, main[method]) for method in (*MAIN, "full")],
        "high": [Group(_at("r8", HALF, method, HIGH), 3, 1, main[method]) for method in SIZED],
        "whole": list(whole.values()),
        "sizes": [
            Group(_at("r8", HALF, method, budget), 0, 2, main[method])
            for budget in (0.001, 0.01)
            for method in ("adapter", "lora")
        ],
        "init": [Group(_at("r8", HALF, method, LOW), 3, 1, adapter) for method in INITS],
        "warmup": [Group(dataclasses.replace(adapter.at, warmup=warmup), 3, 1, adapter) for warmup in (0.0, 0.3)],
        "layers": [
            Group(_at("r8", (LAYERS, first), method, LOW), 3, 1, main[method])
            for first in (LAYERS - 2, LAYERS - 1)
            for method in ("adapter", "lora")
        ],
        "keep": [
            Group(_at("r8", WHOLE, method, LOW, keep=keep), 3, 0, whole[method])
            for method in ("lora", "adapter")
            for keep in (0.3, 3.0)
        ],
        "questions": [Group(_at("questions", HALF, method, LOW, 800), 3, 1, main[method]) for method in WIDE],
        "20news": [Group(_at("20news", HALF, method, LOW), 3, 1, main[method]) for method in WIDE],
        "texts": [
            *(Group(_at("r8", HALF, method, LOW, 100), 3, 1, main[method]) for method in many),
            *many.values(),
            *(Group(_at("r8", HALF, method, LOW, 0), 3, 0, group) for method, group in many.items()),
        ],
        "all-layers": [Group(_at("r8", ALL_LAYERS, method, LOW), 3, 1, main[method]) for method in MAIN[1:]],
    }


def pending(done: Rows, chosen: list[str]) -> Iterator[Spec]:
    """The runs that can be done now, the first first; none twice."""
    seen: set[Spec] = set()
    for name in chosen:
        for group in parts()[name]:
            for spec in group.missing(done):
                if spec not in seen:
                    seen.add(spec)
                    yield spec
