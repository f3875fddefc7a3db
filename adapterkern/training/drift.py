"""Drift: how far a model with its adapters has gone from the untouched one, on texts of the user's choice.

With p the next-token distribution of the backbone alone after a token, q that of the model with its adapters, both by
the backbone's own LM head,

    drift = 1/N · Σ_tokens KL(p‖q)          KL(p‖q) = Σ_v p_v (log p_v − log q_v)          in nats per token, >= 0

over the N tokens whose next one a causal-lm training on these rows would learn: of a plain text all but the last. It is
what fine-tuning forgets, if the texts are of another kind than those that are learned.

The untouched model's last hidden states (N, d) are computed once and kept on the host. An evaluation then is one pass
with the adapters on, of the layers above the frozen prefix alone if the prefix cache has the texts, and two products of
each token with the LM head, 4·V·d operations, which are most of it where few layers run. One token's probabilities are
as wide as the vocabulary, 85 times its hidden state in SmolLM2-135M, so those of both models are made from the states
for a chunk of tokens at a time.

A small KL is a sum of differences that nearly cancel: logits that are rounded to bf16 have differences of their own,
which are no drift and always add to it. So the LM head multiplies in fp32 at least, whatever the precision of the run
and of its weights. The states are those that the run computes: with bf16 their rounding remains.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adapterkern.model.decoder import eval_mode
from adapterkern.model.llama import LlamaAdapter
from adapterkern.model.logits import ask_for_logits
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, collate, count_tokens, inputs
from adapterkern.training.data.examples import Example, check_vocabulary, load_examples, numbered
from adapterkern.training.data.rows import DataError, source_name
from adapterkern.training.data.summary import Summary, summarize
from adapterkern.training.feed import Bar, Feed, eval_batches, evaluating
from adapterkern.training.task import Task

NAME = "drift"  # of the metric; of several adapters each has one, such as reviews/drift
_CHUNK = 256  # tokens whose logits exist at a time
_WIDENED = 1 << 25  # weights of a half-precision LM head that exist in fp32 at a time: 128 MiB
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # under DeepSpeed accelerate has none


# The texts


def as_texts(config: TrainConfig) -> TrainConfig:
    """How texts beside a task's rows are read: as causal-lm rows, cut to ``max_length``, whatever the task is."""
    # Their labels are not of interest, so no message is to name them as what causal-lm does not learn.
    return dataclasses.replace(config, task="causal-lm", train_adapters=True, class_weights=None, label_column="")


def check_drift(config: TrainConfig, data: Any, evaluates: bool = True) -> None:
    """Raise ``ValueError`` for texts on which nothing can be measured, before they are read."""
    if data is None:
        return
    if not config.train_adapters:
        raise ValueError(
            f"drift_data: expected None beside a head alone, which leaves the model as it is, got {source_name(data)}"
        )
    if not evaluates:
        raise ValueError(
            f"drift_data: expected eval_data beside it, since evaluations measure drift, got {source_name(data)} alone"
        )


def load_texts(model: LlamaAdapter, data: Any, config: TrainConfig, tokenizer: Any, start: int) -> list[Example]:
    """The texts to measure drift on, with numbers from ``start``; none of None. Raises as ``load_examples``.

    Raises:
        ValueError: the backbone's logits do not follow from its hidden states, or a token is not in its vocabulary.
    """
    if data is None:
        return []
    with _named():
        examples, _ = load_examples(data, as_texts(config), tokenizer)
    check_vocabulary(examples, model.get_input_embeddings().num_embeddings)
    if obstacle := ask_for_logits(model).obstacle:
        raise ValueError(f"drift_data: expected a backbone with an LM head, but {obstacle}")
    return numbered(examples, start)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Name the argument in errors about its data."""
    try:
        yield
    except (DataError, OSError, ImportError, TypeError) as error:
        if not (isinstance(error, DataError) or str(error).startswith("data: ")):
            raise
        raise type(error)(f"drift_data: {str(error).removeprefix('data: ')}") from error


def texts_name(data: Any) -> str:
    """``source_name`` of the texts, for the model card; of Python's objects the argument."""
    return "drift_data" if (name := source_name(data)) == source_name(None) else name


def summary_of(texts: Sequence[Example], config: TrainConfig) -> dict[str, Summary]:
    """What the texts are, for a reader; nothing without texts."""
    if not texts:
        return {}
    found = summarize(texts, config.max_length)
    return {NAME: dataclasses.replace(found, learned=0, measured=found.learned)}


# The measure


def untouched(model: LlamaAdapter, batch: Batch) -> Tensor:
    """The last hidden states (B, L, d) of the backbone alone, from the batch's ``prefix`` if it has one; no gradient.

    All adapters are off, also those below the trained one in a stack, and with them their ``modules_to_save``.
    """
    start = model.prefix_length  # which is all layers once the adapters are off
    with torch.no_grad(), model.disable_adapter(), eval_mode(model.base):
        if "prefix" not in batch:
            return model.decoder(**inputs(batch), use_cache=False).last_hidden_state
        return model.run_suffix(batch["prefix"], batch.get("attention_mask"), start, batch.get("position_ids"))


def wide(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class WideProducts(TorchFunctionMode):
    """Inside, linear layers multiply in fp32 at least: of half-precision weights a slice of rows at a time is widened.

    By way of ``F.linear``, so that hooks that move or gather a layer's weights run as ever, and so does what a model
    makes of its logits, as a cap.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_wide_linear if func is F.linear else func)(*args, **kwargs or {})


def _wide_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = max(_WIDENED // weight.shape[1], 1) if weight.element_size() < 4 else len(weight)
    parts = [
        F.linear(wide(input), wide(weight[part]), None if bias is None else wide(bias[part]))
        for part in (slice(start, start + rows) for start in range(0, len(weight), rows))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def kl(log_p: Tensor, log_q: Tensor, p: Tensor) -> Tensor:
    """KL(p‖q) (n,) of each token, in nats, from logarithms of probabilities (n, V), and ``p`` itself.

    A term with p = 0 is 0, as its limit is, also where an LM head masks a token in both.
    """
    return (log_p - log_q).mul_(p).masked_fill_(p == 0, 0).sum(-1)


def kl_sums(model: LlamaAdapter, bare: Tensor, adapted: Sequence[Tensor]) -> Tensor:
    """Σ KL(p‖q) over tokens, (k,) in nats, from ``untouched`` states (N, d) and from each of k ``adapted`` ones.

    Whatever their dtype and autocast, logits and their sums are in fp32 at least.
    """
    sums = torch.zeros(len(adapted), dtype=wide(bare.new_empty(0)).dtype, device=bare.device)

    def logarithms(states: Tensor) -> Tensor:
        return F.log_softmax(wide(model.logits_of(states)), -1)

    with torch.autocast(bare.device.type, enabled=False), WideProducts():
        for start in range(0, len(bare), _CHUNK):
            part = slice(start, start + _CHUNK)
            with model.disable_adapter():  # its modules_to_save may have the LM head
                log_p = logarithms(bare[part])
            p = log_p.exp()
            for number, states in enumerate(adapted):
                sums[number] += kl(log_p, logarithms(states[part]), p).sum()
    return sums


class Drift:
    """The drift of a task's adapters on ``texts``, to ``measure`` as often as they have changed.

    Several processes share the batches, as those of an evaluation: each keeps the states of its own.

    Args:
        texts: from ``load_texts``.
        feed: makes batches, with their prefix if it has them.
    """

    def __init__(self, task: Task[Any], texts: Sequence[Example], feed: Feed) -> None:
        self.task, self.feed = task, feed
        self.config = as_texts(feed.config)
        self.batches = eval_batches(texts, self.config)
        self.tokens = sum(len(text.positions) for text in texts)
        self._kept: dict[int, Tensor] = {}  # the untouched states (n, d) of a batch, by its first text's row

    @property
    def names(self) -> list[str]:
        """Those of the metrics."""
        of_each = [f"{name}{NAME}" for name in self.task.behaviors()]
        return of_each if NAME in of_each else [NAME, *of_each]

    def prepare(self, run: Any, bar: Bar) -> None:
        """Compute what ``measure`` needs of the untouched model, which it does itself of what is left.

        Args:
            run: the task as accelerate prepared it.
            bar: see ``Task.prepare``.
        """
        shares = processes.share(self.batches, 1)
        with evaluating(run), bar(NAME, len(shares)) as on_batch:
            for (batch,), _ in shares:
                self._untouched(run, batch)
                if not on_batch(1) and processes.world_size() == 1:
                    return

    def measure(self, run: Any) -> dict[str, float]:
        """``drift``; of a task with several adapters their mean, and ``NAME/drift`` of each."""
        of, device = functools.partial(self._sums, run), self.task.model.device
        with evaluating(run):
            sums = processes.sum_over_batches(self.batches, of, device)
        found = (sums / self.tokens).tolist()
        return dict(zip(self.names, [sum(found) / len(found), *found][-len(self.names) :], strict=True))

    def rehearse(self, run: Any) -> tuple[float, float]:
        """Seconds that ``prepare`` and each ``measure`` are expected to take, from those of ``sample``."""
        found = []
        with evaluating(run):
            for _ in range(2):  # the first may make what the second has
                self._kept.clear()
                begun = time.perf_counter()
                self._untouched(run, self.sample)
                between = time.perf_counter()
                self._sums(run, self.sample).cpu()
                found.append((between - begun, time.perf_counter() - between))
        share = count_tokens(self.sample) / sum(map(count_tokens, self.batches))
        once, each = (min(seconds) / share for seconds in zip(*found, strict=True))
        return once, each

    @property
    def sample(self) -> list[Example]:
        """A batch neither of the shortest texts nor of the longest."""
        return self.batches[len(self.batches) // 2]

    def _sums(self, run: Any, batch: Sequence[Example]) -> Tensor:
        """Σ KL over a batch's tokens, of each adapter that the task learns."""
        model = self.task.model
        bare = self._untouched(run, batch).to(model.device)

        def sums(fed: Batch) -> Tensor:
            hidden = [one(fed) for one in self.task.behaviors().values()]
            return kl_sums(model, bare, [h.flatten(0, 1)[fed["positions"]] for h in hidden])

        return self._run(run, batch, sums)

    def _untouched(self, run: Any, batch: Sequence[Example]) -> Tensor:
        """The untouched model's states (n, d) of a batch's tokens, on the host."""

        def states(fed: Batch) -> Tensor:
            return untouched(self.task.model, fed).flatten(0, 1)[fed["positions"]]

        if (first := batch[0].row) not in self._kept:
            self._kept[first] = self._run(run, batch, states).cpu()
        return self._kept[first]

    def _run(self, run: Any, texts: Sequence[Example], forward: Callable[[Batch], Tensor]) -> Tensor:
        """``forward`` of a batch in place of the task's own, by way of ``run``, which gathers sharded weights."""
        batch = self.feed.fed(texts, collate(texts, self.config))
        attributes, device = vars(self.task), self.task.model.device
        own = attributes.get("forward")  # accelerate's, of autocast
        attributes["forward"] = forward
        try:
            with torch.autocast(device.type, _AUTOCAST.get(self.config.precision), self.config.precision in _AUTOCAST):
                return run(batch)
        finally:
            del attributes["forward"]
            if own is not None:
                attributes["forward"] = own
