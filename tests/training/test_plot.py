"""``training.png`` has what a run has: a single step, evaluations or none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adapterkern.training import plot_history
from tests.support import tiny_run


def train(step: int, **values: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 2.0 / step, "lr": 1e-3 * step, "grad_norm": 0.5, **values}


def evaluation(step: int, loss: float, accuracy: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": loss, "accuracy": accuracy}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    original = Figure.savefig

    def save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        original(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def points(figure: Figure, title: str) -> list[Any]:
    """(n, 2) of each line."""
    axis = next(axis for axis in figure.axes if axis.get_title() == title)
    return [np.asarray(line.get_xydata()) for line in axis.lines]


def test_all_of_a_run(tmp_path: Path, figures: list[Figure]) -> None:
    history = [train(1), train(2), evaluation(2, 0.9, 0.5), train(3), evaluation(4, 0.7, 0.8), evaluation(6, 0.8, 0.75)]
    plot_history(history, tmp_path / "training.png", "causal-lm")
    (figure,) = figures
    losses, evaluations, best = points(figure, "Loss")
    assert losses == pytest.approx(np.array([(1, 2.0), (2, 1.0), (3, 2 / 3)]))
    assert evaluations == pytest.approx(np.array([(2, 0.9), (4, 0.7), (6, 0.8)]))
    assert best == pytest.approx(np.array([(4, 0.7)]))
    accuracies, best = points(figure, "Accuracy")
    assert accuracies == pytest.approx(np.array([(2, 50), (4, 80), (6, 75)]))
    assert best == pytest.approx(np.array([(4, 80)]))
    rates = next(axis for axis in figure.axes if axis.get_ylabel() == "learning rate")
    assert np.asarray(rates.lines[0].get_ydata()).tolist() == pytest.approx([1e-3, 2e-3, 3e-3])
    norms = next(axis for axis in figure.axes if axis.get_ylabel() == "gradient norm")
    assert np.asarray(norms.lines[0].get_ydata()).tolist() == [0.5, 0.5, 0.5]
    assert {axis.get_ylabel() for axis in figure.axes} >= {"cross-entropy (nats per token)", "correct tokens (%)"}


def test_drift_has_a_panel_of_the_evaluations_that_have_it(tmp_path: Path, figures: list[Figure]) -> None:
    history = [train(1), evaluation(1, 0.9, 0.5), evaluation(2, 0.7, 0.8) | {"drift": 0.1}]
    plot_history([*history, evaluation(3, 0.8, 0.7) | {"drift": 0.3, "best": True}], tmp_path / "training.png")
    drifts, last, saved = points(figures[0], "Drift")
    assert drifts == pytest.approx(np.array([(2, 0.1), (3, 0.3)]))
    assert last == pytest.approx(np.array([(3, 0.3)]))
    assert saved[0][0] == 3


def test_without_evaluations_there_is_no_empty_panel(tmp_path: Path, figures: list[Figure]) -> None:
    plot_history([train(1), train(2)], tmp_path / "training.png")
    assert [axis.get_title() for axis in figures[0].axes if axis.get_title()] == ["Loss"]
    assert all(axis.lines for axis in figures[0].axes)


def test_a_single_step_is_seen(tmp_path: Path, figures: list[Figure]) -> None:
    def drawn() -> int:
        canvas = FigureCanvasAgg(figures[-1])
        canvas.draw()
        return int(np.asarray(canvas.buffer_rgba())[..., 3].astype(bool).sum())

    plot_history([train(1)], tmp_path / "training.png")
    with_a_point = drawn()
    figures[-1].axes[0].lines[0].remove()
    assert drawn() < with_a_point


def test_a_run_of_one_step_without_evaluation(tmp_path: Path, figures: list[Figure]) -> None:
    from adapterkern.training import train

    config = tiny_run.quiet(plot=True, max_steps=1, output_dir=tmp_path / "run")
    train(tiny_run.model(), tiny_run.rows(8), config, tokenizer=tiny_run.tokenizer())
    assert len(points(figures[0], "Loss")[0]) == 1
    assert (tmp_path / "run" / "training.png").read_bytes().startswith(b"\x89PNG")
