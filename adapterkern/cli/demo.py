"""``adapterkern demo``."""

import argparse
from pathlib import Path

from adapterkern.cli.options import LAYERS_HELP, demo_layers

NAME, SUMMARY = "demo", "adapters on a real LLaMA and real texts, in minutes on a CPU"
HELP = """\
Fetch SmolLM2-135M and Reuters R8 (130 MB, once), train a head alone and adapters on the first 8 layers, and compare
them on texts that training never saw. With --model, --train and --eval: the same on your own.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a .gguf file, transformers folder or hub name instead of SmolLM2-135M")
    parser.add_argument("--train", type=Path, metavar="FILE", help="JSONL, CSV or TSV with text and label")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="the same, unseen in training")
    parser.add_argument(
        "--output", type=Path, default=Path("adapterkern-demo"), metavar="DIR", help="default %(default)s"
    )
    parser.add_argument("--backbone-layers", type=int, metavar="N", help=LAYERS_HELP)


def run(arguments: argparse.Namespace) -> int:
    from adapterkern.recipes.demo.demo import run_demo

    runs = run_demo(
        arguments.output, arguments.model, arguments.train, arguments.eval, num_layers=demo_layers(arguments)
    )
    return 0 if len(runs) == 2 else 130
