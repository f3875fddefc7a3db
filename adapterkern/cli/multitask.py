"""``adapterkern multitask``."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from adapterkern import checks
from adapterkern.cli.options import (
    FORMATS,
    OF_PLAIN_LOSS,
    adapter_config,
    add_adapter_options,
    add_backbone_options,
    add_drift_option,
    add_training_options,
    model_flags,
    number,
)
from adapterkern.cli.run import Job, check_mixed, check_rows, say, sources_of, train_run
from adapterkern.cli.together import check_together
from adapterkern.model.config import AdapterConfig, applicable, check_name
from adapterkern.training.config import TrainConfig

NAME, SUMMARY = "multitask", "train adapters for several tasks at once"
HELP = """\
Train adapters for several tasks on one backbone, from batches that mix the tasks.

  adapterkern multitask --model SmolLM2.gguf --output run \\
      --data reviews reviews.csv reviews-test.csv --data topics topics.csv topics-test.csv

The adapter options hold for every task; --adapters sets fields of AdapterConfig for one:

      --layers=-3,-2,-1 --adapters topics '{"adapter_dim": 32, "layers": [-1]}'

Every task is saved by itself, and is used like one that was trained alone: adapterkern eval run/tasks/reviews
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_backbone_options(parser, mixes=True)
    parser.add_argument(
        "--data",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "FILE"),
        help=f"a task, what to learn from, and optionally what to evaluate on: {FORMATS}",
    )
    add_drift_option(parser)
    parser.add_argument(
        "--temperature",
        type=number,
        default=1.0,
        metavar="T",
        help="a task of n rows has a share of n^(1/T): 1 in proportion, inf equal shares [1.0]",
    )
    parser.add_argument(
        "--adapters", nargs=2, action="append", default=[], metavar=("NAME", "JSON"), help="one task's own adapter"
    )
    add_adapter_options(parser)
    add_training_options(parser, without=OF_PLAIN_LOSS)


def run(arguments: argparse.Namespace) -> int:
    files = _files(arguments.data)
    if all(len(of_task) == 1 for of_task in files.values()):
        check_together(arguments, eval=None)
    checks.number("--temperature", arguments.temperature, "[1, inf]")
    adapters = _adapters(arguments, list(files))

    def job(llama: Any, tokenizer: Any, config: TrainConfig) -> Job:
        import torch

        from adapterkern.model.llama import LlamaAdapter
        from adapterkern.recipes.multitask.task import MultiTask

        model = LlamaAdapter(llama, None, **model_flags(arguments))
        for name, adapter in adapters.items():
            torch.manual_seed(config.seed)  # as if each were the only one
            model.add_adapter(name, adapter)
            say(f"{name}: {sum(p.numel() for p in model.adapter_parameters(name)):,} adapter parameters")
        train_files = {name: of_task[0] for name, of_task in files.items()}
        eval_files = {name: of_task[1] for name, of_task in files.items() if len(of_task) == 2}
        sources = {
            f"{MultiTask.folder('', name)}": sources_of(arguments, eval_files.get(name), tokenizer) for name in files
        }
        task = MultiTask(model, list(files), temperature=arguments.temperature)
        return Job(model, train_files, eval_files or None, task, sources)

    def check(config: TrainConfig) -> None:
        from adapterkern.recipes.multitask.examples import check_task

        check_task(config)
        for name, of_task in files.items():
            option = "--modules-to-save" if arguments.modules_to_save else f"--adapters {name}"
            check_mixed(option, adapters[name], config)
            labels = None
            for path in of_task:  # the second may have the labels of the first
                labels = check_rows(f"--data {name}", path, config, labels)

    return train_run(arguments, job, check=check, one_adapter=False)


def _files(data: list[list[str]]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name, *of_task in data:
        if not 1 <= len(of_task) <= 2:
            raise ValueError(
                "--data: expected a name, a file to learn from, and optionally one to evaluate on, as in "
                f"--data reviews reviews.csv reviews-test.csv; got {' '.join([name, *of_task])}"
            )
        if Path(check_name(name, "--data")).name != name:
            raise ValueError(f"--data: expected a task's name that a folder can have, got {name}")
        if name in files:
            raise ValueError(f"--data: expected each name once, got {name} twice")
        files[name] = of_task
    return files


def _adapters(arguments: argparse.Namespace, names: list[str]) -> dict[str, AdapterConfig]:
    """Each task's configuration: the options, and over them the task's own fields."""
    own: dict[str, dict[str, Any]] = {}
    for name, text in arguments.adapters:
        if name not in names:
            raise ValueError(f"--adapters: expected a task among {', '.join(names)}, got {name!r}")
        if name in own:
            raise ValueError(f"--adapters: expected each task once, got {name} twice")
        try:
            own[name] = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--adapters: expected a JSON object of fields, got {text}: {error}") from error
        if not isinstance(own[name], dict):
            raise ValueError(f"--adapters: expected a JSON object of fields, got {text}")
    shared = dataclasses.asdict(adapter_config(arguments))
    # Of two answers to one question the task's own holds.
    for fields in own.values():
        for one, other in (("adapter_dim", "max_params"), ("max_params", "adapter_dim"), ("every", "layers")):
            if one in fields and other not in fields:
                fields[other] = getattr(AdapterConfig(), other)
        if "layers" in fields and "every" not in fields:
            fields["every"] = 1
    configs = {}
    for name in names:
        try:
            asked = own.get(name, {})
            configs[name] = AdapterConfig.from_dict(applicable(shared | asked, asked if "kind" in asked else shared))
        except (TypeError, ValueError) as error:
            raise type(error)(f"--adapters {name}: {error}") from error
    return configs
