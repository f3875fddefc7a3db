"""Options that several commands share: the backbone's, the adapters', the training's."""

import argparse
import dataclasses
from collections.abc import Callable, Collection
from typing import Protocol

from adapterkern.model.adapter import INITS, POSITIONS, AdapterConfig
from adapterkern.ops.operator import MAX_ADAPTER_DIM
from adapterkern.ops.reference import ACTIVATIONS
from adapterkern.training import config

ADAPTER_FIELDS = ("adapter_dim", "max_params", "position", "every", "layers", "depth", "activation", "init")


class AddCommand(Protocol):
    """Adds a command that runs ``run(arguments)``, which returns the exit status; returns its parser."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str = ""
    ) -> argparse.ArgumentParser: ...


def count(text: str) -> int:
    value = float(text)
    if not value.is_integer() or value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number such as 8000000 or 8e6, got {text!r}")
    return int(value)


def layer_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_backbone_options(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group("backbone")
    group.add_argument("--model", required=required, help="a .gguf file, transformers folder or hub name")
    group.add_argument("--backbone-layers", type=int, metavar="N", help="keep only the first N decoder layers")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the backbone's weights; default fp32")
    group.add_argument("--unfused", action="store_true", help="run the adapters as plain PyTorch modules")
    group.add_argument("--liger", action="store_true", help="run Liger's kernels in the backbone; on a GPU")


def model_flags(arguments: argparse.Namespace) -> dict[str, bool]:
    """What the options of :func:`add_backbone_options` say to a ``LlamaAdapter``."""
    return {"fused": not arguments.unfused, "liger": arguments.liger}


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    group, default = parser.add_argument_group("adapters"), AdapterConfig()
    group.add_argument("--adapter-dim", type=int, default=64, metavar="R", help=f"1 to {MAX_ADAPTER_DIM}; default 64")
    group.add_argument("--max-params", type=count, metavar="N", help="take the largest --adapter-dim that fits")
    group.add_argument("--position", choices=POSITIONS, default=default.position, help="default %(default)s")
    group.add_argument("--every", type=int, default=1, metavar="K", help="layers K-1, 2K-1, ...; default 1")
    group.add_argument("--layers", type=layer_list, metavar="I,J,...", help="these layers: --layers=-2,-1 the last two")
    group.add_argument("--depth", type=int, default=1, metavar="N", help="adapters in sequence at a site; default 1")
    group.add_argument("--activation", choices=tuple(ACTIVATIONS), default=default.activation, help="default silu")
    group.add_argument("--init", choices=INITS, default=default.init, help="default identity: y = x at the start")


def add_training_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """One option for each field of ``TrainConfig``, but those in ``without``."""
    group = parser.add_argument_group("training", "defaults in brackets")
    choices = {
        "task": config.TASKS,
        "pooling": config.POOLINGS,
        "padding": config.PADDINGS,
        "padding_side": config.PADDING_SIDES,
        "schedule": config.SCHEDULES,
        "precision": config.PRECISIONS,
    }
    for field in dataclasses.fields(config.TrainConfig):
        if field.name in without:
            continue
        if field.name == "output_dir":
            group.add_argument("--output", dest="output_dir", required=True, metavar="DIR", help="where all is written")
            continue
        option, default = f"--{field.name.replace('_', '-')}", field.default
        shown = TRAINING_HELP[field.name] + ("" if default is None else f" [{default}]")
        kinds = getattr(field.type, "__args__", (field.type,))
        if bool in kinds:
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=default, help=shown)
            continue
        kind = next(kind for kind in (float, int, str) if kind in kinds)
        metavar = None if field.name in choices else {float: "X", int: "N", str: "NAME"}[kind]
        group.add_argument(
            option, type=kind, choices=choices.get(field.name), default=default, metavar=metavar, help=shown
        )


TRAINING_HELP = {
    "task": "classification learns a label for each text, causal-lm the next token",
    "train_adapters": "--no-train-adapters trains the head alone",
    "pooling": "the head reads the mean of the tokens' states, or the last one's",
    "text_column": "column of the texts",
    "label_column": "column of the labels",
    "prompt_column": "causal-lm: column of the prompt, of which nothing is learnt",
    "completion_column": "causal-lm: column of what is learnt after the prompt",
    "max_length": "tokens a row; longer rows lose their end",
    "skip_bad_rows": "leave bad rows out with a warning instead of refusing the file",
    "batch_size": "rows in one forward",
    "accumulation": "forwards in one optimizer step",
    "eval_batch_size": "rows in one forward of an evaluation; default --batch-size",
    "padding": "pad to the longest row of a batch, or always to --max-length",
    "padding_side": "side of the padding",
    "seed": "of the new weights and the order of rows",
    "epochs": "passes over the data",
    "max_steps": "optimizer steps, instead of --epochs",
    "lr": "AdamW's learning rate after the warmup",
    "weight_decay": "of matrices; biases and norms do not decay",
    "beta1": "AdamW's",
    "beta2": "AdamW's",
    "eps": "AdamW's",
    "max_norm": "largest global norm of the gradient; inf does not clip",
    "schedule": "of the learning rate after the warmup: to 0 by a line or a cosine, or constant",
    "warmup": "steps of linear warmup, or below 1 their share of all steps",
    "precision": "bf16 and fp16 run under autocast, fp16 with a gradient scaler",
    "max_skipped_steps": "so many steps in a row that the fp16 scaler skips are an error",
    "shard": "of several processes (torchrun) each holds a part of the backbone (FSDP2), not all of it",
    "overwrite": "replace an earlier run in --output",
    "resume": "go on from the newest checkpoint in --output",
    "checkpoint_every": "steps between checkpoints; default each epoch's end",
    "keep_checkpoints": "how many checkpoints stay",
    "eval_every": "steps between evaluations; default each epoch's end",
    "log_every": "steps between log lines",
    "progress": "show a progress bar",
    "plot": "draw training.png",
    "prefix_cache": "compute the layers below the first adapter once a text; default where it pays",
    "prefix_cache_bytes": "of it in memory; the rest goes to a memory-mapped temporary file",
}
