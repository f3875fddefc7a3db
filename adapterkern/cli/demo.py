"""``adapterkern demo``."""

import argparse
from pathlib import Path

from adapterkern.cli.dtype import chosen_dtype
from adapterkern.cli.options import FILES, add_layers_option, add_output_option, demo_layers
from adapterkern.cli.run import check_both

NAME, SUMMARY = "demo", "adapters on a real LLaMA and real texts, in minutes on a CPU"
HELP = """\
Fetch SmolLM2-135M and Reuters R8 (130 MB, once), train a head alone and adapters on the first 8 layers, and compare
them on texts that training never saw. With --model, --train and --eval: the same on your own.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a .gguf file, transformers folder or hub name instead of SmolLM2-135M")
    parser.add_argument("--train", dest="train_file", type=Path, metavar="FILE", help=f"with text and label: {FILES}")
    parser.add_argument("--eval", dest="eval_file", type=Path, metavar="FILE", help="the same, unseen in training")
    add_output_option(parser, "adapterkern-demo")
    add_layers_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from adapterkern.model.backbone import check_source
    from adapterkern.recipes.demo.demo import TRAINING, run_demo

    if arguments.model is not None:
        check_source(arguments.model)
    files = arguments.train_file, arguments.eval_file
    check_both(*files, TRAINING)
    runs = run_demo(
        arguments.output_dir, arguments.model, *files, num_layers=demo_layers(arguments), dtype=chosen_dtype(None)
    )
    return 0 if len(runs) == 2 else 130
