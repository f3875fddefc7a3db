"""A share of the training rows to evaluate on, such as ``"10%"``: always the same ones for the same seed and rows.

Texts are in the order of a hash of the seed and their tokens, and the first of each label are held out: their place in
the file, the number of processes and Python's hashes decide nothing. Of a list of labels its rarest counts, and of a
number which tenth of all numbers it is in. Rows of one text are never on both sides, nor are the turns of a
conversation; and no label is without a text to learn.
"""

import dataclasses
import hashlib
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from adapterkern.training.data.examples import E, Example
from adapterkern.training.data.rows import DataError, shown, source_name
from adapterkern.training.data.targets import OneLabel

_SHARE = re.compile(r"\d{1,9}(\.\d{1,9})?%")
_NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The part of ``train_data`` that a run with this seed and ``eval_data=share`` has held out, for ``evaluate``.

    Attributes:
        train_data: see ``load_examples``.
        share: such as ``"10%"``.
        sha256: the ``fingerprint`` of the part, where it is known.
    """

    train_data: Any
    share: str
    seed: int
    sha256: str | None = None

    @property
    def name(self) -> str:
        """``"10% of reviews.csv"``."""
        return f"{self.share} of {os.path.basename(source_name(self.train_data))}"

    @property
    def rest(self) -> str:
        """The name of the other part."""
        return dataclasses.replace(self, share=f"{100 - Decimal(self.share[:-1])}%").name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HeldOut":
        """The inverse of ``dataclasses.asdict``, of a file as data. Raises ``ValueError`` for a damaged one."""
        kinds: dict[str, Any] = {"train_data": str, "share": str, "seed": int, "sha256": str | None}
        for name, kind in kinds.items():
            value = values.get(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {value!r:.80}")
        check_share(values["share"])
        return cls(**{name: values[name] for name in kinds if name in values})


def is_share(data: Any) -> bool:
    """Whether ``data`` names a share of the training rows, which has a percent sign, and no data.

    Raises:
        ValueError: it is not within 0% and 100%, or a number without the sign.
    """
    if isinstance(data, str) and _SHARE.fullmatch(data):
        check_share(data)
        return True
    number = isinstance(data, str) and _NUMBER.fullmatch(data) and not os.path.exists(data)
    if number or isinstance(data, int | float):
        raise ValueError(f"eval_data: expected data, or a share of the training rows such as '10%', got {data!r}")
    return False


def check_share(share: str) -> None:
    """Raise ``ValueError`` unless ``share`` is one."""
    if not _SHARE.fullmatch(share) or not 0 < Decimal(share[:-1]) < 100:
        raise ValueError(f"eval_data: expected a share above 0% and below 100%, such as 10%, got {shown(share)}")


def split(examples: Sequence[E], part: HeldOut, *, targets: OneLabel | None) -> tuple[list[E], list[E]]:
    """What of the examples is learned, and what is held out, each in the order that it has.

    The share is that of the examples, rounded; each group of them (a label's, see ``OneLabel.strata``) has its part of
    it, by the largest remainders. A text with
    more rows than are left to hold out is learned. Of examples without a ``text`` none is held out.

    Args:
        part: of the examples of its ``train_data``.
        targets: what those of the examples are; None for what has no label.

    Raises:
        ValueError: one of the two would be empty.
    """
    seed = part.seed.to_bytes(-(-part.seed.bit_length() // 8) or 1, "little")
    key = hashlib.sha256(seed).digest()
    hashes = {
        min(hashlib.blake2b(text, key=key).digest() for text in texts): sorted(itertools.chain(*texts.values()))
        for texts in _inseparable(examples)
    }
    strata: dict[int, list[list[int]]] = {}
    strata_of: Sequence[tuple[tuple[int, ...], int]] = [((0,), 0)] * len(examples)
    if targets is not None:
        strata_of = targets.strata([example.targets for example in examples])
    labels_of, group_of = [labels for labels, _ in strata_of], [group for _, group in strata_of]
    for _, rows in sorted(hashes.items()):
        strata.setdefault(min(group_of[row] for row in rows), []).append(rows)
    counts = {label: sum(map(len, of_label)) for label, of_label in strata.items()}
    share = Fraction(Decimal(part.share[:-1])) / 100
    total = math.floor(sum(counts.values()) * share + Fraction(1, 2))
    wanted = {label: math.floor(count * share) for label, count in counts.items()}
    # Of equal remainders those first whose first text has the lower hash: strata are in that order.
    by_remainder = sorted(counts, key=lambda label: wanted[label] - counts[label] * share)
    for label in [label for label in by_remainder if len(strata[label]) > 1][: total - sum(wanted.values())]:
        wanted[label] += 1
    held: set[int] = set()
    learned = Counter(
        label for rows in hashes.values() for label in {label for row in rows for label in labels_of[row]}
    )
    for label, of_label in strata.items():
        left = wanted[label]
        for rows in of_label:
            labels = {label for row in rows for label in labels_of[row]}  # several where rows of one text have
            if len(rows) <= left and all(learned[other] > 1 for other in labels):
                held |= set(rows)
                left -= len(rows)
                learned.subtract(labels)
    rows_there = sum(counts.values())
    if not held or total >= rows_there:
        kept = "rows of one text stay together, and each label keeps a text to learn"
        texts_there = f", of {len(hashes):,} texts; {kept}"
        raise ValueError(
            "eval_data: expected a share that leaves rows to learn and rows to evaluate on, got "
            f"{part.share}, which is {total:,} of {rows_there:,} rows{texts_there if 0 < total < rows_there else ''}"
        )
    learned_rows = [example for number, example in enumerate(examples) if number not in held]
    return learned_rows, [examples[number] for number in sorted(held)]


def _inseparable(examples: Sequence[Example]) -> list[dict[bytes, list[int]]]:
    """The numbers of the examples by text, in groups of texts: those that were made of one row are in one.

    The texts that are packed into a row that is tokenized already have nothing in common.
    """
    groups: dict[bytes, dict[bytes, list[int]]] = {}  # of each text the group that it is in
    of_row: dict[str, bytes] = {}
    for number, example in enumerate(examples):
        if (text := example.text()) is None:
            continue
        group = groups.setdefault(text, {text: []})
        group[text].append(number)
        other = groups[of_row.setdefault(example.place, text)] if example.place and not example.given else group
        if other is not group:
            small, large = sorted((group, other), key=len)
            large |= small
            groups |= dict.fromkeys(small, large)
    return list({id(group): group for group in groups.values()}.values())


def check_unchanged(part: HeldOut, sha256: str) -> None:
    """Raise ``DataError`` if the part is not what it was in the training: it may have rows that were learned."""
    if part.sha256 not in (None, sha256):
        raise DataError(
            f"{source_name(part.train_data)}: expected the rows of the training, of which {part.share} were held out, "
            "got others: what is held out of them may have been learned. Give other data to evaluate on"
        )
