"""What a classification gets wrong: scores per label, the confusion matrix, the rows most confidently wrong.

``make_report`` computes it from what an evaluation has kept, by scikit-learn's metrics. A precision or recall of 0 / 0,
of a label that is never predicted or that no row has, counts as 0, and is named. Labels that are neither in the rows
nor predicted count nowhere. Reports on other heads, see reports.py, are shown and written by what is here.

    report.json      all of it; the confusion matrix by label, without its zeros
    report.txt       tables to read
    confusion.png    the confusion matrix; of many labels those with the most errors
    wrong.jsonl      one JSON object per row, the most confidently wrong first
"""

import dataclasses
import importlib.util
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from adapterkern.files import check_owner, replacing, write_json, write_text
from adapterkern.training.data.rows import shown

logger = logging.getLogger(__name__)

REPORT_NAME, TEXT_NAME, PICTURE_NAME, WRONG_NAME = "report.json", "report.txt", "confusion.png", "wrong.jsonl"
SCATTER_NAME = "predicted.png"  # of a regression
PICTURES = (PICTURE_NAME, SCATTER_NAME)
FORMAT_VERSION = 1
WORST = 20  # rows in wrong.jsonl
SHOWN = 20  # labels in a table on the terminal, and in the picture
_MATRIX = 10  # labels in a matrix of text, which fits 80 columns; pairs of confused labels where there are more
ROWS = 5  # wrong rows on the terminal
_WIDTH = 100  # columns of report.txt
_LABEL = 24  # characters of a label in the picture


class AnyReport(Protocol):
    """What a report on any head has: lines and tables, the rows to name, and its picture's file name, or ""."""

    picture: ClassVar[str]

    @property
    def wrong(self) -> Sequence[Any]: ...
    def to_dict(self) -> dict[str, Any]: ...
    def parts(self, limit: int | None) -> Iterator[Any]: ...
    def draw(self, path: str | os.PathLike[str]) -> None: ...


@dataclasses.dataclass(frozen=True)
class LabelScores:
    """The scores of a label, from 0 to 1; ``support`` rows have it, for ``predicted`` rows it is predicted."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclasses.dataclass(frozen=True)
class WrongRow:
    """A row whose label is not the one ``predicted`` with this ``probability``; NaN if the scores are."""

    place: str
    text: str | None
    label: str
    predicted: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a head gets wrong.

    Attributes:
        rows: their number.
        accuracy: 0 to 1.
        labels: those in the rows or predicted, in the head's order.
        averages: [precision, recall, F1] over ``labels``: ``"macro"``, and ``"weighted"`` by support.
        confusion: rows by true and predicted label, in the order of ``labels``.
        absent: how many labels of the head are neither in the rows nor predicted.
        errors: the number of wrong rows.
        wrong: the most confidently wrong of them, the most confident first.
    """

    rows: int
    accuracy: float
    labels: list[LabelScores]
    averages: dict[str, list[float]]
    confusion: list[list[int]]
    absent: int
    errors: int
    wrong: list[WrongRow]
    picture: ClassVar[str] = PICTURE_NAME

    @property
    def pairs(self) -> list[tuple[str, str, int]]:
        """Label, predicted label and rows of every kind of error, the most frequent first."""
        names = [one.label for one in self.labels]
        cells = [(names[i], names[j], n) for i, row in enumerate(self.confusion) for j, n in enumerate(row)]
        return sorted((cell for cell in cells if cell[0] != cell[1] and cell[2]), key=lambda cell: -cell[2])

    def to_dict(self) -> dict[str, Any]:
        """What ``report.json`` holds."""
        names = [one.label for one in self.labels]
        matrix = zip(names, self.confusion, strict=True)
        return {
            "format_version": FORMAT_VERSION,
            "rows": self.rows,
            "accuracy": self.accuracy,
            "averages": averages_by_name(self.averages),
            "labels": [dataclasses.asdict(one) for one in self.labels],
            "labels_absent": self.absent,
            "confusion": {label: {names[j]: n for j, n in enumerate(row) if n} for label, row in matrix},
            "errors": self.errors,
        }

    def parts(self, limit: int | None) -> Iterator[Any]:
        return _parts(self, limit)

    def draw(self, path: str | os.PathLike[str]) -> None:
        draw(self, path)


def averages_by_name(averages: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """``LabelScores``' averages as ``report.json`` has them."""
    return {name: dict(zip(("precision", "recall", "f1"), values, strict=True)) for name, values in averages.items()}


def text_of(report: AnyReport) -> list[str]:
    """What ``report.txt`` holds."""
    from rich.console import Console

    text = io.StringIO()
    show(report, Console(file=text, width=_WIDTH), labels=None)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def check_installed() -> None:
    """Raise ``ImportError`` without scikit-learn."""
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("report: expected scikit-learn, which computes it: pip install 'adapterkern[train]'")


def make_report(
    labels: Sequence[str],
    true: Sequence[int],
    predicted: Sequence[int],
    probabilities: Sequence[float],
    places: Sequence[str],
    texts: Sequence[str | None],
    worst: int = WORST,
) -> Report:
    """The report on rows of which each has an element in the sequences.

    Args:
        labels: the names of a head's labels.
        true, predicted: numbers of ``labels``.
        probabilities: of the predicted labels, 0 to 1.
        places: where the rows are, such as file and line.
        texts: of the rows.
        worst: how many of the wrong rows to name.

    Raises ``ImportError`` without scikit-learn.
    """
    check_installed()
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    occurring = sorted({*true, *predicted})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")  # a matrix of one cell is right, then
        matrix = confusion_matrix(true, predicted, labels=occurring)

    def scores(average: str | None) -> Any:
        return precision_recall_fscore_support(true, predicted, labels=occurring, average=average, zero_division=0)

    precision, recall, f1, support = (values.tolist() for values in scores(None))
    columns = zip(precision, recall, f1, support, matrix.sum(0).tolist(), strict=True)
    averages = {name: [float(value) for value in scores(name)[:3]] for name in ("macro", "weighted")}
    wrong = [row for row in range(len(true)) if true[row] != predicted[row]]
    return Report(
        rows=len(true),
        accuracy=(len(true) - len(wrong)) / len(true),
        labels=[LabelScores(labels[number], *of) for number, of in zip(occurring, columns, strict=True)],
        averages=averages,
        confusion=matrix.tolist(),
        absent=len(labels) - len(occurring),
        errors=len(wrong),
        wrong=[
            WrongRow(places[row], texts[row], labels[true[row]], labels[predicted[row]], probabilities[row])
            for row in sorted(wrong, key=lambda row: _doubt(probabilities[row]))[:worst]
        ],
    )


def _doubt(probability: float) -> tuple[bool, float]:
    return math.isnan(probability), -probability


# Text


def show(report: AnyReport, console: Any, *, labels: int | None = SHOWN) -> None:
    """Print the report. ``labels``: how many there are room for, those of the lowest F1; None for all, and all rows."""
    for part in report.parts(labels):
        if isinstance(part, str):
            console.print(part, markup=False, highlight=False, soft_wrap=labels is not None)
        else:
            console.print(part)


def _parts(report: Report, limit: int | None) -> Iterator[Any]:
    """Lines and tables."""
    yield f"{report.rows:,} rows, {100 * report.accuracy:.2f} % right"
    yield from scores_of(report.labels, report.averages, report.absent, limit)
    yield from _matrix(report) if len(report.labels) <= _MATRIX else _pairs(report)
    rows = report.wrong if limit is None else report.wrong[:ROWS]
    if rows:
        yield f"\n{report.errors:,} of {report.rows:,} rows are wrong; the most confidently:"
    for row in rows:
        what = f"{row.probability:.2f} {shown(row.predicted)}, expected {shown(row.label)}"
        yield of_row(what, row)


def of_row(what: str, row: Any) -> str:
    """The line of a row, with its place and text."""
    return f"  {what}  {row.place}{'' if row.text is None else f'  {shown(row.text)}'}"


def scores_of(
    labels: Sequence[LabelScores], averages: Mapping[str, Sequence[float]], absent: int, limit: int | None
) -> Iterator[Any]:
    """The table of labels and averages, the labels of the lowest F1 first; and what counts as 0 in it."""
    ordered = sorted(labels, key=lambda one: (one.f1, -one.support))
    cut = ordered[:limit]
    table = make_table("label", "precision", "recall", "F1", "rows", "predicted")
    for one in cut:
        table.add_row(_name(one.label), *map(_score, (one.precision, one.recall, one.f1)), *_counts(one))
    table.add_section()
    for name, values in averages.items():
        table.add_row(f"{name} average", *map(_score, values))
    yield table
    if len(cut) < len(ordered):
        yield f"the {len(cut)} of {len(ordered)} labels with the lowest F1"
    if unpredicted := [one.label for one in ordered if not one.predicted]:
        yield f"never predicted, so that precision counts as 0: {_few(unpredicted, limit)}"
    if rowless := [one.label for one in ordered if not one.support]:
        yield f"in no row, so that recall counts as 0: {_few(rowless, limit)}"
    if absent:
        yield f"{absent} of {absent + len(ordered)} labels are in no row and never predicted, and in no average"


def make_table(first: str, *others: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _name(label: str, before: str = "") -> Any:
    from rich.text import Text

    return Text(before + shown(label))  # its brackets are no markup


def _score(value: float) -> str:
    return f"{value:.3f}"


def _counts(one: LabelScores) -> tuple[str, str]:
    return f"{one.support:,}", f"{one.predicted:,}"


def _few(names: Sequence[str], limit: int | None) -> str:
    more = "" if limit is None or len(names) <= limit else f" and {len(names) - limit} more"
    return ", ".join(map(shown, names[:limit])) + more


def _matrix(report: Report) -> Iterator[Any]:
    table = make_table("label \\ predicted", *(str(number) for number, _ in enumerate(report.labels, 1)))
    for number, (one, row) in enumerate(zip(report.labels, report.confusion, strict=True), 1):
        table.add_row(_name(one.label, f"{number} "), *(f"{count:,}" if count else "·" for count in row))
    yield table


def _pairs(report: Report) -> Iterator[Any]:
    if not (pairs := report.pairs):
        return
    table = make_table("label", "rows", "of")
    table.add_column("predicted", overflow="fold")
    support = {one.label: one.support for one in report.labels}
    for label, predicted, count in pairs[:_MATRIX]:
        table.add_row(_name(label), f"{count:,}", f"{support[label]:,}", _name(predicted))
    yield table
    if len(pairs) > _MATRIX:
        rest = sum(count for *_, count in pairs[_MATRIX:])
        yield f"the {_MATRIX} most frequent of {len(pairs):,} confusions; the others have {rest:,} rows"


# Files


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw the confusion matrix to a PNG file: in each cell its rows, as dark as its share of the label's rows.

    Of more than ``SHOWN`` labels those with the most errors, which the title says.
    """
    import numpy as np

    from adapterkern.training.run.plot import drawn  # matplotlib takes a second to import

    matrix = np.array(report.confusion)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    errors = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    kept = np.sort(np.argsort(-errors, kind="stable")[:SHOWN])
    names = [_cut(shown(report.labels[number].label)) for number in kept]
    title = f"{report.rows:,} rows, {100 * report.accuracy:.2f} % right"
    if len(kept) < len(matrix):
        title += f"\nthe {len(kept)} of {len(matrix)} labels with the most errors"
    size = 1.8 + 0.34 * len(kept)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with drawn(path, size + 1.6, size + 1.2) as figure:
            axis = figure.subplots()
            axis.imshow(shares[np.ix_(kept, kept)], vmin=0, vmax=1, cmap="Blues")
            for i, true in enumerate(kept):
                for j, predicted in enumerate(kept):
                    if count := matrix[true, predicted]:
                        color = "white" if shares[true, predicted] > 0.5 else "black"
                        axis.text(j, i, str(count), ha="center", va="center", color=color, fontsize=7)
            places = range(len(kept))
            axis.set_xticks(places, names, rotation=90, fontsize=8, parse_math=False)
            axis.set_yticks(places, names, fontsize=8, parse_math=False)
            axis.set(xlabel="predicted", ylabel="label")
            axis.set_title(title, fontsize=9)
    others = [one for one in found if "missing from font" not in str(one.message)]
    for one in others:
        warnings.warn(one.message, one.category, stacklevel=2)
    if len(others) < len(found):
        logger.warning("%s: the font lacks characters of the labels; %s has them", path, TEXT_NAME)


def _cut(label: str) -> str:
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` or ``OSError`` if ``write_report`` would write over other files than an earlier report."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"report: expected a folder, got the file {directory}")
    check_owner(directory / REPORT_NAME, "adapterkern", lambda saved: bool(saved.keys() & {"labels_absent", "numbers"}))
    if (directory / REPORT_NAME).exists():
        return
    if there := [name for name in (TEXT_NAME, *PICTURES, WRONG_NAME) if (directory / name).exists()]:
        raise ValueError(f"report: expected no {there[0]} in {directory}, or that of an earlier report; got another")


def write_report(report: AnyReport, directory: str | os.PathLike[str]) -> None:
    """Write the files to a folder, each atomically. Raises as ``check_directory``."""
    check_directory(directory)
    directory = Path(directory)
    write_json(directory / REPORT_NAME, report.to_dict())  # first: it says whose the others are
    rows = [dataclasses.asdict(row) for row in report.wrong]
    rows = [{name: None if value != value else value for name, value in row.items()} for row in rows]  # NaN
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for name, of_file in ((TEXT_NAME, text_of(report)), (WRONG_NAME, lines)):
        with replacing(directory / name) as temporary:
            write_text(temporary, "".join(f"{line}\n" for line in of_file))
    for name in PICTURES:
        if name == report.picture:
            report.draw(directory / name)
        else:  # that of an earlier report on another head
            (directory / name).unlink(missing_ok=True)
