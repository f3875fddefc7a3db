"""How far a regression's numbers are off: scores, the rows of the largest error, and predicted against true."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from adapterkern.inference.report import FORMAT_VERSION, ROWS, SCATTER_NAME, WORST, make_table, of_row
from adapterkern.training.head_kinds import RegressionHead
from adapterkern.training.scores import number_scores

_NAMES = {"rmse": "RMSE", "mae": "MAE", "r2": "R²", "pearson": "Pearson", "spearman": "Spearman"}


@dataclasses.dataclass(frozen=True)
class WrongNumber:
    """A row whose number is ``error`` less than what is predicted."""

    place: str
    text: str | None
    label: float
    predicted: float
    error: float


@dataclasses.dataclass(frozen=True)
class NumberReport:
    """How far the numbers of a regression are off.

    Attributes:
        numbers: ``rmse``, ``mae``, ``r2``, ``pearson``, ``spearman``, those that are defined.
        true, predicted: (rows,) fp64.
        wrong: the rows of the largest absolute error, the largest first.
    """

    numbers: dict[str, float]
    true: np.ndarray
    predicted: np.ndarray
    wrong: list[WrongNumber]
    picture: ClassVar[str] = SCATTER_NAME

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: value if np.isfinite(value) else None for name, value in self.numbers.items()}
        return {"format_version": FORMAT_VERSION, "rows": len(self.true), "numbers": numbers}

    def parts(self, limit: int | None) -> Iterator[Any]:
        table = make_table(f"{len(self.true):,} rows", "")
        for name, value in self.numbers.items():
            table.add_row(_NAMES[name], f"{value:.6g}")
        yield table
        rows = self.wrong if limit is None else self.wrong[:ROWS]
        if rows:
            yield "those of the largest error:"
        for row in rows:
            yield of_row(f"{row.predicted:.6g}, expected {row.label:.6g}", row)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw predicted against true, and the line on which they are the same, to a PNG file."""
        from adapterkern.training.run.plot import INK, OURS, drawn  # matplotlib takes a second to import

        scores = ", ".join(
            f"{_NAMES[name]} {self.numbers[name]:.4g}" for name in ("rmse", "r2") if name in self.numbers
        )
        ends = [self.true.min(), self.true.max()]
        with drawn(path, 4.6, 4.6) as figure:
            axis = figure.subplots()
            axis.plot(ends, ends, "-", color=INK, linewidth=0.8)
            axis.plot(self.true, self.predicted, ".", color=OURS, markersize=4, alpha=0.5)
            axis.set(xlabel="true", ylabel="predicted")
            axis.set_title(f"{len(self.true):,} rows: {scores}", fontsize=9)


def make_number_report(
    head: RegressionHead, targets: np.ndarray, scores: np.ndarray, places: Sequence[str], worst: int = WORST
) -> NumberReport:
    """The report on rows with these targets and scores (rows, 1), at these places; without their texts."""
    true, predicted = targets[:, 0], head.values(scores[:, 0])
    error = predicted - true
    ordered = np.argsort(np.where(np.isnan(error), np.inf, -np.abs(error)), kind="stable")[:worst]
    found = zip(*(values[ordered].tolist() for values in (true, predicted, error)), strict=True)
    wrong = [WrongNumber(places[n], None, *one) for n, one in zip(ordered, found, strict=True)]
    return NumberReport(number_scores(true, predicted), true, predicted, wrong)
