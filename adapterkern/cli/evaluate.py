"""``adapterkern eval``."""

import argparse
from pathlib import Path

from adapterkern.cli.options import AddCommand, add_backbone_options
from adapterkern.cli.saved import evaluation_data, load_saved_model, print_metrics, run_sources


def add(command: AddCommand) -> None:
    parser = command(
        "eval",
        run,
        "evaluate a saved run",
        "Evaluate a run's adapter (and head) on a file: by default on the one that it was trained with.\n\n"
        "  adapterkern eval run\n  adapterkern eval run --data other.csv",
    )
    parser.add_argument("directory", type=Path, help="the --output of a training, or one of its checkpoints")
    parser.add_argument("--data", metavar="FILE", help="JSONL, CSV or TSV; default: the run's own --eval")
    add_backbone_options(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    from adapterkern.training import evaluate, load_task

    sources = run_sources(arguments)
    config, head = load_task(arguments.directory)
    data = evaluation_data(arguments, sources)
    model, tokenizer = load_saved_model(arguments, sources, config.train_adapters)
    print_metrics(evaluate(model, data, config, tokenizer=tokenizer, head=head))
    return 0
