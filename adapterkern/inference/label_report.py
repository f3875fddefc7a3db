"""What a head for lists of labels gets wrong: scores per label, and the rows of the largest loss.

Each label is a choice of two by itself, so its rows, predictions and precision say all that a confusion matrix would;
there is none.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from adapterkern.inference.report import FORMAT_VERSION, ROWS, WORST, LabelScores, averages_by_name, of_row, scores_of
from adapterkern.training.data.rows import shown
from adapterkern.training.head_kinds import MultiLabelHead


@dataclasses.dataclass(frozen=True)
class WrongLabels:
    """A row with labels that are not predicted, or the reverse; ``loss`` is the row's mean over all labels, in nats."""

    place: str
    text: str | None
    labels: list[str]
    predicted: list[str]
    loss: float


@dataclasses.dataclass(frozen=True)
class LabelReport:
    """What a head for lists of labels gets wrong.

    Attributes:
        rows: their number.
        accuracy: the share of rows with all labels right, 0 to 1.
        labels: those in the rows or predicted, in the head's order.
        averages: [precision, recall, F1] over ``labels``: ``"micro"``, of all choices together, ``"macro"``, and
            ``"weighted"`` by support.
        absent: how many labels of the head are neither in the rows nor predicted.
        errors: the number of rows that are not all right.
        wrong: those of them with the largest loss, the largest first.
    """

    rows: int
    accuracy: float
    labels: list[LabelScores]
    averages: dict[str, list[float]]
    absent: int
    errors: int
    wrong: list[WrongLabels]
    picture: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "rows": self.rows,
            "accuracy": self.accuracy,
            "averages": averages_by_name(self.averages),
            "labels": [dataclasses.asdict(one) for one in self.labels],
            "labels_absent": self.absent,
            "errors": self.errors,
        }

    def parts(self, limit: int | None) -> Iterator[Any]:
        yield f"{self.rows:,} rows, {100 * self.accuracy:.2f} % with all labels right"
        yield from scores_of(self.labels, self.averages, self.absent, limit)
        rows = self.wrong if limit is None else self.wrong[:ROWS]
        if rows:
            yield f"\n{self.errors:,} of {self.rows:,} rows are not all right; those of the largest loss:"
        for row in rows:
            yield of_row(f"{row.loss:.2f} {_listed(row.predicted)}, expected {_listed(row.labels)}", row)

    def draw(self, path: Any) -> None:
        raise NotImplementedError("draw: a report on lists of labels has no picture")


def make_label_report(
    head: MultiLabelHead, targets: np.ndarray, scores: np.ndarray, places: Sequence[str], worst: int = WORST
) -> LabelReport:
    """The report on rows with these targets and scores (rows, labels), at these places; without their texts."""
    wanted, found = targets.astype(bool), scores > 0
    right, support, predicted = (of.sum(0) for of in (wanted & found, wanted, found))
    occurring = np.flatnonzero(support + predicted)
    of_labels = _scores(right, predicted, support)
    averages = {
        "micro": _scores(right.sum(), predicted.sum(), support.sum()),
        "macro": of_labels[:, occurring].sum(1) / max(len(occurring), 1),
        "weighted": of_labels @ support / max(support.sum(), 1),
    }
    counts, columns = np.stack([support, predicted], 1).tolist(), of_labels[:, occurring].T.tolist()
    wide = scores.astype(np.float64)
    loss = (np.logaddexp(0, wide) - wanted * wide).mean(1)
    wrong = np.flatnonzero((wanted != found).any(1))
    ordered = wrong[np.argsort(-loss[wrong], kind="stable")][:worst]
    return LabelReport(
        rows=len(targets),
        accuracy=1 - len(wrong) / len(targets),
        labels=[LabelScores(head.labels[n], *of, *counts[n]) for n, of in zip(occurring, columns, strict=True)],
        averages={name: values.tolist() for name, values in averages.items()},
        absent=len(head.labels) - len(occurring),
        errors=len(wrong),
        wrong=[
            WrongLabels(places[n], None, _names(head, wanted[n]), _names(head, found[n]), float(loss[n]))
            for n in ordered
        ],
    )


def _scores(right: Any, predicted: Any, support: Any) -> np.ndarray:
    """Precision, recall and F1 of labels (labels,), or of one; 0 / 0 counts as 0."""
    of = ((right, predicted), (right, support), (2 * right, predicted + support))
    return np.stack([count / np.maximum(all_, 1) for count, all_ in of])


def _names(head: MultiLabelHead, there: np.ndarray) -> list[str]:
    return [head.labels[number] for number in np.flatnonzero(there)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names)) or "none"
