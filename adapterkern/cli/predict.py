"""``adapterkern predict``."""

import argparse
from pathlib import Path

from adapterkern.cli.options import add_saved_options, as_asked
from adapterkern.cli.run import check_file, named
from adapterkern.cli.saved import open_run, saved_run, write_rows
from adapterkern.cli.together import check_together

NAME, SUMMARY = "predict", "labels, numbers or answers for new rows, by a saved run"
HELP = """\
Predict with a run of any kind: the columns of --data, and beside them prediction and probability. Of --task multi-label
prediction is a list (JSON in .csv), of --task regression a number, without a probability.

  adapterkern predict run --data new.csv --output predictions.csv
  adapterkern predict run --data new.jsonl.gz --output predictions.jsonl --probabilities

Rows are read and written as they are computed: the file may be larger than memory. Rows of a run of several tasks name
theirs in the column "task"; run/tasks/NAME is one task alone. A causal-lm run answers by `adapterkern generate`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_saved_options(parser, "what --train takes, labels not needed", data_required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".csv, .tsv or .jsonl, or with .gz")
    parser.add_argument("--probabilities", action="store_true", help="write the probability of each label")


def run(arguments: argparse.Namespace) -> int:
    from adapterkern.inference.table import format_of_output
    from adapterkern.recipes.qa.task import QuestionAnswering
    from adapterkern.training.prediction import check_to_predict, predictions

    format_of_output(arguments.output, arguments.data)
    saved = saved_run(arguments)
    config = as_asked(arguments, saved.config)
    if not config.labeled:
        raise NotImplementedError(
            f"{saved.directory}: expected a run with a head, got a language model, which answers by "
            "`adapterkern generate`"
        )
    asks = issubclass(saved.kind, QuestionAnswering)
    check_together(arguments, task="question answering" if asks else config.task)
    if arguments.probabilities and (asks or config.task == "regression"):
        of = "answers to questions" if asks else "numbers"
        raise ValueError(f"--probabilities: has no effect on {of}, which have no labels")
    if "label_column" in arguments.parser.typed:
        raise ValueError("--label-column: has no effect, since labels are not read: expected none, got one")
    check_file("--data", arguments.data)
    of_task = saved.kind.saved_predicts(saved.directory)
    with named("--data"):
        rows = check_to_predict(saved.kind, arguments.data, config, **of_task)
    opened = open_run(arguments, saved)
    config = as_asked(arguments, opened.config)
    found = predictions(opened.task, arguments.data, config, opened.tokenizer)
    write_rows(arguments.output, found, rows, "predict", probabilities=arguments.probabilities)
    return 0
