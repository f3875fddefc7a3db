"""Rows that are tokenized already: ``input_ids``, and the columns beside it that say what is attended and learned.

    attention_mask     0 on padding, at either end, which is cut off
    labels             the token to learn at each place, -100 for none
    completion_mask    TRL's: 1 on what is learned
    assistant_masks    the same, of a chat template
    position_ids       count up from 0 in each of the texts that are packed into a row
    seq_lengths        TRL's: the lengths of these texts

A row of several texts becomes one example per text, which is exact: no text attends to another, and none learns the
first token of the next.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from adapterkern.training.data.rows import Row, scalar, shown

IDS = "input_ids"
IGNORE = -100  # a label that is not learned, as in transformers and torch
_LIMIT = 1 << 31
_ATTENDED = ("attention_mask", "position_ids", "seq_lengths")
LABELS = "labels"
_LEARNED = (LABELS, "completion_mask", "assistant_masks")


class Text(NamedTuple):
    """A tokenized text."""

    ids: np.ndarray  # (n,) int64
    labels: np.ndarray  # (n,) int64: the token to learn at each place, or IGNORE


def is_given(row: Row) -> bool:
    """Whether the row is tokenized already."""
    return row.values.get(IDS) is not None


def given_columns(values: Mapping[str, Any], learned: bool) -> set[str]:
    """The columns that ``given_texts`` reads of a row; those in which it has None are as if they were missing."""
    names = (IDS, *_ATTENDED, *(_LEARNED if learned else ()))
    return {name for name in names if values.get(name) is not None}


def given_texts(values: Mapping[str, Any], learned: bool) -> list[Text]:
    """The texts of a tokenized row. ``learned``: read also what says which tokens are learned.

    Raises:
        ValueError: a column is of another type or length, or has a value that it may not have.
    """
    ids = _integers(values[IDS], 0, _LIMIT - 1)
    if ids is None or not len(ids):
        raise ValueError(
            f"column {IDS!r}: expected a non-empty list of integers from 0 to 2**31 - 1{_got(values[IDS])}"
        )
    read = given_columns(values, learned)
    masks = {name: _mask(values, name, len(ids)) for name in ("attention_mask", *_LEARNED[1:]) if name in read}
    labels = _column(values, "labels", len(ids), IGNORE, _LIMIT - 1) if "labels" in read else ids
    if len(odd := labels[(labels < 0) & (labels != IGNORE)]):
        raise ValueError(f"column 'labels': expected token ids, or {IGNORE} for none, got {odd[0]}")
    for name in set(masks) & set(_LEARNED):
        labels = np.where(masks[name], labels, IGNORE)
    starts = np.zeros(len(ids), dtype=bool)
    starts[0] = True
    if "seq_lengths" in read:
        lengths = _integers(values["seq_lengths"], 1, _LIMIT - 1)
        if lengths is None or lengths.sum() != len(ids):
            got = _got(values["seq_lengths"])
            raise ValueError(f"column 'seq_lengths': expected lengths that sum to {len(ids)}, as input_ids has{got}")
        starts[lengths.cumsum()[:-1]] = True
    attended = masks.get("attention_mask", np.ones(len(ids), dtype=bool))
    places = np.flatnonzero(attended)
    if not len(places) or len(places) != places[-1] - places[0] + 1:
        got = "a 0 between them" if len(places) else "no 1"
        raise ValueError(f"column 'attention_mask': expected 1 on tokens, and 0 on padding at either end, got {got}")
    if "position_ids" in read:
        positions = _column(values, "position_ids", len(ids), 0, _LIMIT - 1)
        starts[places] |= positions[places] == 0
        begin = np.maximum.accumulate(np.where(starts, np.arange(len(ids)), places[0]))
        if (positions - (np.arange(len(ids)) - begin))[places].any():
            got = _got(values["position_ids"])
            raise ValueError(f"column 'position_ids': expected positions that count up from 0 in each text{got}")
    inside = slice(int(places[0]), int(places[-1]) + 1)
    cuts = np.flatnonzero(starts[inside])
    cuts = cuts[cuts > 0]
    parts = zip(np.split(ids[inside], cuts), np.split(labels[inside], cuts), strict=True)
    return [Text(*part) for part in parts]


def _got(value: Any) -> str:
    return f", got {shown(value)}"


def _column(values: Mapping[str, Any], name: str, length: int, low: int, high: int) -> np.ndarray:
    found = _integers(values[name], low, high)
    if found is None:
        raise ValueError(f"column {name!r}: expected a list of integers from {low} to {high}{_got(values[name])}")
    if len(found) != length:
        raise ValueError(f"column {name!r}: expected {length} values, as input_ids has, got {len(found)}")
    return found


def _mask(values: Mapping[str, Any], name: str, length: int) -> np.ndarray:
    return _column(values, name, length, 0, 1).astype(bool)


def _integers(value: Any, low: int, high: int) -> np.ndarray | None:
    """(n,) int64 of a list, an array or a tensor of integers within the bounds; else None. A mask may have bools."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return None
    kinds = {int, bool} if high == 1 else {int}
    items = value if set(map(type, value)) <= kinds else [scalar(item) for item in value]
    if not set(map(type, items)) <= kinds:
        return None
    found = np.array(items, dtype=np.int64 if not items else None)  # numbers beyond int64 give another kind of dtype
    if found.dtype.kind not in "ib" or (len(found) and not low <= found.min() <= found.max() <= high):
        return None
    return found.astype(np.int64)
