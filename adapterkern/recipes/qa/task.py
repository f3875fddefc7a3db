"""Extractive question answering as a task for ``train`` and ``evaluate``.

Starts and ends are two softmaxes over a window's context tokens and "no answer", which is the target of windows that do
not contain the answer.
"""

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from adapterkern import checks
from adapterkern.model.decoder import modes_kept, text_decoder
from adapterkern.model.llama import LlamaAdapter
from adapterkern.model.saving import unloaded_on_error
from adapterkern.recipes.qa.head import SpanHead
from adapterkern.recipes.qa.settings import SpanSettings
from adapterkern.recipes.qa.spans import Prediction, Span, Window, best_spans, cut, predictions
from adapterkern.recipes.qa.squad import question_rows, read_labeled, read_questions, score, unlabeled_questions
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, count_targets, count_tokens
from adapterkern.training.data.examples import UNREAD, Rows, check_vocabulary
from adapterkern.training.data.rows import BadRows, DataError, Row, source_name, warn
from adapterkern.training.data.summary import Summary, summarize
from adapterkern.training.feed import Feed, eval_batches
from adapterkern.training.heads import read_head_config, read_head_weights, write_head
from adapterkern.training.parallel.accelerator import make_accelerator
from adapterkern.training.saved import load_config, load_model, save_run
from adapterkern.training.task import Task


class QuestionAnswering(Task[Window]):
    """Question answering for ``ak.train(model, "train.json", config, ..., task=QuestionAnswering(model))``.

    Data are SQuAD's JSON, JSONL or lists, see squad.py. ``config.max_length`` is a window's length in tokens, question
    included. An evaluation gives ``exact`` and ``f1`` in percent, and ``accuracy``, the share of exact matches.

    Args:
        model: the backbone with its adapters.
        settings: see ``SpanSettings``; later ``span_settings``.
        span: a head to use or train further; by default ``load`` makes one.
    """

    packs = False

    def __init__(self, model: LlamaAdapter, settings: SpanSettings | None = None, span: SpanHead | None = None) -> None:
        super().__init__(model)
        self.span_settings = settings or SpanSettings()
        if span is not None and span.pointer_dim != self.span_settings.pointer_dim:
            raise ValueError(f"span: expected pointer_dim={self.span_settings.pointer_dim}, got {span.pointer_dim}")
        self.span = None if span is None else span.to(model.device)

    @property
    def settings(self) -> dict[str, Any]:
        """What is learned depends on these. How answers are chosen may change when a run is resumed."""
        return {"doc_stride": self.span_settings.doc_stride, "pointer_dim": self.span_settings.pointer_dim}

    # Data

    def load(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> list[Window]:
        """The windows of labeled questions. The first call makes the head where there is none.

        Raises:
            DataError: naming each bad question by file and id, unless ``config.skip_bad_rows``; or if none is left.
            TypeError: the tokenizer is not a fast one.
        """
        windows = self._windows(rows, config, tokenizer, labeled=True)
        if self.span is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.span = SpanHead(self.model.decoder.config.hidden_size, self.span_settings.pointer_dim)
            self.span.to(self.model.device)
        return windows

    def _windows(self, rows: Rows, config: TrainConfig, tokenizer: Any, labeled: bool) -> list[Window]:
        source = source_name(rows)
        bad = BadRows(source)
        questions = (read_labeled if labeled else read_questions)(rows, bad)
        windows = cut(questions, tokenizer, config.max_length, self.span_settings.doc_stride, bad) if questions else []
        bad.settle(config.skip_bad_rows)
        if not windows:
            raise DataError(f"{source}: no questions")
        check_vocabulary(windows, self.model.get_input_embeddings().num_embeddings)
        used = {window.question.id: window.question for window in windows}.values()
        without = sum(question.answers == () for question in used)
        if without and self.span_settings.null_threshold is None:
            warn(
                "%s: %d of %d questions have no answer, but every question is answered, since no null threshold is set",
                source,
                without,
                len(used),
            )
        return windows

    def summaries(self, examples: Sequence[Window], config: TrainConfig) -> dict[str, Summary]:
        """How many questions there are, and windows of their contexts."""
        questions = {window.question.id: window.question for window in examples}.values()
        without = sum(question.answers == () for question in questions)
        counts = {"questions": len(questions), "without an answer": without, "windows": len(examples)}
        found = summarize(examples, config.max_length, counts=counts)
        return {"": dataclasses.replace(found, learned=0, unit="window")}

    def shown(self, example: Window) -> tuple[list[int], str]:
        """The answer's tokens, and the answer."""
        first, last = example.targets.tolist()
        if not first:
            return [], "no answer"
        begin, end = int(example.offsets[first - 1, 0]), int(example.offsets[last - 1, 1])
        return example.positions[first - 1 : last].tolist(), example.question.context[begin:end].strip()

    def collate(self, examples: Sequence[Window], config: TrainConfig) -> Batch:
        """The batch that ``forward`` takes.

        Beside ids and mask (B, L) it has ``targets`` (B, 2), ``positions`` (B, 1 + K) of each window's last token and
        of its context tokens, and ``choices`` (B, 1 + K), false where a row of positions is only filled up.
        """
        batch = super().collate(examples, config)
        mask = batch["attention_mask"]
        counts = torch.tensor([len(window.positions) for window in examples])
        context = pad_sequence([torch.from_numpy(window.positions) for window in examples], batch_first=True)
        inside = torch.arange(context.shape[1]) < counts[:, None]
        if config.padding_side == "left":
            context = torch.where(inside, context + (mask.shape[1] - mask.sum(1, keepdim=True)), 0)
        last = mask.cumsum(1).argmax(1, keepdim=True)
        return batch | {
            "targets": batch["targets"].view(len(examples), 2),
            "positions": torch.cat([last, context], dim=1),
            "choices": torch.cat([torch.ones_like(last, dtype=torch.bool), inside], dim=1),
        }

    # Training

    def trained(self, config: TrainConfig) -> dict[str, nn.Parameter]:
        """The adapter's parameters and the span head's."""
        return super().trained(config) | {f"head.{name}": p for name, p in self._span_head.named_parameters()}

    @property
    def _span_head(self) -> SpanHead:
        if self.span is None:
            raise ValueError("span: expected a head, got none: load training data first, or use from_pretrained")
        return self.span

    # A forward

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of starts and ends, and the scores (B, 1 + K, 2), −∞ where there is no choice.

        ``evaluate`` and ``predict`` read the scores; they are not summed over batches.
        """
        states = hidden.gather(1, batch["positions"][..., None].expand(-1, -1, hidden.shape[-1]))
        scores = self._span_head(states[:, 1:], states[:, 0]).masked_fill(~batch["choices"][..., None], -math.inf)
        by_side = scores.transpose(1, 2).flatten(0, 1).float()
        return F.cross_entropy(by_side, batch["targets"].flatten(), reduction="sum"), scores

    def predict(self, batch: Batch) -> list[list[Span]]:
        """The best spans of each window, best first; ``answer`` makes texts of them."""
        return self._best(self(batch)[1], batch)

    def _best(self, scores: Tensor, batch: Batch) -> list[list[Span]]:
        tables, counts = scores.float().cpu().numpy(), batch["choices"].sum(1).tolist()
        n_best, longest = self.span_settings.n_best, self.span_settings.max_answer_tokens
        return [list(best_spans(table[:count], n_best, longest)) for table, count in zip(tables, counts, strict=True)]

    # Answers

    @staticmethod
    def rows_to_predict(data: Rows, bad: BadRows) -> Iterator[Row]:
        return question_rows(data, bad)

    @classmethod
    def to_predict(
        cls, rows: list[Row], config: TrainConfig, tokenizer: Any, bad: BadRows, **of_task: Any
    ) -> list[list[Window]]:
        """The windows of each row's question. Its answers are not read."""
        questions = unlabeled_questions(rows, bad)
        made: list[list[Window]] = [[] for _ in rows]
        known = [question for question in questions if question is not None]
        if known and tokenizer is not UNREAD:
            for window in cut(known, tokenizer, config.max_length, of_task["doc_stride"], bad):
                made[int(window.question.id)].append(window)
        return made

    def predicts(self) -> dict[str, Any]:
        return {"doc_stride": self.span_settings.doc_stride}

    def joined(self, examples: Sequence[Window], found: Sequence[Any]) -> Prediction:
        """The answer, from the best spans of the question's windows."""
        return predictions(examples, found, self.span_settings)[examples[0].question.id]

    def evaluate(self, run: nn.Module, examples: Sequence[Window], feed: Feed, config: TrainConfig) -> dict[str, float]:
        """``loss`` (nats per start or end), ``exact`` and ``f1`` in percent, ``accuracy``, the share of exact matches.

        Every rank runs all batches.
        """
        started = time.perf_counter()
        batches = eval_batches(examples, config)
        losses, spans = [], []
        for windows in batches:
            batch = feed(windows)
            loss, scores = run(batch)
            losses.append(loss.double())
            spans += self._best(scores, batch)
        found = predictions([window for windows in batches for window in windows], spans, self.span_settings)
        questions = {window.question.id: window.question for window in examples}.values()
        metrics = score(questions, {id_: prediction.text for id_, prediction in found.items()})
        targets = count_targets(examples)
        loss_sum = torch.stack(losses).sum().item()
        seconds = time.perf_counter() - started
        return {
            "loss": loss_sum / targets,
            "accuracy": metrics["exact"] / 100,
            **metrics,
            "targets": targets,
            "seconds": seconds,
            "tokens_per_second": count_tokens(examples) / seconds,
        }

    def answer(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> dict[str, Prediction]:
        """The answer to each question, labeled or not, by its id; in the order of the rows. Raises as ``load``."""
        windows = self._windows(rows, config, tokenizer, labeled=False)
        batches, feed = eval_batches(windows, config), Feed(self, config, None)
        accelerator = make_accelerator(config.precision, self.model.device)
        with self.running(config), modes_kept(self), torch.no_grad(), accelerator.autocast():
            self.eval()
            spans = [found for batch in batches for found in self.predict(feed(batch))]
        found = predictions([window for batch in batches for window in batch], spans, self.span_settings)
        return {id_: found[id_] for id_ in dict.fromkeys(window.question.id for window in windows)}

    # Files

    def save(self, directory: Path, config: TrainConfig) -> None:
        """The adapter, ``task.json``, and the span head with its settings as head files."""
        save_run(directory, self.model, None, config, kind=self.kind)
        span = self._span_head
        fields = {"hidden_size": span.hidden_size, "settings": dataclasses.asdict(self.span_settings)}
        write_head(directory, "span", span, fields)

    @classmethod
    def from_pretrained(
        cls, llama: Any, directory: str | os.PathLike[str], *, fused: bool = True, liger: bool = False
    ) -> tuple[Self, TrainConfig]:
        """The task of a saved run or checkpoint on ``llama``, and its configuration, for ``evaluate`` and ``answer``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: one is damaged or does not fit; the message names it.
        """
        config = load_config(directory)
        path, saved = read_head_config(Path(directory), "span", {"hidden_size": int, "settings": dict})
        if saved["hidden_size"] != text_decoder(llama).config.hidden_size:
            expected = f"expected the model's {text_decoder(llama).config.hidden_size}"
            raise ValueError(f"{path}: field 'hidden_size': {expected}, got {saved['hidden_size']}")
        try:
            settings = checks.fields(SpanSettings, saved["settings"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: field 'settings': {error}") from error
        try:
            with torch.device("meta"):  # the weights replace these
                span = SpanHead(saved["hidden_size"], settings.pointer_dim)
        except (TypeError, RuntimeError) as error:  # torch's, of sizes that no tensor has
            raise ValueError(f"{path}: field 'settings': pointer_dim: {error}") from error
        read_head_weights(Path(directory), span, saved)
        with unloaded_on_error(load_model(llama, directory, config, fused=fused, liger=liger)) as model:
            return cls(model, settings, span), config
