"""Extractive question answering: a span head over a context's tokens, as a task for ``train`` and ``evaluate``.

    start_i = w_s·h_i + ⟨Q_s h_z, K_s h_i⟩/√p        end_i = w_e·h_i + ⟨Q_e h_z, K_e h_i⟩/√p        none = v·h_z

h_i is the last hidden state of context token i, and h_z that of the window's last token. The first term alone is the
head that encoders use. A causal backbone needs the second: the state of a context token knows nothing of what follows
it (of an answer's first token, neither the rest of the answer nor the words after it), and the last token alone has
read everything; its state asks, and the tokens' states reply. For the same reason "no answer" is scored at the last
token, and not, as encoders do, at the first, whose state here is one constant vector.

Starts and ends are two softmaxes over the window's context tokens and "no answer", which is the target of windows that
do not hold the answer. The head computes in fp32 also under autocast.
"""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.qa.spans import Window, best_spans, cut
from adapterkern.recipes.qa.squad import Question, read_questions, score
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Rows, check_vocabulary, count_targets, count_tokens
from adapterkern.training.data.rows import BadRows, DataError, source_name
from adapterkern.training.heads import read_head_config, read_head_weights, write_head
from adapterkern.training.parallel.accelerator import left_as_found, make_accelerator
from adapterkern.training.saved import save_task
from adapterkern.training.task import Feed, Inputs, Task, eval_batches

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanSettings:
    """How contexts are cut and answers chosen; saved with the head. ``ValueError`` names what is out of range.

    Args:
        doc_stride: context tokens from a window's first to the next window's first.
        max_answer_tokens: answers are at most so long.
        null_threshold: answer with nothing where "no answer" outscores the best span by more than this; None: never.
        n_best: how many answers a prediction lists.
        pointer_dim: p; 0 leaves the second term out.
    """

    doc_stride: int = 128
    max_answer_tokens: int = 30
    null_threshold: float | None = None
    n_best: int = 20
    pointer_dim: int = 64

    def __post_init__(self) -> None:
        for name, low in (("doc_stride", 1), ("max_answer_tokens", 1), ("n_best", 1), ("pointer_dim", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name}: expected a whole number from {low} on, got {value!r}")
        threshold = self.null_threshold
        if threshold is not None and (type(threshold) not in (int, float) or not math.isfinite(threshold)):
            raise ValueError(f"null_threshold: expected a finite number or None, got {threshold!r}")


class SpanHead(nn.Module):
    """Start and end scores of tokens, see the module's docstring; ``pointer_dim`` is p, and 0 leaves its term out."""

    def __init__(self, hidden_size: int, pointer_dim: int = 64) -> None:
        super().__init__()
        self.hidden_size, self.pointer_dim = hidden_size, pointer_dim
        self.token = nn.Linear(hidden_size, 2, bias=False)
        self.none = nn.Linear(hidden_size, 2)
        if pointer_dim:
            self.key = nn.Linear(hidden_size, 2 * pointer_dim, bias=False)
            self.query = nn.Linear(hidden_size, 2 * pointer_dim, bias=False)

    def forward(self, tokens: Tensor, last: Tensor) -> Tensor:
        """States of the tokens (B, K, d) and of each window's last token (B, d) → scores (B, 1 + K, 2) in fp32.

        Row 0 is "no answer", row i + 1 token i; column 0 is the start, column 1 the end.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            dtype = self.token.weight.dtype  # bf16 under DeepSpeed
            tokens, last = tokens.to(dtype), last.to(dtype)
            scores = self.token(tokens)
            if self.pointer_dim:
                key = self.key(tokens).unflatten(-1, (2, self.pointer_dim))
                query = self.query(last).unflatten(-1, (2, self.pointer_dim))
                scores = scores + torch.einsum("bkcp,bcp->bkc", key, query) / math.sqrt(self.pointer_dim)
            return torch.cat([self.none(last)[:, None], scores], dim=1).float()


class Candidate(NamedTuple):
    """A possible answer: ``context[start:end]``, and its log-odds against "no answer" in its window."""

    text: str
    start: int
    end: int
    score: float


class Prediction(NamedTuple):
    """What is answered, "" for nothing, and the best different candidates, best first."""

    text: str
    candidates: list[Candidate]


class QuestionAnswering(Task):
    """Question answering for ``ak.train(model, "train.json", config, ..., task=QuestionAnswering(model))``.

    Data are SQuAD's JSON, JSONL or lists, see :mod:`adapterkern.training.squad`. ``config.max_length`` is a window's
    length, question included. The evaluation's metrics are ``exact`` and ``f1`` in percent, and ``accuracy``, the share
    of exact matches.

    Args:
        model: the backbone with its adapters.
        settings: see :class:`SpanSettings`.
        span: a head to use or train further; by default :meth:`load` makes one.
    """

    def __init__(self, model: LlamaAdapter, settings: SpanSettings | None = None, span: SpanHead | None = None) -> None:
        super().__init__(model)
        self.settings = settings or SpanSettings()
        if span is not None and span.pointer_dim != self.settings.pointer_dim:
            raise ValueError(f"span: expected pointer_dim={self.settings.pointer_dim}, got {span.pointer_dim}")
        self.span = None if span is None else span.to(model.device)
        self._questions: dict[int, Question] = {}  # by key
        self._offsets: dict[str, np.ndarray] = {}  # (c, 2) characters of a context's tokens

    # Windows

    def load(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> list[Any]:
        """The windows of labelled questions. Raises :class:`DataError` by file and id, as :func:`read_questions`."""
        windows = self._windows(rows, config, tokenizer, labelled=True)
        if self.span is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.span = SpanHead(self.model.config.hidden_size, self.settings.pointer_dim)
            self.span.to(self.model.device)
        return windows

    def _windows(self, rows: Rows, config: TrainConfig, tokenizer: Any, labelled: bool) -> list[Window]:
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(f"tokenizer: expected a fast one, which knows offsets, got {type(tokenizer).__name__}")
        bad = BadRows(source_name(rows))
        questions = read_questions(rows, bad)
        for question in questions:
            if labelled and question.answers is None:
                bad.add(question.place, "field 'answers' is missing")
        questions = [question for question in questions if not labelled or question.answers is not None]
        made = cut(questions, tokenizer, config.max_length, self.settings.doc_stride, bad) if questions else None
        bad.settle(config.skip_bad_rows)
        if made is None or not made.windows:
            raise DataError(f"{source_name(rows)}: no questions")
        check_vocabulary(made.windows, self.model.decoder.embed_tokens.num_embeddings)  # type: ignore[arg-type]
        unanswerable = sum(question.answers == () for question in made.questions.values())
        if unanswerable and self.settings.null_threshold is None:
            logger.warning(
                "%s: %d of %d questions have no answer, and with null_threshold=None none is left unanswered",
                source_name(rows),
                unanswerable,
                len(made.questions),
            )
        self._questions |= made.questions
        self._offsets |= made.offsets
        return made.windows

    # Batches

    def collate(self, examples: Sequence[Any], config: TrainConfig) -> Inputs:
        """Beside ids and mask (B, L): ``targets`` (B, 2), ``positions`` (B, 1 + K) of each window's last token and its
        context's tokens, and ``choices`` (B, 1 + K), false where a row of positions is only filled up.
        """
        inputs = super().collate(examples, config)
        mask = inputs["attention_mask"]
        assert mask is not None
        counts = torch.tensor([int(window.positions[1]) for window in examples])
        first = torch.tensor([int(window.positions[0]) for window in examples])
        if config.padding_side == "left":
            first += mask.shape[1] - mask.sum(1)
        ranks = torch.arange(int(counts.max()))
        inside = ranks < counts[:, None]
        last = mask.cumsum(1).argmax(1, keepdim=True)
        inputs["positions"] = torch.cat([last, torch.where(inside, first[:, None] + ranks, 0)], dim=1)
        inputs["choices"] = torch.cat([torch.ones_like(last, dtype=torch.bool), inside], dim=1)
        inputs["targets"] = torch.from_numpy(np.stack([window.targets for window in examples]))
        return inputs

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        positions: Tensor,
        choices: Tensor,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of starts and ends, and the scores (B, 1 + K, 2), −∞ where there is no choice."""
        assert self.span is not None
        hidden = self.hidden(input_ids, attention_mask, prefix)
        states = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        scores = self.span(states[:, 1:], states[:, 0]).masked_fill(~choices[..., None], -math.inf)
        return F.cross_entropy(scores.transpose(1, 2).flatten(0, 1).float(), targets.flatten(), reduction="sum"), scores

    def trained(self, config: TrainConfig) -> dict[str, nn.Parameter]:
        """The adapter's parameters and the span head's."""
        assert self.span is not None
        return super().trained(config) | {f"head.{name}": p for name, p in self.span.named_parameters()}

    # Answers

    def evaluate(self, run: nn.Module, examples: Sequence[Any], feed: Feed, config: TrainConfig) -> dict[str, float]:
        """``loss`` (nats a start or end), ``exact`` and ``f1`` in percent, ``accuracy``, the share of exact matches."""
        started = time.perf_counter()
        loss, predictions = self._answer(run, examples, feed, config)
        questions = [self._questions[key] for key in dict.fromkeys(int(w.source[0]) for w in examples)]
        scores = score(questions, {id_: prediction.text for id_, prediction in predictions.items()})
        targets = count_targets(examples)
        seconds = time.perf_counter() - started
        return {
            "loss": loss / targets,
            "accuracy": scores["exact"] / 100,
            **scores,
            "targets": targets,
            "seconds": seconds,
            "tokens_per_second": count_tokens(examples) / seconds,
        }

    def predict(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> dict[str, Prediction]:
        """An answer to each question, labelled or not, by its id."""
        windows = self._windows(rows, config, tokenizer, labelled=False)
        accelerator = make_accelerator(config.precision, self.model.device)
        with self.running(config), left_as_found(self), torch.no_grad():
            run = accelerator.prepare_model(self.eval(), evaluation_mode=True)
            return self._answer(run, windows, Feed(self, config, None), config)[1]

    def _answer(
        self, run: nn.Module, windows: Sequence[Any], feed: Feed, config: TrainConfig
    ) -> tuple[float, dict[str, Prediction]]:
        """The summed loss over all windows, and a prediction by question id."""
        settings = self.settings
        losses = []
        found: dict[int, dict[str, Candidate]] = {int(window.source[0]): {} for window in windows}
        batches: Any = eval_batches(windows, config)  # of windows, though it says Example
        for batch in batches:
            loss, scores = run(**feed(batch))
            losses.append(loss.double())
            for window, table in zip(batch, scores.float().cpu().numpy(), strict=True):
                key, start = window.source.tolist()
                question, best = self._questions[key], found[key]
                offsets = self._offsets[question.context][start:]
                for span in best_spans(
                    table[: 1 + int(window.positions[1])], settings.n_best, settings.max_answer_tokens
                ):
                    begin, end = int(offsets[span.first, 0]), int(offsets[span.last, 1])
                    text = question.context[begin:end].strip()
                    if text and (text not in best or best[text].score < span.score):
                        best[text] = Candidate(text, begin, end, span.score)
        predictions = {}
        for key, best in found.items():
            candidates = sorted(best.values(), key=lambda c: (-c.score, c.start, c.end))[: settings.n_best]
            silent = settings.null_threshold is not None and bool(candidates)
            silent = silent and -candidates[0].score > settings.null_threshold  # type: ignore[operator]
            text = candidates[0].text if candidates and not silent else ""
            predictions[self._questions[key].id] = Prediction(text, candidates)
        return torch.stack(losses).sum().item(), predictions

    # Files

    def save(self, directory: Path, config: TrainConfig) -> None:
        """The adapter, ``task.json``, and the span head with its settings as head files."""
        assert self.span is not None
        save_task(directory, self.model, None, config)
        fields = {"hidden_size": self.span.hidden_size, "settings": dataclasses.asdict(self.settings)}
        write_head(directory, "span", self.span, fields)

    @classmethod
    def from_pretrained(cls, model: LlamaAdapter, directory: str | os.PathLike[str]) -> "QuestionAnswering":
        """The task with the head saved in ``directory``, over ``model``, whose adapter it does not touch.

        Raises:
            FileNotFoundError: a file is missing. ValueError: one is damaged or does not fit; the message names it.
        """
        path, config = read_head_config(Path(directory), "span", {"hidden_size": int, "settings": dict})
        if config["hidden_size"] != model.config.hidden_size:
            raise ValueError(f"{path}: hidden_size is {config['hidden_size']}, the model's {model.config.hidden_size}")
        try:
            settings = SpanSettings(**config["settings"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: field 'settings': {error}") from error
        span = SpanHead(config["hidden_size"], settings.pointer_dim)
        read_head_weights(Path(directory), span, config)
        return cls(model, settings, span)


def texts(predictions: Mapping[str, Prediction]) -> dict[str, str]:
    """``{id: answer}``, what the official script reads."""
    return {id_: prediction.text for id_, prediction in predictions.items()}
