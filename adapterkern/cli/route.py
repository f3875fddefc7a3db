"""``adapterkern route``: train, evaluate."""

import argparse
from typing import Any

from adapterkern.cli.options import (
    adapter_config,
    add_adapter_options,
    add_backbone_options,
    add_data_options,
    add_drift_option,
    add_options,
    add_report_options,
    add_saved_options,
    add_training_options,
    from_options,
)
from adapterkern.cli.run import Job, adapted, check_mixed, check_train_and_eval, train_run
from adapterkern.cli.saved import evaluate_run
from adapterkern.training.config import TrainConfig

NAME, SUMMARY = "route", "experts that a router chooses among: train, evaluate"
HELP = """\
Train adapters that a router chooses from for each text, or each token: one of them, at most --top-k of them, or none.

  adapterkern route train --model SmolLM2.gguf --train mixed.jsonl --eval test.jsonl --output run \\
      --layers=-2,-1 --adapter-dim 16 --experts 4 --cost 0.1
  adapterkern eval run
  adapterkern route train --model SmolLM2.gguf --train pairs.jsonl --output run --task causal-lm --per token --top-k 2

--cost says by how many nats an adapter must lower a text's loss to be worth running; --no-skip always runs one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from adapterkern.recipes.routing.router import RoutingConfig

    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train router, experts and head", allow_abbrev=False)
    add_backbone_options(train, mixes=True)
    add_data_options(train)
    add_options(train.add_argument_group("routing", "defaults in brackets"), RoutingConfig)
    add_adapter_options(train)
    add_training_options(train)
    evaluate = actions.add_parser("evaluate", help="the same as adapterkern eval", allow_abbrev=False)
    add_saved_options(evaluate)
    add_drift_option(evaluate)
    add_report_options(evaluate)


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "evaluate":
        return evaluate_run(arguments)
    from adapterkern.model.mixing import check_routable
    from adapterkern.recipes.routing.router import RoutingConfig
    from adapterkern.recipes.routing.task import RoutedTask

    routing = from_options(arguments, RoutingConfig)

    def job(llama: Any, tokenizer: Any, config: TrainConfig) -> Job:
        task = RoutedTask(adapted(arguments, llama, show=False), routing)  # one of several experts
        return Job(task.model, arguments.train, arguments.eval, task)

    def check(config: TrainConfig) -> None:
        check_mixed("--modules-to-save", adapter_config(arguments), config)
        check_routable({"": adapter_config(arguments)})
        check_train_and_eval(arguments.train, arguments.eval, config)

    return train_run(arguments, job, check=check, kind=RoutedTask, one_adapter=False)
