"""``training.png``: a run's loss, accuracy or RMSE, drift, learning rate and gradient norm; the style of all plots."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # no pyplot: a library must not touch the user's figures or backend

from adapterkern.files import replacing
from adapterkern.training.head_kinds import HEADS

INK = "#7d838c"  # contrast of at least 3.8 : 1 on white and on a dark page
OURS, OTHER, THIRD = "#e5484d", "#3b82d6", "#27a376"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9,
}  # fmt: skip
_FEW = 30  # points, which are shown as such


@contextlib.contextmanager
def drawn(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """A figure in ``STYLE``, in inches. The end of the block writes it to ``path``, a PNG file, atomically."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def plot_history(history: list[dict[str, Any]], path: str | os.PathLike[str], task: str = "classification") -> None:
    """Plot a run to a PNG file; the best evaluations are marked, and the step that ``TrainConfig.best`` has saved.

    Of drift the last evaluation is marked.

    Args:
        history: the records of ``metrics.jsonl``.
        task: of ``TrainConfig``: determines the unit of the loss, and whether texts or tokens are correct.
    """
    train = [record for record in history if record["kind"] == "train"]
    evaluations = [record for record in history if record["kind"] == "eval"]
    unit, of_loss = ("text", HEADS[task].loss_unit) if task in HEADS else ("token", "cross-entropy (nats per token)")
    scores = {"accuracy": ("Accuracy", f"correct {unit}s (%)", max), "rmse": ("RMSE", "in the unit of the label", min)}
    having = {name: [r for r in evaluations if name in r] for name in (*scores, "drift")}
    score = next((name for name in scores if having[name]), None)
    names = ["loss"] + [score] * (score is not None) + ["drift"] * bool(having["drift"])
    with drawn(path, 4.5 * len(names), 4.4) as figure:
        layout: Any = [names, ["rate"] * len(names)]
        axes = figure.subplot_mosaic(layout, height_ratios=[3, 1])
        _lines(axes["loss"], train, "loss", OURS, "training")
        axes["loss"].set(ylabel=of_loss, title="Loss")
        if evaluations:
            _lines(axes["loss"], evaluations, "loss", OTHER, "evaluation")
            _mark(axes["loss"], min(evaluations, key=lambda record: record["loss"]), "loss", 1, "{:.4f}")
            axes["loss"].legend()
        if score is not None:
            title, of_score, best_of = scores[score]
            scale, form = (100, "{:.2f} %") if score == "accuracy" else (1, "{:.4g}")
            _lines(axes[score], having[score], score, OTHER, "evaluation", scale)
            _mark(axes[score], best_of(having[score], key=lambda record: record[score]), score, scale, form)
            axes[score].set(ylabel=of_score, title=title)
        if drifts := having["drift"]:  # 0 is where every run begins: the last one is marked
            _lines(axes["drift"], drifts, "drift", OTHER, "evaluation")
            _mark(axes["drift"], drifts[-1], "drift", 1, "{:.3g}")
            axes["drift"].set(ylabel="KL to the untouched model (nats per token)", title="Drift")
        rate, norm = axes["rate"], axes["rate"].twinx()
        _lines(rate, train, "lr", INK, "learning rate")
        _lines(norm, train, "grad_norm", THIRD, "gradient norm")
        rate.set_ylabel("learning rate")
        norm.set_ylabel("gradient norm", color=THIRD)
        norm.spines["right"].set_visible(True)
        rate.set_xlabel("optimizer step")
        if kept := [record["step"] for record in evaluations if record.get("best")]:
            for name in names:
                axes[name].axvline(kept[-1], color=INK, linestyle=":", linewidth=1, label=f"saved: step {kept[-1]}")
            axes["loss"].legend()
        for axis in axes.values():
            axis.margins(y=0.12)
            axis.grid(alpha=0.25)
            axis.set_xlim(left=0)
        for axis in (rate, norm):
            axis.set_ylim(bottom=0)


def _lines(axis: Axes, records: list[dict[str, Any]], name: str, color: str, label: str, scale: float = 1) -> None:
    style = "." if len(records) == 1 else ".-" if len(records) < _FEW else "-"
    values = [scale * record.get(name, 0) for record in records]
    axis.plot([record["step"] for record in records], values, style, color=color, linewidth=1.2, label=label)


def _mark(axis: Axes, best: dict[str, Any], name: str, scale: float, form: str) -> None:
    place = best["step"], scale * best[name]
    axis.plot(*place, "o", mfc="none", color=INK, markersize=9)
    axis.annotate(form.format(place[1]), place, (0, 8), textcoords="offset points", ha="center", fontsize=8)
