"""The settings of question answering. This module imports no transformers: the command line makes options from it."""

import dataclasses

from adapterkern import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanSettings:
    """How contexts are cut into windows and answers chosen; saved with the head.

    Args:
        doc_stride: context tokens between the starts of two windows, >= 1.
        max_answer_tokens: the longest answer, in tokens, >= 1.
        null_threshold: answer "" where the score of "no answer" exceeds the best span's by more than this; None: never.
        n_best: candidates per question in a prediction, >= 1.
        pointer_dim: p of the head's pointer term, see head.py; 0 leaves the term out.

    Raises:
        ValueError: a setting is out of its range.
        TypeError: one is of the wrong type.
    """

    doc_stride: int = dataclasses.field(
        default=128, metadata={"help": "context tokens between the starts of two windows"}
    )
    max_answer_tokens: int = dataclasses.field(default=30, metadata={"help": "the longest answer, in tokens"})
    null_threshold: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": 'answer "" where "no answer" outscores the best span by more than this; 0 for SQuAD 2.0; '
            "default: always answer"
        },
    )
    n_best: int = dataclasses.field(default=20, metadata={"help": "candidates per question in a prediction"})
    pointer_dim: int = dataclasses.field(
        default=64, metadata={"help": "size of the head's pointer term; 0 for a head without it"}
    )

    def __post_init__(self) -> None:
        for name, low in (("doc_stride", 1), ("max_answer_tokens", 1), ("n_best", 1), ("pointer_dim", 0)):
            checks.integer(name, getattr(self, name), low)
        if self.null_threshold is not None:
            checks.number("null_threshold", self.null_threshold, "(-inf, inf)")
