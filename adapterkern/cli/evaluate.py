"""``adapterkern eval``."""

import argparse

from adapterkern.cli.options import FORMATS, add_drift_option, add_report_options, add_saved_options
from adapterkern.cli.saved import evaluate_run

NAME, SUMMARY = "eval", "evaluate a saved run"
HELP = """\
Evaluate a run of any kind on a file: by default on the one that it was evaluated on in training.

  adapterkern eval run
  adapterkern eval run --data other.csv
  adapterkern eval run --report report

The scores go to stdout. What a classification gets wrong goes to stderr, and with --report to files: the scores of each
label, the confusion matrix, the rows that are most confidently wrong; of a run of several tasks in a folder per task.
Of lists of labels there is no matrix; of numbers there are the rows of the largest error, and a picture.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_saved_options(parser, f"{FORMATS}; for question answering SQuAD's .json")
    add_drift_option(parser)
    add_report_options(parser)


def run(arguments: argparse.Namespace) -> int:
    return evaluate_run(arguments)
