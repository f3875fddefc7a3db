"""Token windows over contexts, and answers as spans of tokens: from character offsets to tokens, and from scores back.

A window is ``Question: … Context: … Answer:`` with as much of the context as fits. The question comes first and the
final word last because the backbone is causal: a token's state knows nothing of what follows it, so the context's
tokens could not know a question that came after them, and only the last token has seen everything. A context that does
not fit is read through windows that overlap.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from adapterkern.recipes.qa.squad import Answer, Question
from adapterkern.training.data.rows import BadRows

PROMPT = "Question: {question}\nContext:\n"
CLOSING = "\nAnswer:"


class Window(NamedTuple):
    """A part of a context, with its question: an example of the training loop's."""

    input_ids: np.ndarray  # (n,) int64
    targets: np.ndarray  # (2,) first and last token of the answer among the window's choices: 0 is none, i + 1 token i
    positions: np.ndarray  # (2,) where the context's tokens begin in input_ids, and how many they are
    source: np.ndarray  # (2,) the question's key, and the context's token that the window begins with


class Cut(NamedTuple):
    """Questions as windows, and what leads from a window's tokens back to a text."""

    windows: list[Window]
    questions: dict[int, Question]  # by key
    offsets: dict[str, np.ndarray]  # (c, 2): the characters [begin, end) of each token of a context


def cut(questions: list[Question], tokenizer: Any, max_length: int, stride: int, bad: BadRows) -> Cut:
    """The windows, of at most ``max_length`` tokens, of questions. Those that cannot be cut go to ``bad``.

    ``tokenizer`` is a fast one of transformers. A window's target is the first gold answer that is whole in it.
    """
    contexts = list(dict.fromkeys(question.context for question in questions))
    encoded = tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids_of = dict(zip(contexts, encoded["input_ids"], strict=True))
    offsets = {
        context: np.array(pairs, dtype=np.int64).reshape(-1, 2)
        for context, pairs in zip(contexts, encoded["offset_mapping"], strict=True)
    }
    prompts = tokenizer([PROMPT.format(question=q.question) for q in questions], add_special_tokens=False)["input_ids"]
    closing = tokenizer(CLOSING, add_special_tokens=False)["input_ids"]
    begin = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    result = Cut([], {}, offsets)
    for question, prompt in zip(questions, prompts, strict=True):
        ids, head = ids_of[question.context], [*begin, *prompt]
        room = max_length - len(head) - len(closing)
        answers = [tokens_of(answer, offsets[question.context]) for answer in question.answers or ()]
        if room < 1:
            bad.add(question.place, f"field 'question': its {len(prompt)} tokens leave none of max_length={max_length}")
        elif not ids or None in answers:
            bad.add(question.place, f"field '{'answers' if ids else 'context'}': the tokenizer makes no token of it")
        else:
            key = _key(question)
            windows = []
            for start in window_starts(len(ids), room, stride):
                part = ids[start : start + room]
                inside = [a for a in answers if a is not None and start <= a[0] and a[1] < start + len(part)]
                target = [token - start + 1 for token in inside[0]] if inside else [0, 0]
                fields = [*head, *part, *closing], target, [len(head), len(part)], [key, start]
                windows.append(Window(*(np.array(values, dtype=np.int64) for values in fields)))
            if answers and not any(window.targets.any() for window in windows):
                always = room - min(stride, room) + 1
                bad.add(question.place, f"field 'answers': in no window as a whole; up to {always} tokens always are")
            else:
                result.questions[key] = question
                result.windows.extend(windows)
    return result


def _key(question: Question) -> int:
    """A number that depends on the question alone, so that data have one fingerprint whatever was loaded before."""
    return int.from_bytes(hashlib.blake2b(repr(question[:4]).encode(), digest_size=7).digest(), "little")


class Span(NamedTuple):
    """A run of tokens, ends included, and its score."""

    score: float
    first: int
    last: int


def window_starts(tokens: int, room: int, stride: int) -> list[int]:
    """The context's tokens that windows of ``room`` tokens begin with: every ``stride``, until the end is reached.

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


def best_spans(scores: np.ndarray, count: int, longest: int) -> Iterator[Span]:
    """The ``count`` best spans of at most ``longest`` tokens, best first, of one window; exactly, not by a beam.

    ``scores``, (1 + k, 2), has the start and end scores of "no answer" and of the window's k context tokens. A span's
    score is its start's and its end's less those of "no answer". A softmax knows differences within a window only, so
    this is the number by which spans of different windows compare: the log-odds of the span against no answer here.
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
