"""``adapterkern route``: train, evaluate."""

import argparse
import dataclasses
from pathlib import Path

from adapterkern.cli.options import (
    ADAPTER_FIELDS,
    AddCommand,
    add_adapter_options,
    add_backbone_options,
    add_training_options,
    model_flags,
)
from adapterkern.cli.saved import evaluation_data, load_saved_backbone, print_metrics, run_sources, save_run_sources
from adapterkern.model.adapter import AdapterConfig

HELP = """\
Train adapters among which a router chooses for each text: one of them, at most --top-k of them, or none.

  adapterkern route train --model SmolLM2.gguf --train mixed.jsonl --eval test.jsonl --output run \\
      --layers=-2,-1 --adapter-dim 16 --experts 4 --cost 0.1
  adapterkern route evaluate run

--cost says by how many nats an adapter must lower a text's loss to be worth running; --no-skip runs one always.
"""
_ROUTING_HELP = {
    "experts": "adapters to choose among",
    "top_k": "at most so many run in a text",
    "skip": "let a text run none",
    "gate": "weight of a chosen adapter: its probability, or 1 with the gradient integrated from none to it",
    "noise": "of the choice in training: 1 draws by probability, 0 never explores",
    "balance": "coefficient of the load-balancing loss",
    "cost": "coefficient of the probability of running anything",
    "free_epochs": "epochs before the cost counts",
}


def add(command: AddCommand) -> None:
    parser = command("route", run_train, "experts that a router chooses among: train, evaluate", HELP)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    train = actions.add_parser("train", help="train router, experts and head", allow_abbrev=False)
    train.set_defaults(run=run_train)
    add_backbone_options(train, required=True)
    train.add_argument("--train", required=True, metavar="FILE", help="JSONL, CSV or TSV to learn from")
    train.add_argument("--eval", metavar="FILE", help="the same, to evaluate on")
    _add_routing_options(train)
    add_adapter_options(train)
    add_training_options(train)

    evaluate = actions.add_parser("evaluate", help="scores and routes of a saved run", allow_abbrev=False)
    evaluate.set_defaults(run=run_evaluate)
    evaluate.add_argument("directory", type=Path, help="the --output of a training, or one of its checkpoints")
    evaluate.add_argument("--data", metavar="FILE", help="JSONL, CSV or TSV; default: the run's own --eval")
    add_backbone_options(evaluate, required=False)


def _add_routing_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ``RoutingConfig``."""
    group = parser.add_argument_group("routing", "defaults in brackets")
    try:
        from adapterkern.recipes.routing.router import GATES, RoutingConfig
    except ImportError:  # the extra is missing: --help still works, and running says what to install
        return
    for field in dataclasses.fields(RoutingConfig):
        option, shown = f"--{field.name.replace('_', '-')}", f"{_ROUTING_HELP[field.name]} [{field.default}]"
        if isinstance(field.default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default, help=shown)
        else:
            kind = type(field.default)
            metavar = {int: "N", float: "X", str: None}[kind]
            choices = GATES if field.name == "gate" else None
            group.add_argument(option, type=kind, choices=choices, default=field.default, metavar=metavar, help=shown)


def run_train(arguments: argparse.Namespace) -> int:
    import torch

    from adapterkern.model.backbone import load_backbone
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.recipes.routing.router import RoutingConfig
    from adapterkern.recipes.routing.task import RoutedTask
    from adapterkern.training import TrainConfig, train

    values = vars(arguments)
    config = TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})
    routing = RoutingConfig(**{field.name: values[field.name] for field in dataclasses.fields(RoutingConfig)})
    adapters = AdapterConfig(**{name: values[name] for name in ADAPTER_FIELDS})
    dtype = arguments.dtype or "fp32"
    llama, tokenizer = load_backbone(arguments.model, num_layers=arguments.backbone_layers, dtype=dtype)
    torch.manual_seed(config.seed)
    task = RoutedTask(LlamaAdapter(llama, adapters, **model_flags(arguments)), routing)
    result = train(
        task.model,
        arguments.train,
        config,
        tokenizer=tokenizer,
        eval_data=arguments.eval,
        task=task,
        on_start=lambda: save_run_sources(arguments),
    )
    if result.stopped:
        return 130
    print_metrics(result.metrics or {})
    size = f"{result.trainable_parameters:,} parameters"
    print(f"saved in {config.output_dir}: {size}, {result.steps} steps in {result.seconds:.0f} s")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    from adapterkern.recipes.routing.task import RoutedTask
    from adapterkern.training import evaluate
    from adapterkern.training.saved import load_config

    sources, config = run_sources(arguments), load_config(arguments.directory)
    data = evaluation_data(arguments, sources)
    llama, tokenizer = load_saved_backbone(arguments, sources)
    task = RoutedTask.from_pretrained(llama, arguments.directory, **model_flags(arguments))
    print_metrics(evaluate(task.model, data, config, tokenizer=tokenizer, task=task))
    return 0
