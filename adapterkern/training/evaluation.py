"""Evaluation, and what makes a batch into the model's inputs for it and for training."""

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern.llama import LlamaAdapter
from adapterkern.training import data
from adapterkern.training.config import TrainConfig
from adapterkern.training.data import Example, Rows
from adapterkern.training.heads import ClassificationHead, TaskModel
from adapterkern.training.precision import make_accelerator
from adapterkern.training.prefix import PrefixCache, Slot, choose_cache


def evaluate(
    model: LlamaAdapter,
    eval_data: Rows,
    config: TrainConfig,
    *,
    tokenizer: Any = None,
    head: ClassificationHead | None = None,
    cache: PrefixCache | None = None,
) -> dict[str, float]:
    """Loss and accuracy of the active adapter on data: with the same numbers as an evaluation within ``train``.

    ``config`` and ``head`` are those of the training, as :func:`load_task` reads them. Without ``cache``, texts are run
    through the whole model.

    Returns:
        ``loss`` (nats per text or token), ``accuracy`` (0 to 1), ``targets``, ``seconds``, ``tokens_per_second``, and
        for causal-lm ``perplexity``.
    """
    if (head is None) == (config.task == "classification"):
        raise ValueError(f"head: expected {'a' if head is None else 'no'} head for task {config.task!r}")
    labels = None if head is None else head.labels
    examples, _ = data.load_examples(eval_data, config, tokenizer, labels)
    data.check_vocabulary(examples, model.decoder.embed_tokens.num_embeddings)
    accelerator = make_accelerator(config.precision, model.device)
    with contextlib.ExitStack() as stack:
        if not config.train_adapters:
            stack.enter_context(model.disable_adapter())
        task = TaskModel(model, None if head is None else head.to(model.device)).train(model.training)
        feed = Feed(model, config, cache)
        if cache is not None and choose_cache(model, config, examples, passes=2)[0]:
            feed.add(examples, cache.fill(model, examples, config, accelerator.autocast) or [])
        return run_evaluation(accelerator.prepare_model(task, evaluation_mode=True), examples, feed, config)


class Feed:
    """Makes the model's inputs: batches on its device, with their prefix activations where those are cached."""

    def __init__(self, model: LlamaAdapter, config: TrainConfig, cache: PrefixCache | None) -> None:
        self.device = model.device
        self.config = config
        self.cache = cache
        self._slots: dict[int, Slot] = {}

    def add(self, examples: Sequence[Example], slots: Sequence[Slot]) -> None:
        self._slots |= {id(e): slot for e, slot in zip(examples, slots, strict=True)}

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor | None]:
        batch = data.collate(examples, self.config)
        inputs = batch.to(self.device)._asdict()
        if self._slots and self.cache is not None:
            slots = [self._slots[id(example)] for example in examples]
            hidden = self.cache.gather(slots, batch.input_ids.shape[1], self.config)
            inputs["prefix"] = hidden.to(self.device, non_blocking=True)
        return inputs


def run_evaluation(task: nn.Module, examples: Sequence[Example], feed: Feed, config: TrainConfig) -> dict[str, float]:
    started = time.perf_counter()
    was_training = task.training
    task.eval()
    size = config.eval_batch_size or config.batch_size
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    results = []
    with torch.no_grad():
        for start in range(0, len(by_length), size):
            results.append(torch.stack(task(**feed(by_length[start : start + size]))))
    task.train(was_training)
    targets = data.count_targets(examples)
    loss, correct = (torch.stack(results).cpu().double().sum(0) / targets).tolist()
    seconds = time.perf_counter() - started
    metrics = {"loss": loss, "accuracy": correct, "targets": targets, "seconds": seconds}
    metrics["tokens_per_second"] = data.count_tokens(examples) / seconds
    if config.task == "causal-lm":
        metrics["perplexity"] = math.exp(min(loss, 700.0))
    return metrics
