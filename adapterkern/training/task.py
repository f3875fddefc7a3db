"""What is learnt: how rows become examples, how a batch becomes a loss, what is trained, scored and saved.

``Task`` is classification with a head of ours, or next tokens with the backbone's own LM head. Another kind of
training is a subclass of it, which ``train(..., task=...)`` takes; the loop, the prefix cache, the checkpoints and the
evaluation know no more of it than these methods.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkern.model import liger
from adapterkern.model.llama import LlamaAdapter
from adapterkern.optim.clipped_adamw import ClippedAdamW
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import (
    Example,
    Rows,
    check_vocabulary,
    collate,
    count_targets,
    count_tokens,
    epoch_order,
    load_examples,
)
from adapterkern.training.data.prefix import PrefixCache, Slot
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.optimization import make_optimizer
from adapterkern.training.saved import save_task

Inputs = dict[str, Tensor | None]


class Task(nn.Module):
    """Backbone, adapters and head as one module from a batch to its loss: what accelerate prepares and a step calls.

    Args:
        model: the backbone with its adapters.
        head: a classification head, or None: for causal-lm, or until :meth:`load` knows the labels.

    Attributes:
        uniform: whether all forwards in training run the same modules, as often: DeepSpeed's processes then meet.
        trains_all: whether each of them gives all that is trained a gradient, be it 0: DDP's wait for every one.
    """

    uniform = trains_all = True

    def __init__(self, model: LlamaAdapter, head: ClassificationHead | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = head

    def load(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> list[Example]:
        """Examples of ``rows``, as :func:`~adapterkern.training.data.examples.load_examples` reads them.

        The first call, with the rows to train on, makes the head where there is none.
        """
        labels = None if self.head is None else self.head.labels
        examples, names = load_examples(rows, config, tokenizer, labels)
        check_vocabulary(examples, self.model.decoder.embed_tokens.num_embeddings)
        if config.task == "causal-lm":
            if self.head is not None:
                raise ValueError("head: expected none for causal-lm, which has the backbone's own, got one")
            check_lm_head(self.model)
        elif self.head is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.head = ClassificationHead(self.model.config.hidden_size, names, config.pooling)
            self.head.to(self.model.device)
        return examples

    def collate(self, examples: Sequence[Example], config: TrainConfig) -> Inputs:
        """What :meth:`forward` takes, on the host: ``input_ids`` (B, L) and whatever else the task needs."""
        return collate(examples, config)._asdict()

    def order(self, examples: Sequence[Example], config: TrainConfig, epoch: int) -> list[int]:
        """As many indices as there are examples: an epoch's order. A function of (seed, epoch) alone."""
        return epoch_order(len(examples), config.seed, epoch)

    def begin_step(self, examples: Sequence[Example], config: TrainConfig, epoch: int, index: int) -> None:
        """Told before the forwards of each step: all of its rows, and that it is the ``index``-th of the ``epoch``.

        A forward has some of them, those of one process fewer still. Losses of forwards are summed, so one that is not
        a sum over rows needs what only the whole step says.
        """

    def trained(self, config: TrainConfig) -> dict[str, nn.Parameter]:
        """What a run trains, by names that do not depend on the adapter's own name."""
        parameters: dict[str, nn.Parameter] = {}
        if config.train_adapters:
            name = self.model.active_adapter
            if name is None:
                raise ValueError("model: expected an active adapter, got none; see set_adapter and train_adapters")
            parameters |= {f"adapter.{key}": p for key, p in self.model.adapters[name].named_parameters()}
        if self.head is not None:
            parameters |= {f"head.{key}": p for key, p in self.head.named_parameters()}
        return parameters

    def running(self, config: TrainConfig) -> contextlib.AbstractContextManager[None]:
        """Around a whole run: which adapters run, and so how long the frozen prefix is."""
        return contextlib.nullcontext() if config.train_adapters else self.model.disable_adapter()

    def optimizer(self, parameters: dict[str, nn.Parameter], config: TrainConfig) -> ClippedAdamW:
        """What steps over the parameters of :meth:`trained`."""
        return make_optimizer(parameters, config)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None) -> Tensor:
        """The decoder's last hidden states (B, L, d).

        ``prefix``, (B, L, d), is the residual stream after the frozen prefix where that is known already.
        """
        if prefix is not None:
            return self.model.run_suffix(prefix, attention_mask)
        decoder = self.model.decoder
        return decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of a :class:`~.data.examples.Batch`, and how many targets it has right.

        The second is counted in eval mode only.
        """
        hidden = self.hidden(input_ids, attention_mask, prefix)
        if self.head is None:
            return self.next_tokens(hidden.flatten(0, 1)[positions], targets)
        return self.scored(self.head(hidden, attention_mask), targets)

    def scored(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of scores (K, classes), what :meth:`forward` gives."""
        loss = F.cross_entropy(scores.float(), targets, reduction="sum")
        return loss, targets.new_zeros(()) if self.training else (scores.argmax(-1) == targets).sum()

    def next_tokens(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of the states (K, d) before the targets, what :meth:`forward` gives.

        The others' scores, those of prompts and padding, would be (tokens × vocabulary) for nothing.
        """
        head = self.model.get_output_embeddings()
        if not (self.model.liger and liger.reads(head)):
            return self.scored(head(states), targets)
        loss, best = liger.linear_cross_entropy(states, head, targets)
        return loss, targets.new_zeros(()) if self.training else (best == targets).sum()

    def evaluate(
        self, run: nn.Module, examples: Sequence[Example], feed: "Feed", config: TrainConfig
    ) -> dict[str, float]:
        """Metrics of ``examples``, a finite ``loss`` among them. ``run`` is this module as accelerate prepared it.

        Of several processes each runs its share of the batches, and all have the result.
        """
        started = time.perf_counter()
        sums = summed(run, eval_batches(examples, config), feed)
        metrics = self.metrics(sums, examples, config)
        seconds = time.perf_counter() - started
        return metrics | {"seconds": seconds, "tokens_per_second": count_tokens(examples) / seconds}

    def metrics(self, sums: Sequence[float], examples: Sequence[Example], config: TrainConfig) -> dict[str, float]:
        """What the sums over ``examples`` say, of the loss and of what else :meth:`forward` gives in eval mode."""
        targets = count_targets(examples)
        loss = sums[0] / targets
        metrics = {"loss": loss, "accuracy": sums[1] / targets, "targets": targets}
        if config.task == "causal-lm":
            metrics["perplexity"] = math.exp(min(loss, 700.0))
        return metrics

    def save(self, directory: Path, config: TrainConfig) -> None:
        """Write the trained parts into ``directory``, each file atomically."""
        save_task(directory, self.model, self.head, config)


class Feed:
    """Makes a task's inputs: batches on its device, with their prefix activations where those are cached."""

    def __init__(self, task: Task, config: TrainConfig, cache: PrefixCache | None) -> None:
        self.task = task
        self.config = config
        self.cache = cache
        self._slots: dict[int, Slot] = {}

    def add(self, examples: Sequence[Example], slots: Sequence[Slot]) -> None:
        self._slots |= {id(e): slot for e, slot in zip(examples, slots, strict=True)}

    def __call__(self, examples: Sequence[Example]) -> Inputs:
        inputs = self.task.collate(examples, self.config)
        ids = inputs["input_ids"]
        if self._slots and self.cache is not None and ids is not None:
            slots = [self._slots[id(example)] for example in examples]
            inputs["prefix"] = self.cache.gather(slots, ids.shape[1], self.config)
        device = self.task.model.device
        return {name: None if t is None else t.to(device, non_blocking=True) for name, t in inputs.items()}


def eval_batches(examples: Sequence[Example], config: TrainConfig) -> list[list[Example]]:
    """``examples`` in batches of an evaluation, like lengths together."""
    size = config.eval_batch_size or config.batch_size
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def summed(run: nn.Module, batches: Sequence[Sequence[Example]], feed: Feed) -> list[float]:
    """The sums over all batches of what a forward in eval mode gives: its loss, and then its other numbers."""

    def of(batch: Sequence[Example]) -> Tensor:
        loss, others = run(**feed(batch))
        return torch.cat([loss[None], others.flatten()])

    return processes.summed(batches, of, feed.task.model.device).tolist()


def run_evaluation(
    task: Task, run: nn.Module, examples: Sequence[Example], feed: Feed, config: TrainConfig
) -> dict[str, float]:
    """``task.evaluate`` in eval mode and without gradients."""
    was_training = run.training
    run.eval()
    try:
        with torch.no_grad():
            return task.evaluate(run, examples, feed, config)
    finally:
        run.train(was_training)


def check_lm_head(model: LlamaAdapter) -> None:
    """Raise ``ValueError`` if the backbone has no LM head, or does more to its logits than the head does."""
    config: Any = model.config
    if model.base.get_output_embeddings() is None:
        raise ValueError(f"model: expected a backbone with an LM head for causal-lm, got {type(model.base).__name__}")
    for name, neutral in (("logits_scaling", 1), ("logit_scale", 1), ("final_logit_softcapping", None)):
        if getattr(config, name, neutral) not in (neutral, None):
            raise ValueError(f"model: expected plain logits for causal-lm, got {name}={getattr(config, name)}")
