"""``adapterkern train``."""

import argparse
import dataclasses

from adapterkern.cli.options import (
    ADAPTER_FIELDS,
    AddCommand,
    add_adapter_options,
    add_backbone_options,
    add_training_options,
    model_flags,
)
from adapterkern.cli.saved import save_run_sources
from adapterkern.model.adapter import AdapterConfig

HELP = """\
Train adapters (and a classification head) on a frozen LLaMA.

  # labels: reviews.csv has the columns text and label
  adapterkern train --model SmolLM2.gguf --train reviews.csv --eval test.csv --output run --every 2

  # language modelling: qa.jsonl has the keys prompt and completion
  adapterkern train --model ./llama --train qa.jsonl --output run --task causal-lm --precision bf16

Ctrl-C stops after the running step and leaves a checkpoint; the same command with --resume goes on from there.
"""


def add(command: AddCommand) -> None:
    parser = command("train", run, "train adapters on your data", HELP)
    add_backbone_options(parser, required=True)
    parser.add_argument("--train", required=True, metavar="FILE", help="JSONL, CSV or TSV to learn from")
    parser.add_argument("--eval", metavar="FILE", help="the same, to evaluate on")
    add_adapter_options(parser)
    add_training_options(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from adapterkern.model.backbone import load_backbone
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.training import TrainConfig, processes, train

    values = vars(arguments)
    config = TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})
    adapters = AdapterConfig(**{name: values[name] for name in ADAPTER_FIELDS})
    dtype = arguments.dtype or "fp32"
    llama, tokenizer = load_backbone(arguments.model, num_layers=arguments.backbone_layers, dtype=dtype)
    torch.manual_seed(config.seed)
    model = LlamaAdapter(llama, adapters, **model_flags(arguments))
    model.print_trainable_parameters()
    result = train(
        model,
        arguments.train,
        config,
        tokenizer=tokenizer,
        eval_data=arguments.eval,
        on_start=lambda: save_run_sources(arguments),
    )
    if processes.rank() > 0:
        return 130 if result.stopped else 0
    if result.stopped:
        return 130
    print(f"saved in {config.output_dir}: {result.steps} steps in {result.seconds:.0f} s")
    return 0
