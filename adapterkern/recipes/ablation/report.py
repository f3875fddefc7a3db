"""The result of an ablation: one line per variant with its spread over seeds, as a table, as Markdown and as a plot.

Runs of one seed share the head's weights and the order of the rows, so the gain over the base point is computed within
each seed; its mean and deviation are over these differences. Deviations are sample deviations (n − 1). A difference
that is not clearly larger than its deviation / √(number of seeds) is not a finding.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table

from adapterkern import __version__
from adapterkern.files import replacing, write_json
from adapterkern.recipes.ablation.runs import STUDY_NAME, Findings
from adapterkern.recipes.ablation.study import ADAPTER_FIELDS, Setting, Study, Variant, show_setting
from adapterkern.training.run.plot import OTHER, OURS, drawn

TABLE_NAME, PLOT_NAME = "ablation.md", "ablation.png"

_TITLES = {
    "layers": "layers with adapters",
    "every": "layers with adapters",
    "kind": "kind of adapter",
    "prompt_length": "length of the prompts",
    "max_params": "budget (parameters)",
    "prompt_gate": "gate of the prompts",
    "bias_scale": "bias and scale of linear layers",
    "position": "position in a layer",
    "depth": "depth (adapters per site)",
    "adapter_dim": "width (adapter_dim)",
    "activation": "activation",
    "init": "init",
    "lr": "learning rate",
    "warmup": "warmup (share of the steps)",
    "max_norm": "max_norm (inf: no clipping)",
}


class Spread(NamedTuple):
    """A mean over seeds and the sample deviation, which is None for one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


class Line(NamedTuple):
    """A variant's runs."""

    variant: Variant
    accuracies: dict[int, float]  # by seed
    parameters: int | None
    seconds: float | None  # of a run's training steps, median over seeds
    loss: Spread | None
    accuracy: Spread | None
    gain: Spread | None  # in accuracy over the base point, paired by seed
    failed: int  # runs whose loss or gradient was not finite


def summarize(findings: Findings) -> list[Line]:
    """One line per variant that has a run, in the study's order."""
    lines: list[Line] = []
    base: dict[int, float] = {}
    for variant in findings.variants:
        rows = {seed: row for (label, seed), row in findings.rows.items() if label == variant.label}
        if not rows:
            continue
        accuracies = {seed: float(row["accuracy"]) for seed, row in rows.items() if row["accuracy"]}
        if variant is findings.variants[0]:
            base = accuracies
        seconds = _numbers(rows.values(), "seconds")
        parameters = _numbers(rows.values(), "trainable_parameters")
        gains = [accuracies[seed] - base[seed] for seed in accuracies if seed in base]
        lines.append(
            Line(
                variant,
                accuracies,
                int(parameters[0]) if parameters else None,
                statistics.median(seconds) if seconds else None,
                Spread.of(_numbers(rows.values(), "loss")),
                Spread.of(list(accuracies.values())),
                None if variant is findings.variants[0] else Spread.of(gains),
                len(rows) - len(accuracies),
            )
        )
    return lines


def _numbers(rows: Any, name: str) -> list[float]:
    return [float(row[name]) for row in rows if row[name]]


HEADINGS = ("", "parameters", "train s", "loss", "accuracy %", "over base")


def cells(line: Line) -> tuple[str, ...]:
    """The cells of a line, one per heading in ``HEADINGS``."""
    label = line.variant.label + (f" ({line.failed} not finite)" if line.failed else "")
    return (
        label,
        "" if line.parameters is None else f"{line.parameters:,}",
        "" if line.seconds is None else f"{line.seconds:.1f}",
        _shown(line.loss, "{:.3f}"),
        _shown(line.accuracy, "{:.1f}", 100),
        _shown(line.gain, "{:+.1f}", 100),
    )


def _shown(spread: Spread | None, text: str, scale: float = 1) -> str:
    if spread is None:
        return ""
    mean = text.format(spread.mean * scale)
    return mean if spread.deviation is None else f"{mean} ± {text.replace('+', '').format(spread.deviation * scale)}"


def write_report(study: Study, findings: Findings, output: Path, title: str = "") -> None:
    """Print the table; write ``ablation.md``, ``ablation.png`` and ``study.json`` to ``output``.

    Without any run it does nothing.
    """
    lines = summarize(findings)
    if not lines:
        return
    base = f"base: {base_point(study, findings.num_layers)}"
    print_table(lines, f"{title}\n{base}" if title else base)
    with replacing(output / TABLE_NAME) as temporary:
        temporary.write_text(markdown(lines), encoding="utf-8")
    unit = "text" if study.training.labeled else "token"
    plot_axes(study, lines, findings.num_layers, output / PLOT_NAME, unit)
    row = next(iter(findings.rows.values()))
    described = {
        "title": title,
        "adapter": study.adapter.to_dict(),
        "training": study.training.to_dict(),
        "vary": {name: [str(value) for value in values] for name, values in study.vary.items()},
        "seeds": list(study.seeds),
        "product": study.product,
        "backbone_layers": findings.num_layers,
        "date": row["date"],
        "device": row["device"],
        "threads": row["threads"],
        "versions": {"adapterkern": __version__, "torch": row["torch"], "transformers": row["transformers"]},
    }
    write_json(output / STUDY_NAME, described)


report = write_report  # its name in 0.1.0


def base_point(study: Study, num_layers: int) -> str:
    """The base point's values, one per axis, as a string."""
    return ", ".join(show_setting(axis[0], num_layers) for axis in study.axes)


def print_table(lines: Sequence[Line], title: str) -> None:
    """Print the lines as a table of at most 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for line in lines:
        table.add_row(*cells(line))
    Console().print(table)


def markdown(lines: Sequence[Line]) -> str:
    """The lines as a Markdown table."""
    rows = [HEADINGS, ("---",) + ("--:",) * (len(HEADINGS) - 1), *(cells(line) for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# Plots


def plot_axes(study: Study, lines: Sequence[Line], num_layers: int, path: Path, unit: str) -> None:
    """One panel per axis: a dot per run, mean and deviation per value, and a line at the base point's mean.

    With one axis varied at a time, a panel shows the variants that differ from the base point on its axis only. With a
    full product it shows all variants, so a mean is over the other axes too.

    Args:
        unit: what accuracy counts: "text" or "token".
    """
    axes = [(index, axis) for index, axis in enumerate(study.axes) if len(axis) > 1]
    if not axes or not lines:
        return
    columns = math.ceil(len(axes) / math.ceil(len(axes) / 4))
    heights = [max(len(axis) for _, axis in axes[i : i + columns]) for i in range(0, len(axes), columns)]
    with drawn(path, 3.3 * columns, 0.9 + sum(0.65 + 0.24 * h for h in heights)) as figure:
        grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=[h + 1 for h in heights])
        panels = list(grid.flat)
        for panel, (index, axis) in zip(panels, axes, strict=False):
            _panel(panel, study, index, axis, lines, num_layers)
        for panel in panels[len(axes) :]:
            panel.set_visible(False)
        for panel in panels[max(0, len(axes) - columns) : len(axes)]:
            panel.set_xlabel(f"correct {unit}s (%)")
        # One scale for all adapter fields, without the others: a learning rate that is far off would squeeze them.
        alike = [panel for panel, (_, axis) in zip(panels, axes, strict=False) if axis[0][0] in ADAPTER_FIELDS]
        limits = [panel.get_xlim() for panel in alike]
        for panel in alike:
            panel.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
        figure.suptitle(f"dots: runs, bars: mean ± deviation over {len(study.seeds)} seeds, dashed: base point")


def _order(setting: Setting) -> float:
    """Sort key: numbers ascending; sets of layers and names keep their order."""
    name, value = setting
    return value if name not in ("layers", "every") and isinstance(value, int | float) else 0.0


def _panel(panel: Axes, study: Study, index: int, axis: Sequence[Any], lines: Sequence[Line], num_layers: int) -> None:
    shown = [line for line in lines if line.variant.training.train_adapters]
    if not study.product:
        shown = [line for line in shown if line.variant.changed <= {index}]
    base, axis = axis[0], sorted(axis, key=_order)
    for place, setting in enumerate(axis):
        accuracies = [
            100 * value
            for line in shown
            if line.variant.settings[index] == setting
            for value in line.accuracies.values()
        ]
        spread = Spread.of(accuracies)
        if spread is None:
            continue
        color = OURS if setting == base else OTHER
        panel.plot(accuracies, [place] * len(accuracies), ".", color=color, alpha=0.5, markersize=5)
        panel.errorbar(spread.mean, place, xerr=spread.deviation or 0, fmt="|", color=color, capsize=3, markersize=9)
    if lines[0].accuracy is not None and not lines[0].variant.changed:
        panel.axvline(100 * lines[0].accuracy.mean, color=OURS, linewidth=0.8, linestyle="--", alpha=0.7)
    names = {name for name, _ in axis}
    labels = [show_setting(setting, num_layers) for setting in axis]
    if len(names) == 1:
        labels = [label.removeprefix(f"{base[0]} ") for label in labels]
    panel.set_yticks(range(len(axis)), labels)
    panel.set_ylim(len(axis) - 0.4, -0.6)
    panel.set_title(_TITLES.get(base[0], base[0]), fontsize=9)
    panel.grid(axis="x", alpha=0.25)
