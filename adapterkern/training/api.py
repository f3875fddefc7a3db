"""Evaluation of a trained task outside of its training."""

from typing import Any

from adapterkern.model.llama import LlamaAdapter
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Rows
from adapterkern.training.data.prefix import PrefixCache, choose_cache
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.parallel.accelerator import left_as_found, make_accelerator
from adapterkern.training.task import Feed, Task, run_evaluation


def evaluate(
    model: LlamaAdapter,
    eval_data: Rows,
    config: TrainConfig,
    *,
    tokenizer: Any = None,
    head: ClassificationHead | None = None,
    cache: PrefixCache | None = None,
    task: Task | None = None,
) -> dict[str, float]:
    """Loss and accuracy of the active adapter on data: with the same numbers as an evaluation within ``train``.

    ``config`` and ``head`` are those of the training, as :func:`load_task` reads them; ``task`` stands for both model
    and head where the training had one. Without ``cache``, texts are run through the whole model.

    Returns:
        ``loss`` (nats per text or token), ``accuracy`` (0 to 1), ``targets``, ``seconds``, ``tokens_per_second``, and
        for causal-lm ``perplexity``; or what ``task`` scores.
    """
    if task is None:
        if (head is None) == (config.task == "classification"):
            expected = "a" if head is None else "no"
            raise ValueError(f"head: expected {expected} head for task {config.task!r}")
        task = Task(model, None if head is None else head.to(model.device))
    examples = task.load(eval_data, config, tokenizer)
    accelerator = make_accelerator(config.precision, model.device)
    with task.running(config), left_as_found(task):
        feed = Feed(task, config, cache)
        if cache is not None and choose_cache(model, config, examples, passes=2)[0]:
            feed.add(examples, cache.fill(model, examples, config, accelerator.autocast) or [])
        run = accelerator.prepare_model(task.train(model.training), evaluation_mode=True)
        return run_evaluation(task, run, examples, feed, config)
