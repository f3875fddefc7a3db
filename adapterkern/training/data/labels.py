"""The labels of a classification: what may be one, their order, and what is suspicious about them.

A label is a string that is not blank, or an integer, of Python, NumPy or torch; a boolean is the label ``true`` or
``false``, as JSON and YAML write it. Strings are labels as they are, with case and spaces: nothing is merged, but
labels that differ only in these are named. A float is none: what it measures is not a class.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterkern.training.data.rows import alike, listed, plain, scalar, shown

EXPECTED = "a non-empty string or an integer"
_INTEGER = re.compile(r"-?\d{1,18}")
_FRACTION = re.compile(r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?")
_MANY = 1000  # labels, among which no typing error is looked for
_FEW = 10  # with fewer rows than this a label may well have one row


def label_name(value: Any) -> str | None:
    """The name of a label; None if ``value`` cannot be one."""
    value = scalar(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(int(value)) if abs(value) < 1 << 63 else None
    return value if isinstance(value, str) and value.strip() else None


def label_number(value: Any, numbers: Mapping[str, int]) -> int | None:
    """The number of a label; None if it is none of these. Heads of 0.1.0 name booleans ``True`` and ``False``."""
    name = label_name(value)
    if name not in numbers and isinstance(scalar(value), bool):
        name = str(scalar(value))
    return None if name is None else numbers.get(name)


def label_order(names: Iterable[str]) -> list[str]:
    """Different names: in numerical order if all are integers, else in alphabetical order."""
    labels = sorted(set(names))
    if all(_INTEGER.fullmatch(name) for name in labels):
        labels.sort(key=int)
    return labels


def written_in_two_ways(values: Iterable[Any]) -> str:
    """The labels that are strings in some rows and numbers or booleans in others, as ``'1' and 1``; "" if none is."""
    kinds: dict[str, dict[bool, Any]] = {}
    for value in map(scalar, values):
        if (name := label_name(value)) is not None:
            kinds.setdefault(name, {}).setdefault(isinstance(value, str), value)
    several = [found.values() for found in kinds.values() if len(found) > 1]
    return ", ".join(" and ".join(map(shown, values)) for values in several[:_FEW])


def suspicious_labels(counts: Mapping[str, int]) -> list[str]:
    """What may be wrong with labels, one line each, from the number of rows of each."""
    groups: dict[str, list[str]] = {}
    for name in counts:
        groups.setdefault(plain(name), []).append(name)
    found = []
    for names in groups.values():
        if len(names) > 1:
            # Escaped, for what differs may be invisible.
            same = ", ".join(f"{ascii(name)[:40]} ({counts[name]})" for name in names[:_FEW])
            found.append(f"labels that differ only in case, spaces or form are different labels: {same}")
    fractions = [name for name in counts if _FRACTION.fullmatch(name.strip())]
    if fractions:
        found.append(
            f"{len(fractions)} labels are numbers with a fraction, each a class of its own: {listed(fractions)}"
        )
    rows = sum(counts.values())
    if rows >= _FEW and 2 * len(counts) > rows:
        found.append(f"{len(counts)} labels for {rows} rows: most have one row, and nothing to generalize from")
    elif rows >= _FEW and (single := [name for name, count in counts.items() if count == 1]):
        found.append(f"{len(single)} of {len(counts)} labels have one row: {listed(single)}")
    return found


def unknown_label(name: str, names: Sequence[str], *, look: bool) -> str:
    """What to say of a label that is none of those ``names`` that a head has learned; ``look`` for what it may mean."""
    hint = ""
    if look and (near := alike(name, names)):
        hint = f"; {shown(near[0])} differs only in case, spaces or form"
    elif look and len(names) <= _MANY:
        known, typed = {plain(other): other for other in names}, plain(name)
        close = difflib.get_close_matches(typed, known, 1)
        if close and _letters(close[0]) != _letters(typed):  # class 3 is no typing error of class 2
            hint = f"; did you mean {shown(known[close[0]])}?"
    return f"label {shown(name)} is not one of the training's labels {listed(names)}{hint}"


def _letters(text: str) -> str:
    return re.sub(r"[\d.+-]", "", text)
