"""From questions to windows of tokens, and from spans of tokens back to answers.

A window is ``Question: … Context: … Answer:`` with as much of the context as fits. The backbone is causal: a token's
state knows nothing of what follows it. So the question comes first, or the context's tokens would not know it, and the
closing word comes last, since only the last token has seen everything. A context that does not fit is read through
windows that overlap.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from adapterkern.recipes.qa.settings import SpanSettings
from adapterkern.recipes.qa.squad import Answer, Question
from adapterkern.training.data.examples import Example
from adapterkern.training.data.rows import BadRows

PROMPT = "Question: {question}\nContext:\n"
CLOSING = "\nAnswer:"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Window(Example):
    """Part of a context, with its question.

    ``positions`` (k,) are those of the window's k context tokens in ``input_ids``. ``targets`` (2,) are the answer's
    first and last token among the window's 1 + k choices: 0 is "no answer", i + 1 is context token i.
    """

    question: Question
    start: int  # the number of the window's first context token in its context
    offsets: np.ndarray  # (k, 2): the characters [begin, end) of the context that each of its tokens covers

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the fingerprint covers, in the form of version 0.1: checkpoints keep it."""
        place = np.array([self.positions[0], len(self.positions)])
        return self.input_ids, self.targets, place, np.array([_digest(self.question), self.start])

    def text(self) -> bytes:
        """The context: what is learned of one question helps to answer another about it."""
        return self.question.context.encode()


def _digest(question: Question) -> int:
    """A number that depends on the question alone."""
    return int.from_bytes(hashlib.blake2b(repr(question[:4]).encode(), digest_size=7).digest(), "little")


def cut(questions: Sequence[Question], tokenizer: Any, max_length: int, stride: int, bad: BadRows) -> list[Window]:
    """The windows of the questions, each of at most ``max_length`` tokens. Questions that cannot be cut go to ``bad``.

    ``tokenizer`` is a fast one of transformers, or ``TypeError`` is raised. A window's target is the first gold answer
    that it contains whole.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer: expected a fast one, which gives offsets, got {type(tokenizer).__name__}")
    contexts = list(dict.fromkeys(question.context for question in questions))
    encoded = tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids_of = dict(zip(contexts, encoded["input_ids"], strict=True))
    offsets_of = {
        context: np.array(pairs, dtype=np.int64).reshape(-1, 2)
        for context, pairs in zip(contexts, encoded["offset_mapping"], strict=True)
    }
    prompts = tokenizer([PROMPT.format(question=q.question) for q in questions], add_special_tokens=False)["input_ids"]
    closing = tokenizer(CLOSING, add_special_tokens=False)["input_ids"]
    begin = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    made = []
    for question, prompt in zip(questions, prompts, strict=True):
        ids, offsets, head = ids_of[question.context], offsets_of[question.context], [*begin, *prompt]
        room = max_length - len(head) - len(closing)
        answers = [tokens_of(answer, offsets) for answer in question.answers or ()]
        if room < 1:
            bad.add(
                question.place,
                f"field 'question': its {len(prompt)} tokens leave no room for the context in max_length={max_length}",
            )
        elif not ids or None in answers:
            bad.add(question.place, f"field '{'answers' if ids else 'context'}': the tokenizer gives no token for it")
        else:
            windows = []
            for start in window_starts(len(ids), room, stride):
                part = ids[start : start + room]
                inside = [a for a in answers if a is not None and start <= a[0] and a[1] < start + len(part)]
                target = [token - start + 1 for token in inside[0]] if inside else [0, 0]
                tokens = np.array([*head, *part, *closing], dtype=np.int64)
                positions = np.arange(len(head), len(head) + len(part))
                own = offsets[start : start + len(part)]
                windows.append(Window(tokens, np.array(target), positions, question, start, own))
            if answers and not any(window.targets.any() for window in windows):
                always = room - min(stride, room) + 1
                bad.add(
                    question.place,
                    f"field 'answers': no window contains one whole; answers of up to {always} tokens always fit",
                )
            else:
                made += windows
    return made


def window_starts(tokens: int, room: int, stride: int) -> list[int]:
    """The context's tokens at which windows of ``room`` tokens begin: every ``stride``, until the end is reached.

    Every token is in a window, and every run of at most ``room − min(stride, room) + 1`` tokens is whole in one.
    """
    starts = [0]
    while starts[-1] + room < tokens:
        starts.append(starts[-1] + min(stride, room))
    return starts


def tokens_of(answer: Answer, offsets: np.ndarray) -> tuple[int, int] | None:
    """The first and last token that share a character with the answer, or None if no token does.

    ``offsets``, (c, 2), are the characters [begin, end) of each token. Whitespace at the answer's ends does not count.
    """
    start = answer.start + len(answer.text) - len(answer.text.lstrip())
    end = answer.start + len(answer.text.rstrip())
    begins, ends = offsets[:, 0], offsets[:, 1]
    shared = np.flatnonzero((ends > start) & (begins < end) & (ends > begins))
    return None if len(shared) == 0 else (int(shared[0]), int(shared[-1]))


class Span(NamedTuple):
    """A run of a window's context tokens, both ends included, and its score."""

    score: float
    first: int
    last: int


def best_spans(scores: np.ndarray, count: int, longest: int) -> Iterator[Span]:
    """The ``count`` best spans of at most ``longest`` tokens of one window, best first. The search is exact.

    ``scores``, (1 + k, 2), has the start and end scores of "no answer" and of the window's k context tokens. A span's
    score is its start's plus its end's, less those of "no answer": the log-odds of the span against no answer in this
    window. A softmax compares only what is in one window, so this is the number by which spans of different windows
    compare.
    """
    null = float(scores[0].sum())
    starts, ends = scores[1:, 0].astype(np.float64), scores[1:, 1].astype(np.float64)
    width = min(longest, len(starts))
    padded = np.concatenate([ends, np.full(width - 1, -np.inf)])
    table = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)  # [first, tokens − 1]
    flat = table.ravel()
    count = min(count, len(starts) * width - width * (width - 1) // 2)
    chosen = np.argpartition(-flat, count - 1)[:count]
    for place in chosen[np.lexsort((chosen, -flat[chosen]))]:
        first, more = divmod(int(place), width)
        yield Span(float(flat[place]) - null, first, first + more)


class Candidate(NamedTuple):
    """A possible answer: ``context[start:end]``, and its log-odds against "no answer" in its window."""

    text: str
    start: int
    end: int
    score: float


class Prediction(NamedTuple):
    """The answer, "" for none, and the best candidates with different texts, best first."""

    text: str
    candidates: list[Candidate]

    def columns(self) -> dict[str, Any]:
        """What a table of predictions has of it: the answer, and the log-odds of the best span against no answer."""
        return {"prediction": self.text, "score": self.candidates[0].score if self.candidates else None}


def predictions(
    windows: Sequence[Window], spans: Iterable[Sequence[Span]], settings: SpanSettings
) -> dict[str, Prediction]:
    """The prediction for each question, by its id, from the best spans of each of its windows.

    Args:
        windows: all windows of the questions, in any order.
        spans: those of each window, in the same order.
    """
    found: dict[str, dict[str, Candidate]] = {}
    for window, of_window in zip(windows, spans, strict=True):
        best = found.setdefault(window.question.id, {})
        for span in of_window:
            begin, end = int(window.offsets[span.first, 0]), int(window.offsets[span.last, 1])
            text = window.question.context[begin:end].strip()
            if text and (text not in best or best[text].score < span.score):
                best[text] = Candidate(text, begin, end, span.score)
    return {id_: _choose(best.values(), settings) for id_, best in found.items()}


def _choose(candidates: Iterable[Candidate], settings: SpanSettings) -> Prediction:
    best = sorted(candidates, key=lambda c: (-c.score, c.start, c.end))[: settings.n_best]
    threshold = settings.null_threshold
    if not best or (threshold is not None and -best[0].score > threshold):
        return Prediction("", best)
    return Prediction(best[0].text, best)
