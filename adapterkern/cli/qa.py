"""``adapterkern qa``: train, evaluate, predict."""

import argparse
from pathlib import Path
from typing import Any

from adapterkern.cli.options import (
    OF_PLAIN_LOSS,
    add_adapter_options,
    add_backbone_options,
    add_data_options,
    add_drift_option,
    add_options,
    add_saved_options,
    add_training_options,
    from_options,
)
from adapterkern.cli.run import Job, adapted, check_questions, is_share_of_train, train_run
from adapterkern.cli.saved import evaluate_run, load_saved
from adapterkern.training.config import TrainConfig

NAME, SUMMARY = "qa", "question answering: train, evaluate, predict"
HELP = """\
Extractive question answering: the answer is a span of the context, or nothing.

  # SQuAD's JSON (v1.1 or v2.0), or JSONL with id, question, context, answers
  adapterkern qa train --model SmolLM2.gguf --train train.json --eval dev.json --output run --null-threshold 0
  adapterkern eval run
  adapterkern qa predict run --data questions.jsonl --output answers.json

answers.json is {id: text}, which SQuAD's official script reads; --n-best FILE adds candidates with their scores.
"""
# What TrainConfig has for other tasks, and question answering does not read.
_UNUSED = frozenset(
    {*OF_PLAIN_LOSS, "task", "pooling", "packing", "text_column", "label_column", "prompt_column", "completion_column"}
)
_FORMAT = ".json in SQuAD's form, .jsonl or .parquet; or NAME:SPLIT of a dataset on the hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from adapterkern.recipes.qa.settings import SpanSettings

    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train a span head and adapters", allow_abbrev=False)
    add_backbone_options(train)
    add_data_options(train, _FORMAT)
    add_options(train.add_argument_group("answers", "defaults in brackets"), SpanSettings, without={"n_best"})
    add_adapter_options(train)
    add_training_options(train, without=_UNUSED)

    evaluate = actions.add_parser("evaluate", help="the same as adapterkern eval", allow_abbrev=False)
    add_saved_options(evaluate, _FORMAT, columns=False)
    add_drift_option(evaluate)
    predict = actions.add_parser("predict", help="answer questions with a saved run", allow_abbrev=False)
    add_saved_options(predict, _FORMAT, data_required=True, columns=False)
    predict.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write the answers to")
    predict.add_argument("--n-best", type=Path, metavar="FILE", help="JSON to write the candidates to")


def run(arguments: argparse.Namespace) -> int:
    return {"train": run_train, "evaluate": evaluate_run, "predict": run_predict}[arguments.action](arguments)


def run_train(arguments: argparse.Namespace) -> int:
    from adapterkern.recipes.qa import QuestionAnswering, SpanSettings

    settings = from_options(arguments, SpanSettings)

    def job(llama: Any, tokenizer: Any, config: TrainConfig) -> Job:
        task = QuestionAnswering(adapted(arguments, llama), settings)
        return Job(task.model, arguments.train, arguments.eval, task)

    def check(config: TrainConfig) -> None:
        check_questions("--train", arguments.train, config)
        if not is_share_of_train(arguments.eval):
            check_questions("--eval", arguments.eval, config)

    return train_run(arguments, job, check=check, kind=QuestionAnswering)


def run_predict(arguments: argparse.Namespace) -> int:
    from adapterkern.files import write_json
    from adapterkern.recipes.qa import QuestionAnswering

    for option, path in (("--output", arguments.output), ("--n-best", arguments.n_best)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{option}: expected a file in a folder that exists, got {path}")
    task, config, tokenizer, data = load_saved(arguments, answers=True)
    assert isinstance(task, QuestionAnswering)
    predictions = task.answer(data, config, tokenizer)
    write_json(arguments.output, {id_: prediction.text for id_, prediction in predictions.items()})
    if arguments.n_best is not None:
        write_json(arguments.n_best, {id_: [c._asdict() for c in p.candidates] for id_, p in predictions.items()})
    empty = sum(not prediction.text for prediction in predictions.values())
    print(f"{len(predictions)} answers in {arguments.output}, {empty} of them empty")
    return 0
