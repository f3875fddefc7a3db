"""The command line: ``adapterkern train | eval | demo | doctor | budget``. Each command's ``--help`` shows its use."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapterkern import __version__
from adapterkern.doctor import report
from adapterkern.modules import INITS, POSITIONS, AdapterConfig, adapter_num_params, largest_adapter_dim
from adapterkern.ops import MAX_ADAPTER_DIM
from adapterkern.reference import ACTIVATIONS

# (hidden size, decoder layers)
SHAPES = {
    "llama-7b": (4096, 32),
    "llama-13b": (5120, 40),
    "llama-33b": (6656, 60),
    "llama-65b": (8192, 80),
    "llama-2-7b": (4096, 32),
    "llama-2-13b": (5120, 40),
    "llama-2-70b": (8192, 80),
    "llama-3-8b": (4096, 32),
    "llama-3-70b": (8192, 80),
    "llama-3.2-1b": (2048, 16),
    "llama-3.2-3b": (3072, 28),
    "mistral-7b": (4096, 32),
    "smollm2-135m": (576, 30),
    "smollm2-1.7b": (2048, 24),
}

_TRAIN_HELP = """\
Train adapters (and a classification head) on a frozen LLaMA.

  # labels: reviews.csv has the columns text and label
  adapterkern train --model SmolLM2.gguf --train reviews.csv --eval test.csv --output run --every 2

  # language modelling: qa.jsonl has the keys prompt and completion
  adapterkern train --model ./llama --train qa.jsonl --output run --task causal-lm --precision bf16

Ctrl-C stops after the running step and leaves a checkpoint; the same command with --resume goes on from there.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an error that was reported, 130 for an interrupted run."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(f"adapterkern {arguments.command}: {error}; pip install 'adapterkern[train]'", file=sys.stderr)
    except (OSError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("ADAPTERKERN_TRACEBACK"):
            raise
        print(f"adapterkern {arguments.command}: {error}", file=sys.stderr)
        print("(ADAPTERKERN_TRACEBACK=1 shows where)", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adapterkern", description="Bottleneck adapters on a frozen LLaMA.")
    parser.add_argument("--version", action="version", version=f"adapterkern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=description or summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "train adapters on your data", _TRAIN_HELP)
    _add_backbone_options(train, required=True)
    train.add_argument("--train", required=True, metavar="FILE", help="JSONL, CSV or TSV to learn from")
    train.add_argument("--eval", metavar="FILE", help="the same, to evaluate on")
    _add_adapter_options(train)
    _add_training_options(train)

    evaluate = command(
        "eval",
        _eval,
        "evaluate a saved run",
        "Evaluate a run's adapter (and head) on a file: by default on the one that it was trained with.\n\n"
        "  adapterkern eval run\n  adapterkern eval run --data other.csv",
    )
    evaluate.add_argument("directory", type=Path, help="the --output of a training, or one of its checkpoints")
    evaluate.add_argument("--data", metavar="FILE", help="JSONL, CSV or TSV; default: the run's own --eval")
    _add_backbone_options(evaluate, required=False)

    demo = command(
        "demo",
        _demo,
        "adapters on a real LLaMA and real texts, in minutes on a CPU",
        "Fetch SmolLM2-135M and Reuters R8 (130 MB, once), train a head alone and adapters on the first 8 layers, and\n"
        "compare them on texts that training never saw. With --model, --train and --eval: the same on your own.",
    )
    demo.add_argument("--model", help="a .gguf file, transformers folder or hub name instead of SmolLM2-135M")
    demo.add_argument("--train", type=Path, metavar="FILE", help="JSONL, CSV or TSV with text and label")
    demo.add_argument("--eval", type=Path, metavar="FILE", help="the same, unseen in training")
    demo.add_argument(
        "--output", type=Path, default=Path("adapterkern-demo"), metavar="DIR", help="default %(default)s"
    )
    demo.add_argument("--backbone-layers", type=int, default=8, metavar="N", help="first layers used; default 8")

    command("doctor", _doctor, "what is installed, what will run where, and why")

    budget = command(
        "budget",
        _budget,
        "which adapters fit a number of parameters",
        "List (every, adapter_dim) that fit a budget of trainable parameters.\n\n"
        "  adapterkern budget --model-config llama-7b --max-params 8e6",
    )
    budget.add_argument(
        "--model-config",
        required=True,
        metavar="NAME",
        help=f"a transformers config.json or its folder, or one of: {', '.join(SHAPES)}",
    )
    budget.add_argument("--max-params", type=_count, required=True, metavar="N", help="such as 8000000 or 8e6")
    budget.add_argument("--depth", type=int, default=1, metavar="N", help="adapters in sequence at a site; default 1")
    return parser


def _count(text: str) -> int:
    value = float(text)
    if not value.is_integer() or value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number such as 8000000 or 8e6, got {text!r}")
    return int(value)


def _layer_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _add_backbone_options(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group("backbone")
    group.add_argument("--model", required=required, help="a .gguf file, transformers folder or hub name")
    group.add_argument("--backbone-layers", type=int, metavar="N", help="keep only the first N decoder layers")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the backbone's weights; default fp32")
    group.add_argument("--unfused", action="store_true", help="run the adapters as plain PyTorch modules")


def _add_adapter_options(parser: argparse.ArgumentParser) -> None:
    group, default = parser.add_argument_group("adapters"), AdapterConfig()
    group.add_argument("--adapter-dim", type=int, default=64, metavar="R", help=f"1 to {MAX_ADAPTER_DIM}; default 64")
    group.add_argument("--max-params", type=_count, metavar="N", help="take the largest --adapter-dim that fits")
    group.add_argument("--position", choices=POSITIONS, default=default.position, help="default %(default)s")
    group.add_argument("--every", type=int, default=1, metavar="K", help="layers K-1, 2K-1, ...; default 1")
    group.add_argument(
        "--layers", type=_layer_list, metavar="I,J,...", help="these layers: --layers=-2,-1 the last two"
    )
    group.add_argument("--depth", type=int, default=1, metavar="N", help="adapters in sequence at a site; default 1")
    group.add_argument("--activation", choices=tuple(ACTIVATIONS), default=default.activation, help="default silu")
    group.add_argument("--init", choices=INITS, default=default.init, help="default identity: y = x at the start")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ``TrainConfig``."""
    group = parser.add_argument_group("training", "defaults in brackets")
    try:
        from adapterkern.training import config
    except ImportError:  # the extra is missing: --help still works, and running says what to install
        return
    choices = {
        "task": config.TASKS,
        "pooling": config.POOLINGS,
        "padding": config.PADDINGS,
        "padding_side": config.PADDING_SIDES,
        "schedule": config.SCHEDULES,
        "precision": config.PRECISIONS,
    }
    for field in dataclasses.fields(config.TrainConfig):
        if field.name == "output_dir":
            group.add_argument("--output", dest="output_dir", required=True, metavar="DIR", help="where all is written")
            continue
        option, default = f"--{field.name.replace('_', '-')}", field.default
        shown = _TRAINING_HELP[field.name] + ("" if default is None else f" [{default}]")
        kinds = getattr(field.type, "__args__", (field.type,))
        if bool in kinds:
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=default, help=shown)
            continue
        kind = next(kind for kind in (float, int, str) if kind in kinds)
        metavar = None if field.name in choices else {float: "X", int: "N", str: "NAME"}[kind]
        group.add_argument(
            option, type=kind, choices=choices.get(field.name), default=default, metavar=metavar, help=shown
        )


_TRAINING_HELP = {
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


def _train(arguments: argparse.Namespace) -> int:
    import torch

    from adapterkern.llama import LlamaAdapter
    from adapterkern.training import TrainConfig, train
    from adapterkern.training.backbone import Sources, load_backbone, save_sources

    values = vars(arguments)
    config = TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})
    adapters = AdapterConfig(**{name: values[name] for name in _adapter_fields()})
    dtype = arguments.dtype or "fp32"
    llama, tokenizer = load_backbone(arguments.model, num_layers=arguments.backbone_layers, dtype=dtype)
    torch.manual_seed(config.seed)
    model = LlamaAdapter(llama, adapters, fused=not arguments.unfused)
    model.print_trainable_parameters()
    result = train(model, arguments.train, config, tokenizer=tokenizer, eval_data=arguments.eval)
    eval_data = None if arguments.eval is None else os.path.abspath(arguments.eval)
    save_sources(config.output_dir or ".", Sources(arguments.model, arguments.backbone_layers, dtype, eval_data))
    if result.stopped:
        return 130
    print(f"saved in {config.output_dir}: {result.steps} steps in {result.seconds:.0f} s")
    return 0


def _adapter_fields() -> list[str]:
    return ["adapter_dim", "max_params", "position", "every", "layers", "depth", "activation", "init"]


def _eval(arguments: argparse.Namespace) -> int:
    from adapterkern.llama import LlamaAdapter
    from adapterkern.training import evaluate, load_task
    from adapterkern.training.backbone import load_backbone, load_sources

    sources = load_sources(arguments.directory)
    config, head = load_task(arguments.directory)
    data = arguments.data or sources.eval_data
    if data is None:
        raise ValueError(f"--data: expected a file, because {arguments.directory} was trained without --eval; got none")
    llama, tokenizer = load_backbone(
        arguments.model or sources.model,
        num_layers=arguments.backbone_layers or sources.num_layers,
        dtype=arguments.dtype or sources.dtype,
    )
    if config.train_adapters:
        model = LlamaAdapter.from_pretrained(llama, arguments.directory, fused=not arguments.unfused)
    else:
        model = LlamaAdapter(llama)
    for name, value in evaluate(model, data, config, tokenizer=tokenizer, head=head).items():
        print(f"{name:18} {value:.4f}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from adapterkern.training.demo import run_demo

    runs = run_demo(
        arguments.output, arguments.model, arguments.train, arguments.eval, num_layers=arguments.backbone_layers
    )
    return 0 if len(runs) == 2 else 130


def _doctor(arguments: argparse.Namespace) -> int:
    print("\n".join(report()))
    return 0


def model_shape(name: str) -> tuple[int, int]:
    """(hidden size, decoder layers) of a known model or of a transformers ``config.json``."""
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    from adapterkern.files import read_json

    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"--model-config: expected a config.json, its folder, or one of {', '.join(SHAPES)}; got {name}"
        )
    config = read_json(path)
    try:
        return int(config["hidden_size"]), int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected whole numbers hidden_size and num_hidden_layers: {error}") from error


def _budget(arguments: argparse.Namespace) -> int:
    hidden_size, num_layers = model_shape(arguments.model_config)
    print(f"{arguments.model_config}: hidden_size={hidden_size}, {num_layers} layers; budget {arguments.max_params:,}")
    print(f"{'every':>6} {'adapters':>9} {'adapter_dim':>12} {'parameters':>12} {'of budget':>10}")
    fits = False
    for every in range(1, num_layers + 1):
        count = (num_layers // every) * arguments.depth
        if every > 1 and num_layers // every == num_layers // (every - 1):
            continue  # the same sites a layer or so lower
        dim = largest_adapter_dim(hidden_size, count, arguments.max_params)
        if dim == 0:
            continue
        fits = True
        total = count * adapter_num_params(hidden_size, dim)
        print(f"{every:6} {count:9} {dim:12} {total:12,} {total / arguments.max_params:10.1%}")
    if not fits:
        smallest = arguments.depth * adapter_num_params(hidden_size, 1)
        raise ValueError(f"--max-params: expected at least {smallest:,} for one site, got {arguments.max_params:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
