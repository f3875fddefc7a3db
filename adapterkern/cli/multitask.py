"""``adapterkern multitask``."""

import argparse
import dataclasses
import json
import os
from typing import Any

from adapterkern.cli.options import (
    ADAPTER_FIELDS,
    AddCommand,
    add_adapter_options,
    add_backbone_options,
    add_training_options,
    model_flags,
)
from adapterkern.model.adapter import AdapterConfig

HELP = """\
Train adapters for several tasks on one backbone, from batches that mix the tasks.

  adapterkern multitask --model SmolLM2.gguf --output run \\
      --data reviews reviews.csv reviews-test.csv --data topics topics.csv topics-test.csv

The adapter options hold for every task; --adapters sets fields of AdapterConfig for one:

      --layers=-3,-2,-1 --adapters topics '{"adapter_dim": 32, "layers": [-1]}'

Every task is saved by itself, and is used like one that was trained alone: adapterkern eval run/tasks/reviews
"""


def add(command: AddCommand) -> None:
    parser = command("multitask", run, "train adapters for several tasks at once", HELP)
    add_backbone_options(parser, required=True)
    parser.add_argument(
        "--data",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "FILE"),
        help="a task, the file to learn from, and maybe one to evaluate on; JSONL, CSV or TSV",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="a task of n rows has a share of n^(1/T): 1 in proportion, inf all alike [1.0]",
    )
    parser.add_argument(
        "--adapters", nargs=2, action="append", default=[], metavar=("NAME", "JSON"), help="one task's own adapter"
    )
    add_adapter_options(parser)
    add_training_options(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from adapterkern.model.backbone import load_backbone
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.recipes.multitask.task import MultiTask
    from adapterkern.training import TrainConfig, train
    from adapterkern.training.saved import Sources, save_sources

    values = vars(arguments)
    config = TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})
    files = _files(arguments.data)
    adapters = _adapters(values, list(files))
    dtype = arguments.dtype or "fp32"
    llama, tokenizer = load_backbone(arguments.model, num_layers=arguments.backbone_layers, dtype=dtype)
    model = LlamaAdapter(llama, AdapterConfig(adapter_dim=1, layers=[0]), **model_flags(arguments))
    model.delete_adapter("default")
    for name, adapter in adapters.items():
        torch.manual_seed(config.seed)  # as if each were the only one
        model.add_adapter(name, adapter)
        print(f"{name}: {sum(p.numel() for p in model.adapter_parameters(name)):,} adapter parameters")
    task: Any = MultiTask(model, list(files), temperature=arguments.temperature)
    train_files: Any = {name: of_task[0] for name, of_task in files.items()}
    eval_files: Any = {name: of_task[1] for name, of_task in files.items() if len(of_task) == 2}

    def save_run_sources() -> None:
        for name in files:
            eval_data = os.path.abspath(eval_files[name]) if name in eval_files else None
            sources = Sources(arguments.model, arguments.backbone_layers, dtype, eval_data)
            save_sources(task.folder(config.output_dir, name), sources)

    result = train(
        model,
        train_files,
        config,
        tokenizer=tokenizer,
        eval_data=eval_files or None,
        task=task,
        on_start=save_run_sources,
    )
    if result.stopped:
        return 130
    for name in files:
        if result.metrics is not None and f"{name}/accuracy" in result.metrics:
            loss, accuracy = (result.metrics[f"{name}/{key}"] for key in ("loss", "accuracy"))
            print(f"{name}: loss {loss:.4f}, accuracy {accuracy:.2%}")
    print(f"saved in {config.output_dir}: {result.steps} steps in {result.seconds:.0f} s")
    return 0


def _files(data: list[list[str]]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name, *of_task in data:
        if not 1 <= len(of_task) <= 2 or name in files:
            raise ValueError(f"--data: expected NAME TRAIN [EVAL], each name once, got {' '.join([name, *of_task])}")
        files[name] = of_task
    return files


def _adapters(values: dict[str, Any], names: list[str]) -> dict[str, AdapterConfig]:
    """Each task's configuration: the options, and over them the task's own fields."""
    own: dict[str, dict[str, Any]] = {}
    for name, text in values["adapters"]:
        if name not in names:
            raise ValueError(f"--adapters: expected a task among {', '.join(names)}, got {name!r}")
        try:
            own[name] = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--adapters: expected a JSON object of fields, got {text}: {error}") from error
        if not isinstance(own[name], dict):
            raise ValueError(f"--adapters: expected a JSON object of fields, got {text}")
    shared = {name: values[name] for name in ADAPTER_FIELDS}
    return {name: AdapterConfig.from_dict(shared | own.get(name, {})) for name in names}
