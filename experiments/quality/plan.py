"""Which runs there are, and which follow from those that are done.

A group is a method in one place with one budget. First its learning rates are tried with seed 0 and judged by accuracy
on the validation texts; while the best is the first or the last, one more is tried beyond it. A few texts of a few
hundred are chance. So of a group that begins in the middle of the ladder all rates within one standard error of the
best are tried with two more seeds, and the best mean of three is taken; one that begins at the rate of another group
stays there unless a neighbor is better by more than a standard error. Then the seeds from 1 on run at that rate, and
only they see the test set. A choice is a function of the rows of the search, and an interrupted study goes on where it
was.

The head's rate is in all groups of a set and a backbone the one that the search of the head alone has found there; on
R8 with eight layers by seed 0, before there were others.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.quality.methods import INITS, METHODS
from experiments.quality.rows import Rows
from experiments.quality.sets import SETS, VALIDATION, VALIDATION_QUESTIONS
from experiments.quality.training import LAYERS, Spec

LADDER = tuple(float(f"{digit}e-{power}") for power in range(6, 0, -1) for digit in (2, 6))  # 2e-6, 6e-6, …, 0.6
# Where a search begins
MIDDLE = dict.fromkeys(METHODS, 6e-3) | {"head": 2e-2, "ia3": 2e-2, "prompts": 2e-2, "last-layer": 6e-4, "full": 2e-4}
MOST_RATES = 9
HEAD_LR = 6e-3  # the best of the head alone on R8 with seed 0
AGAIN = (10, 11)  # more seeds of a search; the finals are 1, 2, …
VALIDATED = dict.fromkeys(SETS, VALIDATION) | {"questions": VALIDATION_QUESTIONS}  # texts
LOW, HIGH = 0.003, 0.03  # budgets, as shares of the backbone's parameters
HALF, ALL_LAYERS, WHOLE = (LAYERS, LAYERS // 2), (LAYERS, 0), (30, 22)  # layers of the backbone, the first changed
EPOCHS = {100: 16, 400: 4, 800: 4, 1600: 2, 0: 1}  # by texts; 0 is all
MAIN = ("head", "lora", "adapter")
WIDE = (*MAIN, "last-layer")
# Those that earlier versions of the search have chosen
OTHER_RATES = dict.fromkeys(("adapter", "adapter-parallel"), 6e-3) | dict.fromkeys(("last-layer", "prompts"), 2e-3)
OTHER_RATES |= {"ia3": 0.2, "full": 6e-4}
SIZED = ("lora", "adapter", "adapter-parallel", "lora-attention")


@dataclasses.dataclass(frozen=True)
class Group:
    """A method in one place with one budget.

    ``width`` 0 takes the best rate of ``like`` without a search; rates in ``at`` are taken as they are.
    """

    at: Spec  # rates, if there are none, seed and final are those of each run
    seeds: int  # that see the test set
    width: int = 2  # rates on each side of the middle, at first
    like: "Group | None" = None  # whose best rate is the middle
    head: "Group | None" = None  # whose best rate is the head's; None: ``HEAD_LR``

    def tried(self, rate: float, head_lr: float = HEAD_LR) -> Spec:
        """The first run of the search at a rate."""
        head_lr = rate if self.at.method == "head" else head_lr
        return dataclasses.replace(self.at, lr=rate, head_lr=head_lr, seed=0, final=False)

    def searched(self, done: Rows) -> tuple[list[Spec], Spec | None]:
        """The runs that the search still needs, and if it needs none the first one at the best rate."""
        if self.at.lr:
            return [], self.tried(self.at.lr, self.at.head_lr)
        if self.like is None:
            middle = MIDDLE[self.at.method]
        else:
            missing, found = self.like.searched(done)
            if found is None or not self.width:
                return missing, found
            middle = found.lr
        head_lr = HEAD_LR
        if self.head is not None:
            missing, found = self.head.searched(done)
            if found is None:
                return missing, None
            head_lr = found.lr
        at = LADDER.index(middle)
        low, high = max(at - self.width, 0), min(at + self.width, len(LADDER) - 1)
        while True:
            tried = [self.tried(rate, head_lr) for rate in LADDER[low : high + 1]]
            if missing := [spec for spec in tried if spec not in done]:
                return missing, None
            best = max(tried, key=lambda spec: _score(done, [spec]))
            if len(tried) >= MOST_RATES or best not in (tried[0], tried[-1]):
                break
            low, high = max(low - (best == tried[0]), 0), min(high + (best == tried[-1]), len(LADDER) - 1)
            if high - low + 1 == len(tried):  # the ladder's end
                break
        near = [spec for spec in tried if _score(done, [spec])[0] >= _score(done, [best])[0] - _error(done, best)]
        if self.like is not None:
            return [], next((spec for spec in near if spec.lr == middle), best)
        seeds = (0, *AGAIN) if len(near) > 1 else (0,)
        runs = {spec: [dataclasses.replace(spec, seed=seed) for seed in seeds] for spec in near}
        if missing := [run for of_rate in runs.values() for run in of_rate if run not in done]:
            return missing, None
        return [], max(near, key=lambda spec: _score(done, runs[spec]))

    def final(self, done: Rows) -> list[Spec]:
        """The runs that see the test set, once the search is done."""
        _, found = self.searched(done)
        if found is None:
            return []
        at = dataclasses.replace(self.at, lr=found.lr, head_lr=found.head_lr, final=True)
        return [dataclasses.replace(at, seed=seed) for seed in range(1, self.seeds + 1)]

    def missing(self, done: Rows) -> list[Spec]:
        """The runs that can be done now."""
        searching, _ = self.searched(done)
        return searching or [spec for spec in self.final(done) if spec not in done]


def _score(done: Rows, runs: Sequence[Spec]) -> tuple[float, float]:
    """The mean accuracy of runs, and to decide between equal ones their loss; below all others if one diverged."""
    rows = [done[run] for run in runs]
    if any(row["status"] != "finished" for row in rows):
        return -1.0, 0.0
    return fmean(float(row["validation"]) for row in rows), -fmean(float(row["validation_loss"]) for row in rows)


def _error(done: Rows, run: Spec) -> float:
    """The standard error of a run's accuracy."""
    accuracy = max(_score(done, [run])[0], 0.0)
    return math.sqrt(accuracy * (1 - accuracy) / VALIDATED[run.data])


def _at(data: str, place: tuple[int, int], method: str, budget: float, texts: int = 400, **more: Any) -> Spec:
    place = (LAYERS, 0) if method == "full" else place
    return Spec(
        data, *place, method, budget, texts, **{"epochs": EPOCHS[texts], "lr": 0.0, "head_lr": 0.0, "seed": 0} | more
    )


def parts() -> dict[str, list[Group]]:
    """The groups of each part of the study, in the order in which they run."""
    main = {method: Group(_at("r8", HALF, method, LOW), 3 if method == "full" else 5) for method in METHODS}
    adapter = main["adapter"]
    whole = _with_head(main, WIDE, lambda method: _at("r8", WHOLE, method, LOW))

    def kept(weight: float) -> list[Group]:
        return [
            Group(_at("r8", WHOLE, method, LOW, keep=weight), 3, 0, whole[method]) for method in ("lora", "adapter")
        ]

    return {
        "r8": [main[method] for method in dict.fromkeys((*MAIN, *SIZED, *(m for m in METHODS if m != "full"), "full"))],
        "other-rates": [
            Group(_at("r8", HALF, method, LOW, lr=lr, head_lr=HEAD_LR), main[method].seeds)
            for method, lr in OTHER_RATES.items()
        ],
        "whole": list(whole.values()),
        "keep": kept(0.3),
        "20news": [
            *_with_head(main, WIDE, lambda method: _at("20news", HALF, method, LOW)).values(),
            Group(_at("20news", HALF, "adapter", LOW, lr=6e-3, head_lr=2e-2), 3),
        ],
        "high": [Group(_at("r8", HALF, method, HIGH), 3, 1, main[method]) for method in SIZED],
        "epochs": [Group(_at("r8", HALF, method, LOW, epochs=8), 3, 0, main[method]) for method in MAIN],
        "steps": [
            Group(_at("r8", HALF, "adapter", LOW, epochs=epochs, lr=2e-3, head_lr=head_lr), 3)
            for epochs, head_lr in ((1, HEAD_LR), (1, 2e-3), (2, HEAD_LR), (2, 2e-3), (4, 2e-3))
        ],
        "defaults": [
            Group(_at("r8", HALF, "adapter", LOW, epochs=epochs, lr=lr, head_lr=1e-2), 3)
            for lr in (3e-3, 6e-3)
            for epochs in (1, 2, 4)
        ],
        "texts": [
            Group(_at("r8", HALF, method, LOW, texts), 3, 0, main[method])
            for texts in (100, 1600, 0)
            for method in MAIN
        ],
        "questions": list(_with_head(main, MAIN, lambda method: _at("questions", HALF, method, LOW, 800)).values()),
        "r52": [
            *_with_head(main, MAIN, lambda method: _at("r52", HALF, method, LOW)).values(),
            Group(_at("r52", HALF, "adapter", LOW, lr=6e-3, head_lr=2e-2), 3),
        ],
        "instructions": [
            Group(_at("instructions", WHOLE, "head", LOW, epochs=0, lr=1.0), 3),  # the model as it is
            *(Group(_at("instructions", WHOLE, method, LOW), 3, 1, whole[method]) for method in WIDE[1:]),
            Group(_at("instructions", WHOLE, "lora", LOW, lr=6e-3), 3),
        ],
        "init": [Group(_at("r8", HALF, method, LOW), 3, 0, adapter) for method in INITS],
        "warmup": [Group(dataclasses.replace(adapter.at, warmup=warmup), 3, 0, adapter) for warmup in (0.0, 0.3)],
        "layers": [
            Group(_at("r8", (LAYERS, first), "adapter", LOW), 3, 0, adapter) for first in (LAYERS - 2, LAYERS - 1)
        ],
        "sizes": [
            Group(_at("r8", HALF, method, budget), 0, 1, main[method])
            for budget in (0.001, 0.01)
            for method in ("adapter", "lora")
        ],
        "all-layers": [Group(_at("r8", ALL_LAYERS, method, LOW), 3, 0, main[method]) for method in ("lora", "adapter")],
        "keep-more": kept(3.0),
    }


def _with_head(main: Mapping[str, Group], methods: Sequence[str], at: Callable[[str], Spec]) -> dict[str, Group]:
    """Groups at another set, backbone or number of steps, with the head's rate found there."""
    head = Group(at("head"), 3, 1, main["head"])
    return {m: head if m == "head" else Group(at(m), 3, 1, main[m], head) for m in methods}


def pending(done: Rows, chosen: list[str]) -> Iterator[Spec]:
    """The runs that can be done now, the first first; none twice."""
    seen: set[Spec] = set()
    for name in chosen:
        for group in parts()[name]:
            for spec in group.missing(done):
                if spec not in seen:
                    seen.add(spec)
                    yield spec
