"""What is learned: how rows become examples, how a batch becomes a loss, what is trained, scored and saved.

``Task`` is what a head learns of labeled texts, which ``TrainConfig.task`` chooses and which knows its own loss, scores
and predictions; or next-token prediction with the backbone's own LM head.
Another kind of training is a subclass, generic in its example, passed as ``train(..., task=...)``. The loop, the prefix
cache, the checkpoints and the evaluation call only these methods:

    data       load: rows → examples          collate: examples → batch          order: the rows of an epoch
               summaries: what the examples are, which a run says before it begins
    before     prepare: what is computed once
    a step     reread, step_examples, begin_step, then forward(batch) = loss(hidden(batch), batch), then the optimizer
    scores     evaluate: examples → metrics              behaviors: texts → hidden states, see drift.py
    answers    to_predict: rows → examples    predict: batch → predictions       joined: those of a row's examples
    files      save, from_pretrained; a resumed run must have the same ``settings``
"""

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from adapterkern.model import liger
from adapterkern.model.config import MODULES
from adapterkern.model.files.folder import ADAPTER_FILES
from adapterkern.model.files.owner import writing
from adapterkern.model.llama import LlamaAdapter
from adapterkern.model.logits import check_lm_head
from adapterkern.model.saving import unloaded_on_error
from adapterkern.optim import ClippedAdamW
from adapterkern.training.config import TrainConfig
from adapterkern.training.data import batches, packing
from adapterkern.training.data.batches import Batch
from adapterkern.training.data.examples import (
    E,
    Example,
    Rows,
    check_targets,
    check_vocabulary,
    load_examples,
    unlabeled,
)
from adapterkern.training.data.prefix import Context
from adapterkern.training.data.rows import BadRows, Row, iter_rows
from adapterkern.training.data.summary import Summary, summarize
from adapterkern.training.data.targets import TARGETS
from adapterkern.training.feed import Bar, Feed, sums_over
from adapterkern.training.head_kinds import HEADS
from adapterkern.training.heads import HEAD_CONFIG, HEAD_WEIGHTS, Head, gathered, scored, scores_kept
from adapterkern.training.losses import TrainingLoss
from adapterkern.training.optimization import make_optimizer
from adapterkern.training.saved import load_model, load_run, save_run

logger = logging.getLogger(__name__)


def _owning(save: Any) -> Any:
    """``save``, inside of which an adapter may be saved over the one that an earlier call has saved."""

    @functools.wraps(save)
    def saving(self: Any, directory: Any, *args: Any, **kwargs: Any) -> Any:
        with writing(directory):
            return save(self, directory, *args, **kwargs)

    return saving


class Task(nn.Module, Generic[E]):
    """Backbone, adapters and head as one module from a batch to its loss; accelerate prepares it, each step calls it.

    Args:
        model: the backbone with its adapters.
        head: of the kind that the task needs; None for causal-lm, and until ``load`` knows the labels.

    Attributes:
        files: the files and folders that ``save`` may write.
        uniform: every training forward runs the same modules equally often; DeepSpeed requires it.
        trains_all: every training forward gives every trained parameter a gradient, possibly 0. If False, DDP searches
            for unused parameters.
        packs: a row of a batch may hold several texts (``TrainConfig.packing``): nothing is read of a row as a whole.
    """

    files: ClassVar[tuple[str, ...]] = (*ADAPTER_FILES, HEAD_WEIGHTS, HEAD_CONFIG)
    uniform = trains_all = packs = True

    def __init__(self, model: LlamaAdapter, head: Head | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.training_loss = TrainingLoss()  # of a run; a task whose ``loss`` is its own does not read it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.save = _owning(cls.save)  # type: ignore[method-assign]

    @property
    def kind(self) -> str:
        """The name of the task's class, for checkpoints and ``task.json``."""
        # FSDP2 replaces the class by a subclass of its own.
        return next(c.__name__ for c in type(self).__mro__ if not issubclass(c, FSDPModule))

    @property
    def backbones(self) -> list[Any]:
        """The transformers models that run on the task's batches."""
        return [self.model.base]

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values that a run's numbers depend on besides its ``TrainConfig``."""
        return {}

    def settings_in(self, directory: Path) -> dict[str, Any] | None:
        """The ``settings`` in the task's own files of a checkpoint of 0.1.0, which holds them there alone."""
        return None

    @classmethod
    def check_config(cls, config: TrainConfig) -> None:
        """Raise ``ValueError`` for a setting that this kind of training does not have."""
        if config.packing and not cls.packs:
            raise ValueError(f"packing: expected False for {cls.__name__}, which reads a row as one text, got True")

    # Data

    def load(self, rows: Any, config: TrainConfig, tokenizer: Any) -> list[E]:
        """Examples of ``rows``, as ``load_examples`` reads them.

        The first call is with the training rows and makes the head if there is none.
        """
        self.check_head(config)
        labels, plain = None if self.head is None else self.head.labels, type(self) is Task
        examples, names = load_examples(rows, config, tokenizer, labels, named=plain)
        check_vocabulary(examples, self.model.get_input_embeddings().num_embeddings)
        if not config.labeled:
            if self.head is not None:
                raise ValueError("head: expected None for causal-lm, which uses the backbone's LM head, got one")
            check_targets(examples, self.model.get_input_embeddings().num_embeddings)
            check_lm_head(self.model)
        elif self.head is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                targets = [example.targets for example in examples]
                width = self.model.decoder.config.hidden_size
                self.head = HEADS[config.task].of_data(width, names, targets, config.pooling)
            self.head.to(self.model.device)
        return cast("list[E]", examples)  # a subclass with another E overrides `load`

    def check_head(self, config: TrainConfig) -> None:
        """Raise ``ValueError`` for a head of another kind than the task's."""
        if config.labeled and self.head is not None and self.head.task != config.task:
            raise ValueError(f"head: expected one for task {config.task!r}, got one for {self.head.task!r}")

    def collate(self, examples: Sequence[E], config: TrainConfig) -> Batch:
        """The batch for ``forward``, on the CPU; with ``config.packing`` that of packing.py."""
        return packing.pack(examples, config) if config.packing else batches.collate(examples, config)

    def order(self, examples: Sequence[E], config: TrainConfig, epoch: int) -> list[int]:
        """An epoch's order of the examples, one index per row; a function of (seed, epoch) alone."""
        return batches.epoch_order(len(examples), config.seed, epoch)

    def summaries(self, examples: Sequence[E], config: TrainConfig) -> dict[str, Summary]:
        """What the examples are, by the names of their parts: "" if they have none."""
        if self.head is None:
            return {"": summarize(examples, config.max_length)}
        return {"": summarize(examples, config.max_length, self.head.labels, targets=TARGETS[self.head.task])}

    def shown(self, example: E) -> tuple[list[int], str]:
        """For a reader: the places of the tokens that are learned of an example, and its label, "" for none."""
        if self.head is None:
            return (example.positions + 1).tolist(), ""
        return [], self.head.shown(example.targets)

    # Training

    def prepare(self, examples: Sequence[E], feed: Feed, bar: Bar) -> str:
        """Compute what is needed of a run's examples besides their prefix, once, before its first step.

        Args:
            examples: that this rank will train and evaluate on.
            bar: given a name and a number of examples, the context of something that is to be called with the number
                of examples after each batch; if it returns False, the rest is left.

        Returns:
            what a run says of it; "" for nothing, by default.
        """
        return ""

    def trained(self, config: TrainConfig) -> dict[str, nn.Parameter]:
        """The parameters that a run trains, by names that do not depend on the adapter's name.

        A head's begin with ``head.`` or ``NAME.head.``, and have ``TrainConfig.head_lr``.
        """
        parameters: dict[str, nn.Parameter] = {}
        if config.train_adapters:
            name = self.model.active_adapter
            if name is None:
                raise ValueError("model: expected an active adapter, got none; see set_adapter and train_adapters")
            trained = {"adapter": name}
            if config.train_stack:
                trained |= {f"below.{number}": other for number, other in enumerate(self.model.adapters_below(name))}
            for prefix, one in trained.items():
                parameters |= self._of_adapter(one, prefix, config)
        if self.head is not None:
            parameters |= {f"head.{key}": p for key, p in self.head.named_parameters()}
        return parameters

    def _of_adapter(self, name: str, prefix: str, config: TrainConfig) -> dict[str, nn.Parameter]:
        unused = self.model.unused_copies(name, lm_head=self.head is None and not config.labeled)
        if unused:
            logger.warning("modules_to_save: %s: not used by this training, and not trained", ", ".join(unused))
        left_out = tuple(f"{MODULES}.{path}." for path in unused)
        of_adapter = self.model.adapters[name].named_parameters()
        return {f"{prefix}.{key}": p for key, p in of_adapter if not key.startswith(left_out)}

    def running(self, config: TrainConfig) -> contextlib.AbstractContextManager[None]:
        """Context of a whole run: which adapters are active, and so how long the frozen prefix is."""
        return contextlib.nullcontext() if config.train_adapters else self.model.disable_adapter()

    def optimizer(self, parameters: dict[str, nn.Parameter], config: TrainConfig) -> ClippedAdamW:
        """The optimizer of the parameters that ``trained`` returns."""
        return make_optimizer(parameters, config)

    def reread(self, examples: list[E]) -> list[E]:
        """The training examples that steps read as they are, so that the prefix cache holds them; by default all."""
        return examples

    def step_examples(
        self, examples: list[E], config: TrainConfig, epoch: int, index: int, autocast: Context
    ) -> list[E]:
        """What a step learns of all its rows: these, by default. Called on every rank, before ``begin_step``."""
        return examples

    def begin_step(self, examples: Sequence[E], config: TrainConfig, epoch: int, index: int) -> None:
        """Called before a step's forwards, on every rank, with all its rows; its epoch, and number in it, from 0."""

    def total_weight(self, examples: Sequence[E]) -> float:
        """By what a step's summed loss is divided: the number of its targets, or the weights of their classes."""
        return self.training_loss.divisor(examples)

    # A forward

    def hidden(self, batch: Batch) -> Tensor:
        """The decoder's last hidden states (B, L, d).

        ``batch["prefix"]``, (B, L, d), if present, is the residual stream after the frozen prefix, from the cache.
        """
        if "prefix" in batch:
            return self.model.run_suffix(batch["prefix"], batch.get("attention_mask"), None, batch.get("position_ids"))
        return self.model.decoder(**batches.inputs(batch), use_cache=False).last_hidden_state

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of the batch's targets (nats, or the head's unit), and (1,) how many are predicted correctly.

        The second is counted in eval mode only, and is 0 in training.
        """
        targets, options = batch["targets"], self.training_loss.options(self.training)
        if self.head is not None:
            scores = self.head(hidden, batch["attention_mask"])
            return self.head.loss(scores, targets, count=not self.training, **options)
        # Only the states that predict targets: scores of prompts and padding would waste tokens × vocabulary of memory.
        states, head = hidden.flatten(0, 1)[batch["positions"]], self.model.get_output_embeddings()
        if not (self.model.liger and liger.reads(head) and self.model.logits_path.plain):
            return scored(self.model.logits_of(states), targets, count=not self.training, **options)
        loss, best = liger.linear_cross_entropy(states, head, targets, **options)
        return loss, targets.new_zeros(1) if self.training else (best == targets).sum()[None]

    def behaviors(self) -> dict[str, Callable[[Batch], Tensor]]:
        """``hidden`` for texts that are none of the task's rows, of each adapter that is learned by itself.

        By what begins the names of its metrics: "" of the only one.
        """
        return {"": self.hidden}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of the batch's targets, and (k,) other numbers for ``evaluate`` to sum over batches."""
        return self.loss(self.hidden(batch), batch)

    # Answers

    @staticmethod
    def rows_to_predict(data: Rows, bad: BadRows) -> Iterator[Row]:
        """The rows of ``data``, one by one. Raises as ``iter_rows``."""
        return iter_rows(data, bad)

    @classmethod
    def to_predict(
        cls, rows: list[Row], config: TrainConfig, tokenizer: Any, bad: BadRows, **of_task: Any
    ) -> list[list[E]]:
        """The examples of each row, whose labels are not read; none of a bad one.

        Args:
            tokenizer: ``UNREAD`` for a check of the rows alone.
            of_task: what ``predicts`` returns.
        """
        return [[] if e is None else [cast("E", e)] for e in unlabeled(rows, config, tokenizer, bad)]

    @classmethod
    def saved_predicts(cls, directory: Path) -> dict[str, Any]:
        """What ``predicts`` of the task that is saved in ``directory`` returns."""
        return {}

    def predicts(self) -> dict[str, Any]:
        """What ``to_predict`` needs to know of this task.

        Raises:
            NotImplementedError: a causal-lm task, which answers by ``generate``.
        """
        if self.head is None:
            raise NotImplementedError("predict: expected a task with a head, got causal-lm; use model.generate")
        return {}

    def predict(self, batch: Batch) -> list[Any]:
        """The prediction for each example of the batch. Raises as ``predicts``."""
        self.predicts()
        head = cast("Head", self.head)
        return head.predictions(head(self.hidden(batch), batch["attention_mask"]))

    def joined(self, examples: Sequence[E], found: Sequence[Any]) -> Any:
        """A row's prediction, from what ``predict`` has ``found`` for each of its examples."""
        return found[0]

    # Scores

    def evaluate(self, run: nn.Module, examples: Sequence[E], feed: Feed, config: TrainConfig) -> dict[str, float]:
        """Metrics of ``examples``, one of which is ``loss``. ``run`` is this module as accelerate prepared it.

        Each rank runs its share of the batches, and all ranks return the same metrics.
        """
        started = time.perf_counter()
        with scores_kept(self.head, feed) as kept:
            metrics = self.metrics(sums_over(run, examples, feed, config), examples, config)
        if self.head is not None and self.head.whole:
            of_rows = gathered(kept)
            scores, wanted = np.stack([of_rows[e.row] for e in examples]), np.stack([e.targets for e in examples])
            metrics |= self.head.metrics(scores, wanted)
        seconds = time.perf_counter() - started
        return metrics | {"seconds": seconds, "tokens_per_second": batches.count_tokens(examples) / seconds}

    def metrics(self, sums: Sequence[float], examples: Sequence[Example], config: TrainConfig) -> dict[str, float]:
        """Metrics from the sums over ``examples`` of what ``forward`` returns, the loss first."""
        targets = batches.count_targets(examples)
        loss = sums[0] / targets
        metrics = {"loss": loss}
        if self.head is None or self.head.right:
            metrics["accuracy"] = sums[1] / (targets if self.head is None else len(examples))
        metrics["targets"] = targets
        if not config.labeled:
            metrics["perplexity"] = math.exp(min(loss, 700.0))
        return metrics

    # Files

    @_owning
    def save(self, directory: Path, config: TrainConfig) -> None:
        """Write what was trained to ``directory``, each file atomically."""
        save_run(directory, self.model, self.head, config, kind=self.kind)

    @classmethod
    def from_pretrained(
        cls, llama: Any, directory: str | os.PathLike[str], *, fused: bool = True, liger: bool = False
    ) -> tuple[Self, TrainConfig]:
        """The task of a saved run or checkpoint on ``llama``, and its configuration, for ``evaluate``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: one is damaged or does not fit; the message names it.
        """
        config, head = load_run(directory)
        with unloaded_on_error(load_model(llama, directory, config, fused=fused, liger=liger)) as model:
            return cls(model, None if head is None else head.to(model.device)), config
