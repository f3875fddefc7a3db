"""What is read from a method's states for each kind of set: the loss, and which answers are right.

A label is read from the mean of the last hidden states by a head, a span from every token's. A text is written by the
LM head; it is right if the likeliest token is the next one of the answer after each before it, up to the end token:
that is what greedy decoding would write, found in one pass.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkern.recipes.qa.squad import exact_match, f1
from experiments.quality.methods import Applied
from experiments.quality.sets import Part
from experiments.quality.stream import mean

LONGEST_ANSWER = 12
TEST_BATCH = 64


class Texts:
    """A part's rows as what a suffix reads."""

    def __init__(self, part: Part, stream: np.ndarray | None) -> None:
        self.part, self._stream = part, stream

    def __call__(self, rows: Any, applied: Applied) -> tuple[Tensor, Tensor]:
        """The stream (B, L, d) and the lengths (B,), as long as the longest."""
        lengths = torch.from_numpy(self.part.lengths[rows])
        longest = int(lengths.max())
        if self._stream is not None:
            return torch.from_numpy(self._stream[rows, :longest]), lengths
        return applied.suffix.model.embed_tokens(torch.from_numpy(self.part.ids[rows, :longest]).long()), lengths


class Model:
    """A method, and what reads its states (B, L, d)."""

    def __init__(self, applied: Applied, head: nn.Module) -> None:
        self.applied, self.head = applied, head

    def loss(self, texts: Texts, rows: Any) -> Tensor:
        """Of some rows, to train with."""
        return self._loss(*self._scored(texts, rows)) + self.applied.extra()

    @torch.no_grad()
    def evaluate(self, texts: Texts) -> dict[str, Any]:
        """accuracy (spans and texts: exact match), loss, right (N,) bool, and of spans f1; all from 0 to 1."""
        right: list[bool] = []
        overlap: list[float] = []
        loss, count = 0.0, len(texts.part)
        for start in range(0, count, TEST_BATCH):
            rows = np.arange(start, min(start + TEST_BATCH, count))
            scores, part = self._scored(texts, rows)
            loss += float(self._loss(scores, part)) * len(part)
            of_right, of_overlap = self._judged(scores, part)
            right += of_right
            overlap += of_overlap
        found = {"accuracy": sum(right) / count, "loss": loss / count, "right": np.array(right)}
        return found | ({"f1": sum(overlap) / count} if overlap else {})

    def _scored(self, texts: Texts, rows: Any) -> tuple[Tensor, Part]:
        (x, lengths), part = texts(rows, self.applied), texts.part.take(rows)
        return self._scores(self.applied.hidden(x, lengths), lengths, part), part

    def _scores(self, hidden: Tensor, lengths: Tensor, part: Part) -> Tensor:
        raise NotImplementedError

    def _loss(self, scores: Tensor, part: Part) -> Tensor:
        return F.cross_entropy(scores.flatten(0, scores.dim() - 2), torch.from_numpy(part.targets).flatten())

    def _judged(self, scores: Tensor, part: Part) -> tuple[list[bool], list[float]]:
        """Which texts are right, and of spans their F1."""
        raise NotImplementedError


class Labels(Model):
    """Scores (B, labels) of the mean state."""

    def _scores(self, hidden: Tensor, lengths: Tensor, part: Part) -> Tensor:
        scores: Tensor = self.head(mean(hidden, lengths))
        return scores

    def _judged(self, scores: Tensor, part: Part) -> tuple[list[bool], list[float]]:
        return (scores.argmax(1).numpy() == part.targets).tolist(), []


class Spans(Model):
    """Scores (B, 2, L) of an answer's first and last token, −inf outside the context."""

    def _scores(self, hidden: Tensor, lengths: Tensor, part: Part) -> Tensor:
        at = torch.arange(hidden.shape[1])
        outside = (at >= lengths[:, None]) | (at < torch.from_numpy(part.begins)[:, None])
        scores: Tensor = self.head(hidden).transpose(1, 2)
        return scores.masked_fill(outside[:, None], float("-inf"))

    def _judged(self, scores: Tensor, part: Part) -> tuple[list[bool], list[float]]:
        right, overlap = [], []
        for (context, answer, offsets), begin, span in zip(part.texts, part.begins, best_spans(scores), strict=True):
            first, last = (int(i) - int(begin) for i in span)
            given = context[offsets[first][0] : offsets[last][1]]
            right.append(exact_match(answer, given) == 1)
            overlap.append(f1(answer, given))
        return right, overlap


class Written(Model):
    """Scores (tokens, vocabulary) of each token of the answers, by the LM head from the state before it."""

    def _scores(self, hidden: Tensor, lengths: Tensor, part: Part) -> Tensor:
        scores: Tensor = self.applied.suffix.lm_head(hidden[:, :-1][_of_answers(part)[:, : hidden.shape[1] - 1]])
        return scores

    def _loss(self, scores: Tensor, part: Part) -> Tensor:
        return F.cross_entropy(scores, _tokens(part))

    def _judged(self, scores: Tensor, part: Part) -> tuple[list[bool], list[float]]:
        wrong = scores.argmax(1) != _tokens(part)
        texts = _of_answers(part).nonzero()[:, 0]
        return (torch.zeros(len(part)).index_add(0, texts, wrong.float()) == 0).tolist(), []


MODELS: dict[str, type[Model]] = {"label": Labels, "span": Spans, "text": Written}


def _of_answers(part: Part) -> Tensor:
    """(B, L - 1), whether the next token is one of the answer."""
    at = torch.arange(1, part.ids.shape[1])
    begins, ends = (torch.from_numpy(array)[:, None] for array in (part.begins, part.lengths))
    return (at >= begins) & (at < ends)


def _tokens(part: Part) -> Tensor:
    """The answers' tokens, one after another."""
    return torch.from_numpy(part.ids[:, 1:])[_of_answers(part)].long()


def best_spans(scores: Tensor) -> np.ndarray:
    """The first and last token (B, 2) of the likeliest spans of at most ``LONGEST_ANSWER``, of scores (B, 2, L)."""
    length = scores.shape[-1]
    may = torch.ones(length, length).triu().tril(LONGEST_ANSWER - 1)
    pairs = (scores[:, 0, :, None] + scores[:, 1, None, :]).masked_fill(may == 0, float("-inf"))
    best = pairs.flatten(1).argmax(1)
    return torch.stack([best // length, best % length], 1).numpy()
