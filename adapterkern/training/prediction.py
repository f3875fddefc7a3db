"""Predictions for rows without labels, in bounded memory: rows are read, and their predictions given, in order.

For rows with labels, an evaluation keeps what it finds on the way (``answers_kept``), so that nothing runs twice.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from adapterkern.model.decoder import modes_kept
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import UNREAD, Example, Rows, check_vocabulary
from adapterkern.training.data.rows import BadRows, DataError, Row, source_name, warn
from adapterkern.training.feed import Feed, eval_batches
from adapterkern.training.heads import Head
from adapterkern.training.parallel.accelerator import make_accelerator
from adapterkern.training.parallel.frozen import cast_once
from adapterkern.training.run.lock import in_one_thread
from adapterkern.training.task import Task

CHUNK = 1024  # rows, which are sorted by length to save padding


class Answer(NamedTuple):
    """What a classification head finds for an example of an evaluation, whose label is ``example.targets[0]``."""

    example: Example
    label: int  # the best, by its number in the head's ``labels``
    probability: float  # of that label, 0 to 1


class Scores(NamedTuple):
    """What another head finds for an example of an evaluation: its scores (outputs,) beside ``example.targets``."""

    example: Example
    scores: np.ndarray


@contextlib.contextmanager
def answers_kept(task: Task[Any], feed: Feed, answers: list[Any]) -> Iterator[None]:
    """Context in which each forward on a batch of ``feed`` adds what the task's head finds: ``Answer`` or ``Scores``.

    The label is the one that the accuracy counts. Nothing is added by a task without a head.
    """

    def keep(head: Any, arguments: Any, scores: torch.Tensor) -> None:
        if head.whole:
            answers.extend(Scores(*one) for one in zip(feed.examples, scores.cpu().numpy(), strict=True))
            return
        best = scores.argmax(-1)
        probabilities = scores.softmax(-1).gather(-1, best[:, None])[:, 0]
        found = zip(feed.examples, best.tolist(), probabilities.tolist(), strict=True)
        answers.extend(Answer(*one) for one in found)

    heads = [module for module in task.modules() if isinstance(module, Head)]
    hooks = [head.register_forward_hook(keep) for head in heads]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_to_predict(task: type[Task[Any]], data: Rows, config: TrainConfig, **of_task: Any) -> int:
    """The number of rows. Raises what ``predictions`` would, as far as it can be known without a tokenizer.

    Args:
        task: the class of the task.
        of_task: what ``task.predicts()`` returns.

    Raises:
        DataError: bad rows, each named by file and line, unless ``config.skip_bad_rows``; or no rows.
    """
    bad, count = BadRows(source_name(data)), 0
    for rows in chunks(task.rows_to_predict(data, bad)):
        task.to_predict(rows, config, UNREAD, bad, **of_task)
        count += len(rows)
    if not (config.skip_bad_rows and len(bad.found) < count):
        bad.settle(config.skip_bad_rows)
    if not count:
        raise DataError(f"{bad.source}: no rows")
    return count


def predictions(task: Task[Any], data: Rows, config: TrainConfig, tokenizer: Any) -> Iterator[tuple[Row, Any]]:
    """Each row of ``data`` and its prediction, in their order, by the task's head and active adapter.

    Args:
        data: as for ``evaluate``, without labels or with labels that are not read. Read as it is needed: ``CHUNK``
            rows at a time are in memory.
        config: that of the training: it names the columns, and says how texts are cut, padded and computed.

    Yields:
        the row, and what ``task.joined`` gives, such as a ``Prediction``. None for a bad row with
        ``config.skip_bad_rows``; a warning names these at the end.

    Raises:
        DataError: bad rows, each named by file and line.
        NotImplementedError: a causal-lm task, which answers by ``generate``; or several processes.
        ValueError: a token id is beyond the model's embedding.
        RuntimeError: another thread trains or evaluates the model.
    """
    of_task = task.predicts()
    if processes.world_size() > 1:
        raise NotImplementedError(f"predict: expected one process, got {processes.world_size()}")
    return _predictions(task, data, config, tokenizer, of_task)


def _predictions(
    task: Task[Any], data: Rows, config: TrainConfig, tokenizer: Any, of_task: dict[str, Any]
) -> Iterator[tuple[Row, Any]]:
    bad, seen, cut = BadRows(source_name(data)), 0, 0
    for rows in chunks(task.rows_to_predict(data, bad)):
        examples = task.to_predict(rows, config, tokenizer, bad, **of_task)
        if not config.skip_bad_rows:
            bad.settle(False)
        seen += len(rows)
        cut += sum(any(example.cuts[0] for example in of_row) for of_row in examples)
        yield from zip(rows, _of_chunk(task, examples, config), strict=True)  # which holds no lock while it waits
    bad.settle(config.skip_bad_rows)
    if not seen:
        raise DataError(f"{bad.source}: no rows")
    if cut:
        warn("%s: %d of %d texts are cut to the maximum length of %d tokens", bad.source, cut, seen, config.max_length)


def _of_chunk(task: Task[Any], examples: Sequence[Sequence[Any]], config: TrainConfig) -> list[Any]:
    """The prediction for each row, from its examples; None for a row without any."""
    flat = [example for of_row in examples for example in of_row]
    if flat:
        check_vocabulary(flat, task.model.get_input_embeddings().num_embeddings)
    accelerator, feed = make_accelerator(config.precision, task.model.device), Feed(task, config, None)
    found: dict[int, Any] = {}
    with in_one_thread(task.model), task.running(config), modes_kept(task), cast_once(task):
        task.eval()
        with torch.no_grad(), accelerator.autocast():
            for batch in eval_batches(flat, config):
                found |= {id(e): one for e, one in zip(batch, task.predict(feed(batch)), strict=True)}
    return [task.joined(of_row, [found[id(e)] for e in of_row]) if of_row else None for of_row in examples]


def chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """``CHUNK`` rows at a time."""
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk
