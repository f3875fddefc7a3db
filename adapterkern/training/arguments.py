"""What ``train`` and ``evaluate`` may be given, and what of it has no effect."""

import os
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from adapterkern.model.asking import check_runs
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Example
from adapterkern.training.data.padding import check_padding, check_positions
from adapterkern.training.data.prefix import PrefixCache
from adapterkern.training.data.rows import warn
from adapterkern.training.heads import Head
from adapterkern.training.padding import check_packing
from adapterkern.training.task import Task


def check_arguments(model: object, config: object, tokenizer: object, head: object, cache: object) -> None:
    """Refuse what a user gives in their places, before it fails somewhere inside."""
    if not isinstance(model, LlamaAdapter):
        hint = ": wrap it, LlamaAdapter(llama, AdapterConfig())" if isinstance(model, PreTrainedModel) else ""
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        inside = {kind: path for path, one in modules for kind in (LlamaAdapter, Head) if isinstance(one, kind)}
        if LlamaAdapter in inside:
            hint = f": give the one inside, model.{inside[LlamaAdapter]}"
            hint += f", with head=model.{inside[Head]}" if Head in inside else ""
        if hasattr(model, "_orig_mod"):
            hint = ": give the model itself; its compile() compiles it in place"
        raise TypeError(f"model: expected a LlamaAdapter, got {type(model).__name__}{hint}")
    model.check_attached()
    if not isinstance(config, TrainConfig):
        hint = ": write TrainConfig(**fields)" if isinstance(config, dict) else ""
        raise TypeError(f"config: expected a TrainConfig, got {type(config).__name__}{hint}")
    if tokenizer is not None and not callable(tokenizer):
        path = os.fspath(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else ""
        hint = f": load it, AutoTokenizer.from_pretrained({path!r})" if path else ""
        raise TypeError(f"tokenizer: expected a tokenizer of transformers, got {type(tokenizer).__name__}{hint}")
    for name, value, kind in (("head", head, Head), ("cache", cache, PrefixCache)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__} or None, got {type(value).__name__}")


def warn_of_no_effect(config: TrainConfig, task: Task[Any] | None, evaluates: bool) -> None:
    """Name the settings of a training that were made and change nothing."""
    found: dict[str, str] = {}
    if type(task) in (Task, type(None)):  # others may read other rows, too
        names = ("prompt_column", "completion_column") if config.labeled else ("label_column", "pooling", "head_lr")
        found |= dict.fromkeys(names, f"with task={config.task!r}")
    if not evaluates:
        found["eval_every"] = "without eval_data"
    if not config.train_adapters:  # the backbone runs without gradients
        found |= dict.fromkeys(
            ("adapter_drop", "head_lr", "checkpoint_activations", "offload_activations"), "without adapters to train"
        )
    if config.output_dir is None:
        found |= dict.fromkeys(("checkpoint_every", "keep_checkpoints"), "without output_dir")
    if config.rows_per_step == 1:
        found["group_by_length"] = "with steps of one row"
    elif config.padding == "max_length":
        found["group_by_length"] = "with padding='max_length'"
    if max(config.batch_size, (config.eval_batch_size or 1) if evaluates else 1) == 1:
        found["packing"] = "with one row per forward"
    for name, why in found.items():
        if getattr(config, name) != getattr(TrainConfig, name):
            warn("config: %s=%r has no effect %s", name, getattr(config, name), why)


def warn_of_pooling(config: TrainConfig, head: Head | None) -> None:
    """The same of ``pooling`` beside a head, which has its own."""
    if head is not None and config.pooling not in (head.pooling, TrainConfig.pooling):
        warn("config: pooling=%r has no effect with a head that reads %r", config.pooling, head.pooling)


def check_backbones(
    task: Task[Any], config: TrainConfig, examples: Sequence[Example], texts: Sequence[Example] = ()
) -> None:
    """Raise ``ValueError`` if a backbone of the task does not run on the examples, or not as they are padded.

    Args:
        texts: that the model itself reads beside the examples.
    """
    if not task.model.is_mixing:  # which holds for batches of its own size
        check_runs(task.model)
    with task.model.disable_adapter():
        for llama in task.backbones:
            read = [*examples, *(texts if llama is task.model.base else ())]
            check_positions(llama, read)
            check_padding(llama, config, read)
        check_packing(task, config, examples)
