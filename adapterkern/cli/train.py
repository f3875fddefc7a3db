"""``adapterkern train``."""

import argparse
from typing import Any

from adapterkern.cli.options import add_adapter_options, add_backbone_options, add_data_options, add_training_options
from adapterkern.cli.run import Job, adapted, train_run
from adapterkern.training.config import TrainConfig

NAME, SUMMARY = "train", "train adapters on your data"
HELP = """\
Train adapters (and a classification head) on a frozen LLaMA.

  # labels: reviews.csv has the columns text and label
  adapterkern train --model SmolLM2.gguf --train reviews.csv --eval test.csv --output run --every 2

  # language modeling: qa.jsonl has the keys prompt and completion, or messages
  adapterkern train --model ./llama --train qa.jsonl --output run --task causal-lm --precision bf16

Ctrl-C stops after the running step and leaves a checkpoint; the same command with --resume continues from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_backbone_options(parser)
    add_data_options(parser)
    add_adapter_options(parser)
    add_training_options(parser)


def run(arguments: argparse.Namespace) -> int:
    def job(llama: Any, tokenizer: Any, config: TrainConfig) -> Job:
        return Job(adapted(arguments, llama), arguments.train, arguments.eval)

    return train_run(arguments, job)
