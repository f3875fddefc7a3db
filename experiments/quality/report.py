"""Tables in Markdown from the rows of the CSV, also in a page; the pictures are in ``pictures``."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.quality import plan
from experiments.quality.plan import Group
from experiments.quality.rows import Rows
from experiments.quality.statistics import Interval, over_both, over_seeds, over_texts, unpacked
from experiments.quality.training import LAYERS, Spec

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
# Whom a part's rows are compared with, at the rates of its search: the same in all but the method, or but these fields
AGAINST_ALL: dict[str, Any] = {"method": "lora"}
AGAINST: dict[str, dict[str, Any]] = {
    "instructions": AGAINST_ALL | {"epochs": plan.EPOCHS[400]},
    "init": {"method": "adapter"},
    "warmup": {"warmup": Spec.warmup},
    "steps": {"epochs": plan.EPOCHS[400]},
    "layers": {"first": plan.HALF[1]},
    "defaults": {"epochs": plan.EPOCHS[400]},
}
NOT_DONE = "Not done yet."
SHORT = ("head", "lora", "adapter", "adapter-parallel", "full")


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
        return np.array([unpacked(row["right"], int(row["test_texts"])) for row in self.rows])


def results(done: Rows, groups: Iterable[Group]) -> dict[Group, Result]:
    """The groups of which every seed has finished."""
    found = {}
    for group in groups:
        specs = group.final(done)
        if specs and all(spec in done and done[spec]["status"] == "finished" for spec in specs):
            found[group] = Result(group, [done[spec] for spec in specs])
    return found


def _diverged(done: Rows, group: Group) -> list[Spec]:
    """A group's final runs that did not stay finite."""
    return [spec for spec in group.final(done) if spec in done and done[spec]["status"] != "finished"]


def table(done: Rows, part: str) -> str:
    """A part's rows: size, rate, accuracy, its difference to another row's, drift."""
    return markdown(_cells(done, part)) or NOT_DONE


def short(done: Rows) -> str:
    """Some rows and columns of the first part."""
    cells = _cells(done, "r8")
    return markdown([[row[i] for i in (0, 1, 3, 4)] for row in cells if row[0] in ("", *map(NAMES.get, SHORT))])


def _cells(done: Rows, part: str) -> list[list[str]]:
    """The head and the rows of a part's table; nothing without a row."""
    parts = plan.parts()
    all_found = results(done, itertools.chain(*parts.values()))
    shown = [group for group in parts[part] if group in all_found or _diverged(done, group)]
    if not shown:
        return []
    fields = AGAINST.get(part, AGAINST_ALL)
    drifts = any(group.at.layers > LAYERS for group in parts[part])
    than = NAMES[str(fields.get("method", "adapter"))].split(",")[0]
    lines = [["", "parameters", "rate", "test", f"minus {than}", "over seeds", "over texts"]]
    lines[0] += ["drift", "drift elsewhere"] * drifts
    for group in shown:
        if lost := _diverged(done, group):
            told = f"{len(lost)} of {group.seeds} seeds did not stay finite"
            lines.append([_name(group, part), "", f"{lost[0].lr:g}", told, *[""] * (len(lines[0]) - 4)])
            continue
        result = all_found[group]
        cells = [_name(result.group, part), f"{int(result.rows[0]['parameters']):,}"]
        cells.append(result.rows[0]["lr"] if group.at.epochs else "")
        cells += [percent(over_seeds(result.values("test"))), *_difference(result, all_found, fields)]
        cells += [_drift(over_seeds(result.values(name))) for name in ("drift", "drift_elsewhere") if drifts]
        lines.append(cells)
    return lines


def searches(done: Rows, method: str) -> dict[int, dict[float, float]]:
    """Validation accuracy on R8 with seed 0, by the number of parameters and the learning rate, in order."""
    found: dict[int, dict[float, float]] = {}
    groups = (group for part in ("r8", "high", "sizes") for group in plan.parts()[part])
    for group in sorted((g for g in groups if g.at.method == method), key=lambda group: group.at.budget):
        tried = sorted((spec.lr, done[spec]) for spec in done if spec == group.tried(spec.lr))
        points = {lr: float(row["validation"]) for lr, row in tried if row["status"] == "finished"}
        if points:
            found[int(tried[0][1]["parameters"])] = points
    return found


def sizes(done: Rows) -> str:
    """What ``searches`` has found for LoRA and for adapters."""
    found = {method: searches(done, method) for method in ("lora", "adapter")}
    rates = sorted({rate for of_method in found.values() for points in of_method.values() for rate in points})
    lines = [["", "parameters", *(f"{rate:g}" for rate in rates)]]
    for method, of_method in found.items():
        for parameters, points in of_method.items():
            shown = (_tenths(points[rate], "") if rate in points else "" for rate in rates)
            lines.append([NAMES[method], f"{parameters:,}", *shown])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of a head and rows; nothing without them."""
    ruled = [*lines[:1], ["---", *["--:"] * (len(lines[0]) - 1)], *lines[1:]] if lines else []
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


def _name(group: Group, part: str) -> str:
    at = group.at
    name = NAMES[at.method] if at.epochs else "untouched model"
    if part == "texts":
        name = f"{at.texts or 'all'} texts: {name}"
    name += f", kept ×{at.keep:g}" if at.keep else ""
    name += f", warmup {at.warmup:g}" if part == "warmup" else ""
    if part in ("steps", "defaults"):
        name += f", {at.epochs} epoch{'s' * (at.epochs > 1)}, the head at {at.head_lr:g}"
    return name + (f", layers from {at.first}" if part in ("layers", "all-layers") else "")


def _difference(result: Result, all_found: Mapping[Group, Result], fields: Mapping[str, Any]) -> Sequence[str]:
    at = dataclasses.replace(result.group.at, lr=0.0, head_lr=0.0, **fields)
    if result.group.at.method == "full":  # a row of the half's table, though it changes all layers
        at = dataclasses.replace(at, first=plan.HALF[1])
    other = next((found for group, found in all_found.items() if group.at == at), None)
    if other is None or other.rows[0] == result.rows[0]:
        return "", "", ""
    seeds = min(len(result.rows), len(other.rows))
    ours, theirs = result.right()[:seeds], other.right()[:seeds]
    low, high = over_texts(ours, theirs)
    alone = 100 * over_seeds((ours.mean(1) - theirs.mean(1)).tolist()).half
    return percent(over_both(ours, theirs), sign="+"), f"± {alone:.1f}", f"{_tenths(low)} to {_tenths(high)}"


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


def percent(interval: Interval, sign: str = "") -> str:
    """``91.2 ± 0.4``."""
    return f"{_tenths(interval.mean, sign)} ± {100 * interval.half:.1f}"


def _tenths(value: float, sign: str = "+") -> str:
    """In percent; 0 has no sign."""
    rounded = round(100 * value, 1)
    return f"{rounded:{sign}.1f}" if rounded else "0.0"


def _drift(interval: Interval) -> str:
    return "0" if interval == (0, 0) else f"{interval.mean:.2g} ± {interval.half:.1g}"
