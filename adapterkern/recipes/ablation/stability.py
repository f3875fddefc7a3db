"""Stability: loss and gradient norm at an aggressive learning rate, and how often they spike.

The rule: step t is out of bounds if its value is more than ``factor`` times the median of the up to 20 steps before it,
and more than ``margin`` above that median. Consecutive steps out of bounds are one spike. For the loss ``factor`` is 2
and ``margin`` 0.5 nats: late in a run the median is near 0, and one wrong text in a batch of sixteen would double it.
For the gradient norm before clipping ``factor`` is 5 and ``margin`` 1, the default ``max_norm``.

A running median follows a run that diverges, so a run that never recovers has few spikes. The second count covers that:
the steps whose loss is above the first step's, that is, worse than before any training.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from adapterkern.files import replacing
from adapterkern.recipes.ablation.report import Spread
from adapterkern.recipes.ablation.runs import Findings
from adapterkern.recipes.ablation.study import Study, Variant
from adapterkern.training.config import TrainConfig
from adapterkern.training.run.plot import INK, OTHER, OURS, THIRD, drawn
from adapterkern.training.run.report import read_metrics

WINDOW = 20  # steps
DEFAULT_NORM = TrainConfig().max_norm
LOSS_RULE = {"factor": 2.0, "margin": 0.5}
NORM_RULE = {"factor": 5.0, "margin": 1.0}
_COLORS = (OURS, OTHER, THIRD, "#e0861a", "#9a7ae0")


def spikes(values: Sequence[float], *, factor: float, margin: float) -> list[int]:
    """The indices at which the spikes of a series begin, by the rule above. NaN is a step without a value."""
    found, outside = [], False
    for index, value in enumerate(values):
        before = [v for v in values[max(0, index - WINDOW) : index] if not math.isnan(v)]
        median = statistics.median(before) if before else value
        was_outside, outside = outside, value > factor * median and value > median + margin
        if outside and not was_outside:
            found.append(index)
    return found


class Curve(NamedTuple):
    """A run, step by step."""

    seed: int
    status: str
    accuracy: float | None
    losses: list[float]
    norms: list[float]  # of the gradient before clipping; NaN if the fp16 scaler skipped the step
    skipped_steps: int

    @property
    def loss_spikes(self) -> int:
        return len(spikes(self.losses, **LOSS_RULE))

    @property
    def steps_above_start(self) -> int:
        return sum(loss > self.losses[0] for loss in self.losses)

    @property
    def norm_spikes(self) -> int:
        return len(spikes(self.norms, **NORM_RULE))


class Trace(NamedTuple):
    """A variant's runs."""

    variant: Variant
    curves: list[Curve]


def write_stability(study: Study, findings: Findings, output: Path) -> None:
    """Print the spikes of a study's runs; write them to ``stability.md``, and the curves to ``stability.png``.

    Raises:
        ValueError: the study did not log every step.
    """
    traces = read_traces(study, findings, output)
    if not traces:
        return
    print_spikes(traces, study)
    with replacing(output / "stability.md") as temporary:
        temporary.write_text(markdown(traces, study), encoding="utf-8")
    plot_curves(traces, study, output / "stability.png")


def read_traces(study: Study, findings: Findings, output: Path) -> list[Trace]:
    """The curves of a study's runs, which ``run_study`` wrote to ``output``.

    Raises:
        ValueError: the study did not log every step.
    """
    if study.training.log_every != 1:
        raise ValueError(f"log_every: expected 1 to see every step, got {study.training.log_every}")
    traces = []
    for variant in findings.variants:
        curves = []
        for (label, seed), row in findings.rows.items():
            if label != variant.label:
                continue
            records = [r for r in read_metrics(output / "curves" / f"{row['key']}.jsonl") if r["kind"] == "train"]
            curves.append(
                Curve(
                    seed,
                    row["status"],
                    float(row["accuracy"]) if row["accuracy"] else None,
                    [r["loss"] for r in records],
                    [r.get("grad_norm") or math.nan for r in records],  # a skipped step is logged as 0
                    records[-1].get("skipped_steps", 0) if records else 0,
                )
            )
        if curves:
            traces.append(Trace(variant, curves))
    return traces


HEADINGS = ("", "spikes", "norm's", "above", "max", "end", "accuracy %", "lost")
LEGEND = (
    "spikes of the loss and of the gradient norm; above: steps with a loss above the first step's; max: largest loss;\n"
    "end: mean loss of the last 10 steps; lost: runs that ended non-finite / steps skipped by the fp16 scaler.\n"
    "spikes and lost: sums over seeds; above and end: means over seeds"
)


def cells(trace: Trace, fields: Sequence[str]) -> tuple[str, ...]:
    """The cells of a trace, one per heading in ``HEADINGS``; see ``LEGEND``."""
    settings = dict(trace.variant.settings)
    curves = trace.curves
    accuracy = Spread.of([c.accuracy for c in curves if c.accuracy is not None])
    losses = [c.losses for c in curves if c.losses]
    shown = ""
    if accuracy is not None:
        shown = f"{100 * accuracy.mean:.1f}"
        shown += "" if accuracy.deviation is None else f" ± {100 * accuracy.deviation:.1f}"
    return (
        " ".join(describe(name, settings[name]) for name in fields),
        str(sum(c.loss_spikes for c in curves)),
        str(sum(c.norm_spikes for c in curves)),
        f"{statistics.fmean(c.steps_above_start for c in curves):.0f}",
        f"{max(max(run) for run in losses):.3g}" if losses else "",
        f"{statistics.fmean(statistics.fmean(run[-10:]) for run in losses):.3f}" if losses else "",
        shown,
        f"{sum(c.accuracy is None for c in curves)} / {sum(c.skipped_steps for c in curves)}",
    )


def describe(name: str, value: Any) -> str:
    """A setting in one or two words."""
    if name == "max_norm":
        return "no clip" if value == float("inf") else f"clip {value:g}"
    if name == "warmup":
        return f"warmup {value:g}" if value else "no warmup"
    return f"lr {value:g}" if name == "lr" else str(value)


def varied(study: Study) -> list[str]:
    """The fields that have more than one value."""
    return [axis[0][0] for axis in study.axes if len(axis) > 1]


def print_spikes(traces: Sequence[Trace], study: Study) -> None:
    """Print one line per variant, in at most 100 columns."""
    table = Table(caption=LEGEND, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for trace in traces:
        table.add_row(*cells(trace, varied(study)))
    Console().print(table)


def markdown(traces: Sequence[Trace], study: Study) -> str:
    """The traces as a Markdown table."""
    rows = [HEADINGS, ("---",) + ("--:",) * (len(HEADINGS) - 1), *(cells(t, varied(study)) for t in traces)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot_curves(traces: Sequence[Trace], study: Study, path: Path) -> None:
    """Plot loss (top) and gradient norm (bottom) over steps, one column per setting of all fields but the first.

    One line per run, one color per value of the first field. Spikes are ringed, and a run that ended on a number that
    is not finite has a cross at its last step.
    """
    lines, *others = varied(study) or [study.axes[0][0][0]]
    columns: dict[str, list[Trace]] = {}
    for trace in traces:
        settings = dict(trace.variant.settings)
        name = "\n".join(describe(field, settings[field]) for field in others)
        columns.setdefault(name, []).append(trace)
    if not columns:
        return
    values = [value for axis in study.axes for name, value in axis if name == lines]
    colors = dict(zip(values, _COLORS, strict=False))
    with drawn(path, 0.8 + 2.3 * len(columns), 4.6) as figure:
        grid = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
        for place, (title, members) in enumerate(columns.items()):
            for trace in members:
                color = colors[dict(trace.variant.settings)[lines]]
                for curve in trace.curves:
                    for axis, series, rule in (
                        (grid[0][place], curve.losses, LOSS_RULE),
                        (grid[1][place], curve.norms, NORM_RULE),
                    ):
                        steps = range(1, len(series) + 1)
                        axis.plot(steps, series, color=color, linewidth=0.8, alpha=0.8)
                        rings = spikes(series, **rule)
                        axis.plot([i + 1 for i in rings], [series[i] for i in rings], "o", mfc="none", color=color)
                        if curve.accuracy is None and series:
                            axis.plot(len(series), series[-1], "x", color=color)
            grid[0][place].set_title(title, fontsize=9)
            grid[1][place].set_xlabel("optimizer step")
        for axis in grid.flat:
            axis.set_yscale("log")
            axis.grid(alpha=0.25)
        for axis in grid[1]:
            axis.axhline(DEFAULT_NORM, color=INK, linewidth=0.8, linestyle=":")
        grid[0][0].set_ylabel("loss (nats per text)")
        grid[1][0].set_ylabel("gradient norm before clipping")
        for value, color in colors.items():
            grid[0][0].plot([], [], color=color, label=describe(lines, value))
        grid[0][0].plot([], [], color=INK, linewidth=0.8, linestyle=":", label=f"where max_norm={DEFAULT_NORM:g} clips")
        grid[0][0].plot([], [], "o", mfc="none", color=INK, label="spike")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(colors) + 2)
