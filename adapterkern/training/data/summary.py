"""What a run learns from, before it begins: how many texts, which labels, how long they are, what is cut."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adapterkern.training.data.examples import Example
from adapterkern.training.data.rows import shown, warn_once
from adapterkern.training.data.targets import TARGETS, OneLabel

_LABELS = 12  # that are shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Numbers about the examples of one data source, or of one part of them.

    Attributes:
        counts: what there is how often: texts, and what else a task counts.
        labels: the rows of each label; empty without a head for labels.
        numbers: ``min``, ``mean`` and ``max`` of what a regression learns; else empty.
        unit: what the lengths are of.
        median, longest: length in tokens, after the cut.
        tokens, learned: in total, and those that carry loss; 0 beside labels.
        cut: texts that were cut at ``max_length``.
        max_length: ``TrainConfig.max_length``.
        chats: texts that the chat template has made of messages: how a run is to be asked.
        longest_cut: the longest of these, for a message; "" if none.
        suspicious: what looks wrong about the labels, one line each.
        part: the name of the part of a file that the examples are; "" where they are all of it.
        measured: tokens whose next one's distribution is measured, of texts that are not learned; else 0.
    """

    counts: Mapping[str, int]
    labels: Mapping[str, int]
    median: float
    longest: int
    tokens: int
    learned: int
    cut: int
    max_length: int
    chats: int = 0
    unit: str = "text"
    longest_cut: str = ""
    suspicious: tuple[str, ...] = ()
    part: str = ""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    measured: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. Messages are left out: they may name a path."""
        values = dataclasses.asdict(self)
        left_out = ["longest_cut", "suspicious", "part"]
        left_out += [name for name in ("numbers", "measured") if not values[name]]
        return {name: value for name, value in values.items() if name not in left_out}

    def lines(self) -> list[str]:
        """For a reader, without what looks wrong."""
        counts = ", ".join(f"{count:,} {name}" for name, count in self.counts.items())
        learned = f", {self.learned:,} learned" if self.learned else ""
        learned += f", {self.measured:,} measured" if self.measured else ""
        length = f"a {self.unit} has {self.median:,g} (median), {self.longest:,} (longest)"
        part = f"{self.part}: " if self.part else ""
        found = [f"{part}{counts}; {self.tokens:,} tokens{learned}; {length}"]
        if self.labels:
            ordered = sorted(self.labels.items(), key=lambda item: -item[1])
            more = f", and {len(ordered) - _LABELS} more" if len(ordered) > _LABELS else ""
            each = ", ".join(f"{shown(name)} {count:,}" for name, count in ordered[:_LABELS])
            found.append(f"{len(ordered)} labels: {each}{more}")
        if self.numbers:
            least, mean, most = (self.numbers[name] for name in ("min", "mean", "max"))
            found.append(f"numbers from {least:g} to {most:g}, mean {mean:g}")
        return found

    def cut_warning(self) -> list[str]:
        """That texts are cut, in one line; none if no text is."""
        if not self.cut:
            return []
        texts = self.counts.get("texts", self.cut)
        return [
            f"{self.cut:,} of {texts:,} texts are cut to the maximum length of {self.max_length} tokens, "
            f"the longest {self.longest_cut}"
        ]


def summarize(
    examples: Sequence[Example],
    max_length: int,
    labels: Sequence[str] | None = None,
    counts: Mapping[str, int] | None = None,
    targets: OneLabel = TARGETS["classification"],
) -> Summary:
    """The summary of ``examples``, of which there is at least one, and each is one text.

    Args:
        labels: those of the head; None without a head.
        counts: by default the number of texts.
        targets: what those of the examples are, beside a head.
    """
    lengths = [len(example.input_ids) for example in examples]
    learned = [example.targets for example in examples if labels is not None]
    of_labels = targets.rows(learned, labels or ())
    cut = [(len(e.input_ids) + e.cuts[0], e.place) for e in examples if e.cuts[0]]
    worst = ""
    if cut:
        length, place = max(cut, key=lambda found: found[0])
        worst = f"of {length:,} tokens" + (f" ({place})" if place else "")
    return Summary(
        counts=counts or {"texts": len(examples)} | (targets.counts(learned) if learned else {}),
        labels=of_labels,
        median=float(np.median(lengths)),
        longest=max(lengths),
        tokens=sum(lengths),
        learned=0 if labels is not None else sum(len(example.positions) for example in examples),
        cut=len(cut),
        max_length=max_length,
        chats=sum(example.chat for example in examples),
        longest_cut=worst,
        suspicious=tuple(targets.suspicious(of_labels)),
        numbers=targets.numbers(learned) if learned else {},
    )


def warn_of_overlap(train: Sequence[Example], evaluation: Sequence[Example]) -> None:
    """Warn of texts to evaluate on that are learned, too: their scores say nothing about others.

    Texts that are cut are compared as they were before.
    """
    learned = {_hash(example) for example in train}
    _name("eval", [example for example in evaluation if _hash(example) in learned], evaluation)


def warn_of_learned(train: Sequence[Example], texts: Sequence[Example], name: str) -> None:
    """Warn of causal-lm ``texts`` that are learned, too, as these or as others, of a label for example.

    Their tokens are compared, with and without the last one, which may end a text that has no end where it is labeled.
    """

    def whole(text: Example) -> tuple[bytes, int]:
        return text.input_ids.tobytes(), text.beyond[0][0]

    def without_last(text: Example) -> tuple[bytes, int]:
        return (text.input_ids if any(text.cuts) else text.input_ids[:-1]).tobytes(), text.beyond[0][1]

    learned = {whole(example) for example in train}
    _name(name, [text for text in texts if {whole(text), without_last(text)} & learned], texts)


def _name(name: str, both: Sequence[Example], of: Sequence[Example]) -> None:
    if both:
        place = f" ({both[0].place})" if both[0].place else ""
        warn_once(f"{name}: {len(both):,} of {len(of):,} texts are training texts, too{place}")


def _hash(example: Example) -> int:
    return hash((example.cuts, example.beyond, *(array.tobytes() for array in example.arrays())))
