"""Entry points to what was trained: ``load`` a run, ``predict`` with it."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from adapterkern import checks
from adapterkern.inference.classifier import Classifier
from adapterkern.inference.runs import Opened, find_run
from adapterkern.model.backbone import OTHER_NAMES
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Rows
from adapterkern.training.heads import Head
from adapterkern.training.prediction import predictions
from adapterkern.training.task import Task

_OPENED = "_adapterkern_opened"  # of a model: the run that it was loaded from


@checks.other_names(
    **OTHER_NAMES
    | {"base_model": "model", "pretrained_model_name_or_path": "source", "device_map": "device, one of them"}
)
def load(
    source: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    num_layers: int | None = None,
    dtype: str | None = None,
    device: torch.device | str | None = None,
    fused: bool = True,
    liger: bool = False,
    load_in: str | None = None,
    attn: str | None = None,
) -> tuple[Any, Any]:
    """What was trained, on its backbone, with its tokenizer: ``model, tokenizer = ak.load("run")``.

    Args:
        source: the output folder of a training, a checkpoint in it, an adapter that ``save_pretrained`` wrote, or a
            name on the Hugging Face hub that ``push_to_hub`` has filled. Of a run of several tasks a task is
            ``run/tasks/NAME``.
        model: the backbone: a transformers folder, a .gguf file or a hub name. Default: what the run says.
        num_layers: the backbone's first layers to keep. Default: as trained.
        dtype: of the backbone, ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"auto"``. Default: as trained.
        device: default the first CUDA device if there is one, else the CPU.
        fused, liger: as in ``LlamaAdapter``.
        load_in: ``"8bit"`` or ``"4bit"`` quantizes the backbone as ``load_backbone`` does, ``"none"`` does not.
            Default: as trained.
        attn: the implementation of attention; see ``load_backbone``.

    Returns:
        the model, in eval mode, and the tokenizer. The model is a ``LlamaAdapter`` for causal-lm; a ``Classifier``,
        which ``pipeline("text-classification", model=...)`` takes, for one with a head for labeled texts, routed ones
        too; else the task:
        ``MultiTask``, ``QuestionAnswering``, or ``RoutedTask``, which has ``generate``.

    Raises:
        FileNotFoundError: a file of the run, or its backbone, is missing.
        OSError: the hub does not have it, or cannot be asked.
        ValueError: a file is damaged or does not fit.
    """
    backbone: Any = {"model": model, "num_layers": num_layers, "dtype": dtype, "load_in": load_in, "attn": attn}
    opened = find_run(source).open(**backbone, device=device, fused=fused, liger=liger)
    task = opened.task
    found: Any = task
    if isinstance(task.head, Head):
        found = Classifier(task, opened.config)
        if opened.tokenizer.pad_token is None:  # without one `pipeline` takes no batches; any does, behind a mask
            opened.tokenizer.pad_token = opened.tokenizer.eos_token
    elif type(task) is Task:
        found = task.model
    found.eval()
    vars(found)[_OPENED] = opened
    return found, opened.tokenizer


@checks.other_names(data="rows", dataset="rows", texts="rows, each a mapping with the text column,")
def predict(
    model: Any,
    rows: Rows,
    config: TrainConfig | None = None,
    *,
    tokenizer: Any = None,
    head: Head | None = None,
    task: Task[Any] | None = None,
) -> list[Any]:
    """The prediction for each row, in their order: ``ak.predict("run", rows)``.

    Args:
        model: a saved run, as ``load`` takes it; what ``load`` returned; or a ``LlamaAdapter`` with what follows.
        rows: what ``evaluate`` takes, without labels or with labels that are not read. Rows of a run of several tasks
            name theirs in the column ``"task"``.
        config: that of the training. Default: the loaded run's. Its ``text_column`` names the texts.
        tokenizer: the backbone's; default the loaded run's.
        head, task: those of the training, for a ``LlamaAdapter``; see ``evaluate``.

    Returns:
        per row a ``Prediction``: ``label``, ``probability`` and ``probabilities`` (each label's, 0 to 1), for several
        tasks ``task`` besides; for multi-label ``labels``, those of a probability above 0.5, and ``probabilities``; for
        regression ``value``; for question answering ``text`` and ``candidates``. None for a bad row with
        ``config.skip_bad_rows``.

    Raises:
        DataError: bad rows, each named by file and line.
        NotImplementedError: a causal-lm run, which answers by ``generate``; or several processes.
        ValueError, TypeError: an argument is missing or of a wrong type; the message names it.
    """
    return [found for _, found in iter_predictions(model, rows, config, tokenizer=tokenizer, head=head, task=task)]


def iter_predictions(
    model: Any,
    rows: Rows,
    config: TrainConfig | None = None,
    *,
    tokenizer: Any = None,
    head: Head | None = None,
    task: Task[Any] | None = None,
) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Each row's columns and its prediction, one by one: for data larger than memory. Arguments as for ``predict``."""
    if isinstance(model, str | os.PathLike):
        model, _ = load(model)
    opened: Opened | None = vars(model).get(_OPENED) if hasattr(model, "__dict__") else None
    if task is None and opened is not None:
        task = opened.task
    elif task is None:
        if not isinstance(model, LlamaAdapter):
            raise TypeError(
                "model: expected a saved run, what load returned, or a LlamaAdapter with its head, got "
                f"{type(model).__name__}"
            )
        task = Task(model, None if head is None else head.to(model.device))
    if head is not None and task.head is not head:
        raise ValueError("head: expected none beside a task or a loaded run, which have their own, got one")
    if config is None:
        if opened is None:
            raise ValueError("config: expected that of the training, got None")
        config = opened.config
    tokenizer = tokenizer or (None if opened is None else opened.tokenizer)
    return ((row.values, found) for row, found in predictions(task, rows, config, tokenizer))
