"""Options that have no effect beside others: refused, since what a user has typed is not silently ignored."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from adapterkern.cli.options import COLUMNS, adapter_fields
from adapterkern.cli.scale import OPTIONS
from adapterkern.model.config import PLACES, PROMPT, applies
from adapterkern.training.config import LABELED


class _Rule(NamedTuple):
    """These fields have no effect where another one has such a value; or (None) only one of the two is to be given."""

    ignored: tuple[str, ...]
    other: str
    value: Callable[[Any], bool] | None = None
    why: str = ""


_OF_STEPS = ("train_stack", "adapter_drop", "checkpoint_activations", "offload_activations")
_NOT_OF_PROMPTS = tuple(name for name in adapter_fields() if not applies(name, PROMPT))
_RULES = (
    _Rule(("max_params",), "adapter_dim", why="a budget decides the dimension"),
    _Rule(("max_params",), "prompt_length", why="a budget decides the length"),
    _Rule(("layers",), "every", why="each says which layers have adapters"),
    _Rule(_NOT_OF_PROMPTS, "kind", lambda kind: kind == PROMPT),
    _Rule(("prompt_length", "prompt_gate"), "kind", lambda kind: kind != PROMPT),
    _Rule(("compile", "unfused"), "kind", lambda kind: kind == PROMPT, "which runs inside the layers, as PyTorch does"),
    _Rule(("fuse_norm",), "kind", lambda kind: kind == PROMPT, "which leaves no stream to a norm"),
    _Rule(("fuse_norm",), "position", lambda name: PLACES[name] != name, "which adds to what others leave to the norm"),
    _Rule(("fuse_norm",), "compile", bool, "which compiles the norms"),
    _Rule(("fuse_norm",), "checkpoint_activations", bool, "which runs layers twice, and their norms by themselves"),
    _Rule(("fuse_norm",), "unfused", bool, "which runs plain PyTorch modules"),
    _Rule(("fuse_norm",), "x_free", bool, "whose adapters keep y themselves"),
    _Rule(("compile",), "bias_scale", bool, "which runs inside the layers, as PyTorch does"),
    _Rule(adapter_fields(), "start", why="a saved adapter is as it was made"),
    _Rule(("epochs",), "max_steps", why="each says how long to train"),
    _Rule(adapter_fields(), "train_adapters", lambda on: not on, "which trains the head alone"),
    _Rule(("pooling", "label_column", "head_lr"), "task", lambda task: task == "causal-lm", "which has no labels"),
    _Rule(("prompt_column", "completion_column"), "task", lambda task: task in LABELED, "which has no prompts"),
    _Rule(COLUMNS, "task", lambda task: task == "question answering", "whose columns have fixed names"),
    _Rule(("group_by_length",), "padding", lambda padding: padding == "max_length", "to which all rows are padded"),
    _Rule(("max_skipped_steps",), "precision", lambda precision: precision != "fp16", "which skips no step"),
    _Rule(("prefix_cache_bytes",), "prefix_cache", lambda on: on is False),
    _Rule(("class_weights",), "task", lambda task: task != "classification", "which has no classes"),
    _Rule(("eval_every", "eval_batch_size", "best", "patience", "drift"), "eval", lambda file: file is None),
    _Rule(("drift", "head_lr", *_OF_STEPS), "train_adapters", lambda on: not on, "which trains the head alone"),
    _Rule(
        (
            *("dtype", "attn", "task", "batch_size", "max_length"),
            *("adapter_dim", "prompt_length", "position", "every", "layers", "gpus"),
        ),
        "memory",
        lambda size: size is None,
    ),
    _Rule(OPTIONS, "gpus", lambda counts: counts is None),
    _Rule(("x_free",), "unfused", bool, "which keeps what torch keeps"),
    _Rule(("worst",), "report", lambda directory: directory is None),
    _Rule(("free_epochs",), "cost", lambda cost: cost == 0),
    _Rule(("train_texts",), "train", why="texts of Reuters R8, or of a file"),
    _Rule(("eval_texts",), "eval", why="texts of Reuters R8, or of a file"),
)


def check_together(arguments: argparse.Namespace, **of_run: Any) -> None:
    """Raise ``ValueError`` for an option that was typed, and has no effect beside the others.

    Args:
        of_run: values that the command has no option for, such as a saved run's.
    """
    typed, values = arguments.parser.typed, vars(arguments) | of_run
    actions = {action.dest: action for action in arguments.parser._actions if action.option_strings}
    for rule in _RULES:
        given = [name for name in rule.ignored if name in typed and values[name] is not None]  # --drift none
        if not given or rule.other not in values:
            continue
        value = values[rule.other]
        if rule.other in typed if rule.value is None else rule.value(value):
            option = actions[given[0]].option_strings[0]
            got = option if values[given[0]] is True else _plain(values[given[0]])
            if rule.value is None:
                other = actions[rule.other].option_strings[0]
                raise ValueError(
                    f"{option}: expected {option} or {other}, not both: {rule.why}; got {got} and {_plain(value)}"
                )
            beside = _shown(actions.get(rule.other), rule.other, value)
            why = f", {rule.why}" if rule.why else ""
            raise ValueError(f"{option}: has no effect {beside}{why}: expected no {option}, got {got}")


def _shown(action: argparse.Action | None, name: str, value: Any) -> str:
    if action is None:
        return "without data to evaluate on" if name == "eval" else f"for a run of {value}"
    if value is None:
        return f"without {action.option_strings[0]}"
    if value is True:
        return f"with {action.option_strings[0]}"
    if value is False:
        return f"with {action.option_strings[-1]}"
    return f"with {action.option_strings[0]} {_plain(value)}"


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
