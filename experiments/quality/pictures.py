"""The four pictures of docs/compared.md."""

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from adapterkern.files import replacing
from experiments.quality import plan
from experiments.quality.report import NAMES, Result, results, searches
from experiments.quality.rows import Rows
from experiments.quality.statistics import over_seeds

COLORS = {method: f"C{i}" for i, method in enumerate(NAMES)}
MARKERS = dict(zip(NAMES, "oXPDv^s>*dph<12", strict=True))


def draw(done: Rows, folder: Path) -> None:
    """Write those pictures that have points."""
    made = {"parameters": parameters, "drift": drift, "texts": texts, "rates": rates}
    for name, picture in made.items():
        if (figure := picture(done)) is not None:
            with replacing(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=120, format="png")


def parameters(done: Rows) -> Figure | None:
    """Test accuracy over trained parameters, R8."""
    x = "parameters trained besides the head"
    return _over(done, ("r8", "high"), x, lambda result: (float(result.rows[0]["parameters"]), 1.0))


def drift(done: Rows) -> Figure | None:
    """Test accuracy over drift; filled without, open with the drift as a part of the loss."""
    x = "drift on newsgroup texts (nats per token)"

    def at(result: Result) -> tuple[float, float]:
        mean, half = over_seeds([math.log(value) for value in result.values("drift")])
        return math.exp(mean), math.exp(half)

    return _over(done, ("whole", "keep", "keep-more"), x, at)


def _over(done: Rows, parts: tuple[str, ...], x: str, at: Callable[[Result], tuple[float, float]]) -> Figure | None:
    """R8's test accuracy over a quantity, of all methods of these parts but the head alone; None without any.

    ``at``: the quantity, and the factor up to which its interval goes on both sides.
    """
    groups = [group for part in parts for group in plan.parts()[part] if group.at.method != "head"]
    if not (found := list(results(done, groups).values())):
        return None
    figure, axes = _figure(x, "accuracy on R8's test texts (%)")
    for result in found:
        _point(axes, result, *at(result))
    _logarithmic(axes)
    _legend(axes)
    return figure


def texts(done: Rows) -> Figure | None:
    """Test accuracy over the number of training texts, R8."""
    groups = plan.parts()
    found = list(results(done, groups["texts"]).values())
    if not found:
        return None
    methods = dict.fromkeys(result.group.at.method for result in found)
    found += [r for r in results(done, groups["r8"]).values() if r.group.at.method in methods]
    figure, axes = _figure("training texts of R8", "accuracy on R8's test texts (%)")
    for method in methods:
        of_method = [r for r in found if r.group.at.method == method]
        counts = {int(result.rows[0]["train_texts"]): result for result in of_method}
        for count in sorted(counts):
            _point(axes, counts[count], count)
        means = [100 * over_seeds(counts[count].values("test")).mean for count in sorted(counts)]
        axes.plot(sorted(counts), means, color=COLORS[method], linewidth=1)
    _logarithmic(axes)
    _legend(axes)
    return figure


def rates(done: Rows) -> Figure | None:
    """Validation accuracy over the learning rate, by size, of the search's runs."""
    found = {method: searches(done, method) for method in ("adapter", "lora")}
    if not any(found.values()):
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (method, of_method) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        for parameters, points in of_method.items():
            shown = [100 * accuracy for accuracy in points.values()]
            axes.plot(list(points), shown, "o-", label=f"{parameters:,} parameters")
        axes.set(xscale="log", xlabel="learning rate", title=NAMES[method])
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("accuracy on 800 validation texts of R8 (%)")
    return figure


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _point(axes: Axes, result: Result, x: float, factor: float = 1.0) -> None:
    method, test = result.group.at.method, over_seeds(result.values("test"))
    axes.errorbar(
        x,
        100 * test.mean,
        yerr=100 * test.half,
        xerr=[[x - x / factor], [x * factor - x]] if factor > 1 else None,
        color=COLORS[method],
        marker=MARKERS[method],
        markerfacecolor="white" if result.group.at.keep else COLORS[method],
        capsize=2,
        label=NAMES[method] + ", behavior kept" * bool(result.group.at.keep),
        linestyle="",
    )


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), fontsize="small")
