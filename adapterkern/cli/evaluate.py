"""``adapterkern eval``."""

import argparse

from adapterkern.cli.options import FORMATS, add_saved_options
from adapterkern.cli.run import evaluate_run

NAME, SUMMARY = "eval", "evaluate a saved run"
HELP = """\
Evaluate a run of any kind on a file: by default on the one that it was evaluated on in training.

  adapterkern eval run
  adapterkern eval run --data other.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_saved_options(parser, f"{FORMATS}; for question answering SQuAD's .json")


def run(arguments: argparse.Namespace) -> int:
    return evaluate_run(arguments)
