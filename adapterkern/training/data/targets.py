"""What the column of labels holds, by the task, and the targets that are learned from it.

    classification    one label            targets (1,) int64: its number
    multi-label       a list of labels     targets (labels,) uint8: 1 for those in the list, which may be empty
    regression        a finite number      targets (1,) float64: the number

A list is one of JSON, Parquet or Python. In a file that has none, such as CSV, it is JSON in the cell: ``["a", "b"]``,
and ``[]`` for no label. Nothing else is taken apart: a label may have any separator in its name.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from adapterkern.training.data.labels import (
    EXPECTED,
    label_name,
    label_number,
    label_order,
    suspicious_labels,
)
from adapterkern.training.data.rows import Row, listed, problem, scalar, shown

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LARGEST = float(np.finfo(np.float32).max)
_FEW = 20  # labels: more that are all numbers may measure something
_BINS, _IN_BIN = 10, 10  # of the numbers of a regression, for a share; rows in each of them, at least


class OneLabel:
    """A label per text: targets (1,) int64."""

    def read(self, row: Row, column: str) -> tuple[Any, str]:
        """What ``labels`` and ``targets`` take, and ""; or None, and what is wrong with the row's value."""
        value = scalar(row.values.get(column))
        if label_name(value) is not None:
            return [value], ""
        if _items(value) is not None:
            return None, problem(row, column, f"{EXPECTED} (a list of labels is for task='multi-label')")
        hint = "; numbers are for task='regression'" if isinstance(value, float) and value == value else ""
        return None, problem(row, column, EXPECTED) + hint

    def labels(self, value: Any) -> list[Any]:
        """The labels in what ``read`` returns, as they are in the data."""
        return value

    def names(self, values: Iterable[Any]) -> list[str]:
        """The names of all labels in these values, in the order of their numbers."""
        return label_order(name for value in values for one in self.labels(value) if (name := label_name(one)))

    def targets(self, value: Any, numbers: Mapping[str, int]) -> np.ndarray:
        """The targets of a value whose labels have these ``numbers``."""
        return np.array([label_number(one, numbers) for one in value])

    def too_few(self, names: Sequence[str], targets: Sequence[np.ndarray]) -> str:
        """What a training expects of its labels, and what it got; "" if they are enough to learn from."""
        return "" if len(names) > 1 else f"expected at least two different labels, got {listed(names) or 'none'}"

    def rows(self, targets: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, int]:
        """How many rows each label has, without those that no row has."""
        counts = Counter(number for labels, _ in self.strata(targets) for number in labels)
        return {name: counts[number] for number, name in enumerate(names) if counts[number]}

    def counts(self, targets: Sequence[np.ndarray]) -> dict[str, int]:
        """What else there is to count."""
        return {}

    def numbers(self, targets: Sequence[np.ndarray]) -> dict[str, float]:
        """``min``, ``mean`` and ``max`` of targets that measure something; nothing of labels."""
        return {}

    def suspicious(self, rows: Mapping[str, int]) -> list[str]:
        """What may be wrong with the labels, one line each, from what ``rows`` returns."""
        found = suspicious_labels(rows)
        lists = [name for name in rows if name.startswith("[") and name.endswith("]")]
        if lists:
            found.append(f"{len(lists)} labels look like lists, which the task multi-label learns: {listed(lists)}")
        if len(rows) > _FEW and all(_NUMBER.fullmatch(name.strip()) for name in rows):
            found.append(f"all {len(rows)} labels are numbers, which the task regression learns as such")
        return found

    def strata(self, targets: Sequence[np.ndarray]) -> list[tuple[tuple[int, ...], int]]:
        """For a share to evaluate on, per row: the labels that must keep a text to learn, and the group that it is of.

        A share takes its part of each group.
        """
        return [((int(of_row[0]),), int(of_row[0])) for of_row in targets]


class LabelList(OneLabel):
    """A list of labels per text: targets (labels,) uint8."""

    expected = "a list of labels, each a non-empty string or an integer, or [] for none"

    def read(self, row: Row, column: str) -> tuple[Any, str]:
        value = scalar(row.values.get(column))
        items = _items(_parsed(value))
        if items is None:
            if not isinstance(value, str):
                return None, problem(row, column, self.expected)
            return (
                None,
                f'column {shown(column)}: expected {self.expected}; in CSV as JSON, ["a", "b"]; got {shown(value)}',
            )
        names = [label_name(one) for one in items]
        if None in names:
            wrong = items[names.index(None)]
            return None, f"column {shown(column)}: expected {self.expected}, got {shown(wrong)} in the list"
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            hint = ": name the labels that a text has, and not 0 or 1 for each" if set(names) <= {"0", "1"} else ""
            return None, f"column {shown(column)}: expected each label once, got {listed(twice)} again{hint}"
        return items, ""

    def targets(self, value: Any, numbers: Mapping[str, int]) -> np.ndarray:
        found = np.zeros(len(numbers), dtype=np.uint8)
        for one in value:
            found[label_number(one, numbers)] = 1
        return found

    def too_few(self, names: Sequence[str], targets: Sequence[np.ndarray]) -> str:
        return "" if names else "expected at least one label, got empty lists alone"

    def counts(self, targets: Sequence[np.ndarray]) -> dict[str, int]:
        return {"without a label": sum(not of_row.any() for of_row in targets)}

    def strata(self, targets: Sequence[np.ndarray]) -> list[tuple[tuple[int, ...], int]]:
        """A row is of the group of its rarest label: of those of other labels there are enough."""
        labels = [tuple(np.flatnonzero(of_row).tolist()) for of_row in targets]
        counts = Counter(number for of_row in labels for number in of_row)
        return [(of_row, min(of_row, key=lambda n: (counts[n], n), default=-1)) for of_row in labels]


class Number(OneLabel):
    """A number per text: targets (1,) float64."""

    def read(self, row: Row, column: str) -> tuple[Any, str]:
        value = scalar(row.values.get(column))
        number = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value
        if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= _LARGEST:
            return float(number) + 0.0, ""  # -0.0 is 0.0
        if isinstance(number, int | float) or (isinstance(value, str) and value.strip()):
            return None, f"column {shown(column)}: expected a finite number, in fp32, got {shown(value)}"
        return None, problem(row, column, "a finite number")

    def labels(self, value: Any) -> list[Any]:
        return []

    def targets(self, value: Any, numbers: Mapping[str, int]) -> np.ndarray:
        return np.array([value], dtype=np.float64)

    def too_few(self, names: Sequence[str], targets: Sequence[np.ndarray]) -> str:
        found = sorted({float(of_row[0]) for of_row in targets})
        if len(found) > 1 and np.std(found) > 0:  # which is 0 of 1e-200 and 2e-200
            return ""
        return f"expected at least two different numbers, got {listed(found) or 'none'}"

    def numbers(self, targets: Sequence[np.ndarray]) -> dict[str, float]:
        values = np.concatenate(targets)
        return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}

    def strata(self, targets: Sequence[np.ndarray]) -> list[tuple[tuple[int, ...], int]]:
        """Up to ten groups of equally many rows, by their numbers; equal numbers are in one."""
        values = np.array([of_row[0] for of_row in targets])
        bins = min(max(len(values) // _IN_BIN, 1), _BINS)
        below = np.searchsorted(np.sort(values), values)
        return [((), number) for number in (below * bins // max(len(values), 1)).tolist()]


def _parsed(value: Any) -> Any:
    """The list that a text is in JSON; anything else as it is."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _items(value: Any) -> list[Any] | None:
    """The elements of a list, of Python, NumPy or torch; None if it is none."""
    if isinstance(value, list | tuple | set | frozenset):
        return list(value) if isinstance(value, list | tuple) else sorted(value, key=repr)
    return value.tolist() if len(getattr(value, "shape", ())) == 1 and hasattr(value, "tolist") else None


TARGETS: Mapping[str, OneLabel] = {"classification": OneLabel(), "multi-label": LabelList(), "regression": Number()}
