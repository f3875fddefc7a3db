"""Tables in Markdown from the rows of the CSV, also in a page; the pictures are in ``pictures``."""

import dataclasses
import itertools
import re
import statistics as stdlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from experiments.quality import plan
from experiments.quality.plan import Group
from experiments.quality.rows import Rows
from experiments.quality.statistics import Interval, over_seeds, over_texts, unpacked

TESTS = {"r8": 2189, "r52": 2568, "20news": 7528}  # texts; of questions as many as there are
NAMES = {
    "head": "head alone",
    "norms-biases": "norms and biases (BitFit)",
    "last-layer": "last layer, whole",
    "full": "all layers, whole",
    "ia3": "IA³ (PEFT)",
    "lora": "LoRA, all matrices (PEFT)",
    "lora-attention": "LoRA, attention (PEFT)",
    "prompts": "gated prompts (PEFT)",
    "adapter": "adapter after the layer",
    "adapter-attention": "adapter after attention",
    "adapter-parallel": "adapter parallel to the MLP",
    "adapter-low-rank": "adapter, no nonlinearity",
    "routed": "4 adapters and a router",
    "adapter-xavier": "adapter, Xavier init",
    "adapter-svd": "adapter, SVD init",
}
AGAINST = "lora"


@dataclasses.dataclass(frozen=True)
class Result:
    """A group whose runs are all done."""

    group: Group
    rows: list[dict[str, str]]  # by seed

    def values(self, column: str) -> list[float]:
        """A column of all seeds."""
        return [float(row[column]) for row in self.rows]

    def right(self) -> np.ndarray:
        """(seeds, N)."""
        packed = [row["right"] for row in self.rows]
        count = TESTS.get(self.group.at.data) or len(packed[0]) * 6
        return np.array([unpacked(right, count) for right in packed])


def results(done: Rows, groups: Iterable[Group]) -> dict[Group, Result]:
    """The groups of which every seed has finished."""
    found = {}
    for group in groups:
        specs = group.final(done)
        if specs and all(spec in done and done[spec]["status"] == "finished" for spec in specs):
            found[group] = Result(group, [done[spec] for spec in specs])
    return found


def table(done: Rows, part: str) -> str:
    """A part's rows: size, rate, accuracy, its difference to LoRA, drift."""
    parts = plan.parts()
    found, all_found = results(done, parts[part]).values(), results(done, itertools.chain(*parts.values())).values()
    lines = [
        "| | parameters | rate | best epoch | test | minus LoRA | over texts | drift |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in found:
        at, rows = result.group.at, result.rows
        other = next((o for o in all_found if _same_but_method(o.group, result.group)), None)
        suffix = f", kept ×{at.keep:g}" if at.keep else ""
        suffix += f", warmup {at.warmup:g}" if part == "warmup" else ""
        suffix += f", layers from {at.first}" if part in ("layers", "all-layers") else ""
        texts = "" if part != "texts" else f"{at.texts or 'all'} texts: "
        cells = [
            f"{texts}{NAMES[at.method]}{suffix}",
            f"{int(rows[0]['parameters']):,}",
            rows[0]["lr"],
            f"{stdlib.median(result.values('best_epoch')):g} of {at.epochs}",
            percent(over_seeds(result.values("test"))),
            *_difference(result, other),
            _drift(over_seeds(result.values("drift"))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(page: str, tables: Mapping[str, str]) -> str:
    """A Markdown page with each table, by its name, between ``<!-- NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the page has a place for a table that there is not.
    """

    def put(place: re.Match[str]) -> str:
        if place[1] not in tables:
            raise ValueError(f"page: expected tables of {', '.join(tables)}, got a place for {place[1]}")
        return f"<!-- {place[1]} -->\n{tables[place[1]]}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n(?:(?!<!--).)*<!-- end -->", put, page, flags=re.DOTALL)


def taken(done: Rows) -> str:
    """How many runs there are, and the hours of one core that they took."""
    hours = sum(float(row["seconds"] or 0) for row in done.values()) / 3600
    return f"{len(done)} runs, {hours:.1f} hours of one core."


def _same_but_method(group: Group, other: Group) -> bool:
    at = dataclasses.replace(other.at, method=AGAINST)
    if other.at.method == "full":  # which alone changes the lower layers
        at = dataclasses.replace(at, first=group.at.first)
    return group.at == at and other.at.method != AGAINST


def _difference(result: Result, other: Result | None) -> Sequence[str]:
    if other is None:
        return "", ""
    pairs = [a - b for a, b in zip(result.values("test"), other.values("test"), strict=False)]
    low, high = over_texts(result.right(), other.right())
    return percent(over_seeds(pairs), sign="+"), f"{100 * low:+.1f} to {100 * high:+.1f}"


def percent(interval: Interval, sign: str = "") -> str:
    """``91.2 ± 0.4``."""
    return f"{100 * interval.mean:{sign}.1f} ± {100 * interval.half:.1f}"


def _drift(interval: Interval) -> str:
    return "0" if interval == (0, 0) else f"{interval.mean:.2g} ± {interval.half:.1g}"
