"""``adapterkern distill``."""

import argparse
import dataclasses

from adapterkern.cli.options import (
    ADAPTER_FIELDS,
    AddCommand,
    add_adapter_options,
    add_backbone_options,
    add_training_options,
    count,
    model_flags,
)
from adapterkern.cli.saved import save_run_sources
from adapterkern.model.adapter import AdapterConfig

HELP = """\
Train adapters on a teacher's soft labels: (1 - W) * cross-entropy + W * T^2 * divergence.

  # the first 8 layers learn from all of them; nothing is loaded twice
  adapterkern distill --model SmolLM2.gguf --backbone-layers 8 --teacher whole --train texts.jsonl --output run

  # another teacher with the same vocabulary
  adapterkern distill --model SmolLM2.gguf --teacher ./SmolLM2-1.7B --train texts.jsonl --output run

  # learn a task, and stay what you were on other texts: the teacher is the model with its adapters off
  adapterkern distill --model SmolLM2.gguf --train qa.jsonl --keep texts.jsonl --output run
  adapterkern distill --model SmolLM2.gguf --train reviews.csv --task classification --keep texts.jsonl --output run

texts.jsonl has the key text, qa.jsonl prompt and completion, reviews.csv the columns text and label.
"""


def add(command: AddCommand) -> None:
    parser = command("distill", run, "train adapters on a teacher's soft labels, or hold a model to itself", HELP)
    add_backbone_options(parser, required=True)
    parser.add_argument("--train", required=True, metavar="FILE", help="JSONL, CSV or TSV to learn from")
    parser.add_argument("--eval", metavar="FILE", help="the same, to evaluate on")
    group = parser.add_argument_group("soft labels")
    group.add_argument(
        "--teacher",
        default="itself",
        metavar="WHICH",
        help="itself: the model with its adapters off; whole: all layers where --backbone-layers cuts them; "
        "or a .gguf file, transformers folder or hub name; default %(default)s",
    )
    group.add_argument("--keep", metavar="FILE", help="texts on which to stay with the teacher, beside the task")
    group.add_argument("--eval-keep", metavar="FILE", help="the same, to evaluate on")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="softens both; default 1")
    group.add_argument("--weight", type=float, default=0.5, metavar="W", help="0 to 1, of the soft labels; default 0.5")
    group.add_argument("--divergence", choices=("kl", "js"), default="kl", help="KL(teacher‖student) or Jensen–Shannon")
    group.add_argument("--chunk-tokens", type=count, default=256, metavar="N", help="logits at a time; default 256")
    add_adapter_options(parser)
    add_training_options(parser)
    parser.set_defaults(task="causal-lm")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from adapterkern.model.backbone import load_backbone
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.recipes.distillation.task import Distillation, KeepBehaviour, WithKept, first_layers
    from adapterkern.training import TrainConfig, train

    values = vars(arguments)
    config = TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})
    adapters = AdapterConfig(**{name: values[name] for name in ADAPTER_FIELDS})
    dtype = arguments.dtype or "fp32"
    if arguments.eval_keep and not arguments.eval:
        raise ValueError("--eval: expected a file together with --eval-keep, got none")
    if arguments.teacher == "whole" and arguments.backbone_layers is None:
        raise ValueError("--backbone-layers: expected a number of layers together with --teacher whole, got none")
    whole, tokenizer = load_backbone(arguments.model, dtype=dtype)
    llama = whole if arguments.backbone_layers is None else first_layers(whole, arguments.backbone_layers)
    teacher = whole if arguments.teacher == "whole" else None
    if arguments.teacher not in ("itself", "whole"):
        teacher, other = load_backbone(arguments.teacher, dtype=dtype)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"--teacher: expected the tokens of {arguments.model}, got others in {arguments.teacher}")
    torch.manual_seed(config.seed)
    model = LlamaAdapter(llama, adapters, **model_flags(arguments))
    model.print_trainable_parameters()
    settings = {name: values[name] for name in ("temperature", "weight", "divergence", "chunk_tokens")}
    data: dict[str, object] = {"train": arguments.train, "eval": arguments.eval}
    if arguments.keep or arguments.eval_keep:
        task: Distillation | KeepBehaviour = KeepBehaviour(model, teacher, **settings)
        for name, kept in (("train", arguments.keep), ("eval", arguments.eval_keep)):
            data[name] = data[name] if kept is None else WithKept(values[name], kept)
    else:
        task = Distillation(model, teacher, **settings)
    result = train(
        model,
        data["train"],  # type: ignore[arg-type]
        config,
        tokenizer=tokenizer,
        eval_data=data["eval"],  # type: ignore[arg-type]
        task=task,
        on_start=lambda: save_run_sources(arguments),
    )
    if result.stopped:
        return 130
    for name, value in (result.metrics or {}).items():
        print(f"{name:24} {value:.4f}")
    print(f"saved in {config.output_dir}: {result.steps} steps in {result.seconds:.0f} s")
    return 0
