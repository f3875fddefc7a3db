"""Options of several commands: made from dataclasses, and turned back into them."""

import argparse
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, get_args

from adapterkern.model.config import AdapterConfig
from adapterkern.training.config import TrainConfig

T = TypeVar("T")


def integer(text: str) -> int:
    """``"8000000"`` or ``"8e6"``."""
    value = float(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"expected an integer such as 8000000 or 8e6, got {text!r}")
    return int(value)


def layer_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def name_list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def add_options(parser: Any, record: type, without: Collection[str] = ()) -> None:
    """One option for each field of a dataclass: type and default are the field's, the help is its metadata's."""
    for field in dataclasses.fields(record):
        if field.name in without:
            continue
        option, choices = f"--{field.name.replace('_', '-')}", field.metadata.get("choices")
        shown = field.metadata["help"] + ("" if field.default is None else " [%(default)s]")
        kinds = get_args(field.type) or (field.type,)
        if bool in kinds:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default, help=shown)
            continue
        parse, metavar = next(parse for kind, parse in _PARSERS if kind in kinds or (kind is str and choices))
        parser.add_argument(
            option, type=parse, choices=choices, default=field.default, metavar=None if choices else metavar, help=shown
        )


_PARSERS: tuple[tuple[Any, tuple[Any, str]], ...] = (
    (tuple[int, ...], (layer_list, "I,J,...")),
    (tuple[str, ...], (name_list, "A,B,...")),
    (float, (float, "X")),
    (int, (integer, "N")),
    (str, (str, "NAME")),
)


def from_options(arguments: argparse.Namespace, record: type[T]) -> T:
    """The dataclass that the options of ``add_options`` describe; its default where there was no option."""
    values, fields = vars(arguments), dataclasses.fields(record)  # type: ignore[arg-type]
    return record(**{field.name: values[field.name] for field in fields if field.name in values})


def add_backbone_options(parser: argparse.ArgumentParser, of_run: bool = False) -> None:
    """The backbone, which a command must name; or, ``of_run``, what to use in place of a saved run's."""
    group = parser.add_argument_group("backbone", "default: the run's own" if of_run else None)
    dtype = "dtype of the backbone's weights" + ("" if of_run else "; default fp32")
    group.add_argument("--model", required=not of_run, help="a .gguf file, transformers folder or hub name")
    group.add_argument("--backbone-layers", type=int, metavar="N", help="keep only the first N decoder layers")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help=dtype)
    group.add_argument("--unfused", action="store_true", help="run the adapters as plain PyTorch modules")
    group.add_argument("--liger", action="store_true", help="run Liger's kernels in the backbone; on a GPU")


LAYERS_HELP = "keep only the first N decoder layers; default 8 of SmolLM2-135M, all of --model"


def demo_layers(arguments: argparse.Namespace) -> int | None:
    """``--backbone-layers``, whose default cuts the demo's backbone and no other."""
    return 8 if arguments.backbone_layers is None and arguments.model is None else arguments.backbone_layers


def model_flags(arguments: argparse.Namespace) -> dict[str, bool]:
    """The keyword arguments of ``LlamaAdapter`` that ``add_backbone_options`` has asked for."""
    return {"fused": not arguments.unfused, "liger": arguments.liger}


def add_data_options(parser: argparse.ArgumentParser, format: str = "JSONL, CSV or TSV") -> None:
    parser.add_argument("--train", required=True, metavar="FILE", help=f"{format} to learn from")
    parser.add_argument("--eval", metavar="FILE", help="the same, to evaluate on")


def add_saved_options(
    parser: argparse.ArgumentParser, format: str = "JSONL, CSV or TSV", data_required: bool = False
) -> None:
    """A saved run, its data and its backbone."""
    parser.add_argument("directory", type=Path, help="the --output of a training, or one of its checkpoints")
    default = "" if data_required else "; default: the run's own --eval"
    parser.add_argument("--data", required=data_required, metavar="FILE", help=format + default)
    add_backbone_options(parser, of_run=True)


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    # eps is the optimizer's on the command line.
    add_options(parser.add_argument_group("adapters", "defaults in brackets"), AdapterConfig, without={"eps"})


def adapter_config(arguments: argparse.Namespace) -> AdapterConfig:
    values = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(AdapterConfig) if f.name != "eps"}
    return AdapterConfig(**values)


def add_training_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """One option for each field of ``TrainConfig``, except those in ``without``."""
    group = parser.add_argument_group("training", "defaults in brackets")
    group.add_argument("--output", dest="output_dir", required=True, metavar="DIR", help="where everything is written")
    add_options(group, TrainConfig, without={"output_dir", *without})
