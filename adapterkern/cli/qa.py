"""``adapterkern qa``: train, evaluate, predict."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from adapterkern.cli.options import (
    ADAPTER_FIELDS,
    AddCommand,
    add_adapter_options,
    add_backbone_options,
    add_training_options,
    model_flags,
)
from adapterkern.cli.saved import evaluation_data, load_saved_model, print_metrics, run_sources, save_run_sources
from adapterkern.model.adapter import AdapterConfig

HELP = """\
Extractive question answering: the answer is a span of the context, or nothing.

  # SQuAD's JSON (v1.1 or v2.0), or JSONL with id, question, context, answers
  adapterkern qa train --model SmolLM2.gguf --train train.json --eval dev.json --output run --null-threshold 0
  adapterkern qa evaluate run
  adapterkern qa predict run --data questions.jsonl --output answers.json

answers.json is {id: text}, which SQuAD's official script reads; --n-best FILE adds candidates with their scores.
"""
# What TrainConfig has for other tasks, and question answering does not read.
_UNUSED = frozenset({"task", "pooling", "text_column", "label_column", "prompt_column", "completion_column"})


def add(command: AddCommand) -> None:
    parser = command("qa", run_train, "question answering: train, evaluate, predict", HELP)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    train = actions.add_parser("train", help="train a span head and adapters", allow_abbrev=False)
    train.set_defaults(run=run_train)
    add_backbone_options(train, required=True)
    train.add_argument("--train", required=True, metavar="FILE", help=".json in SQuAD's form, or .jsonl")
    train.add_argument("--eval", metavar="FILE", help="the same, to evaluate on")
    group = train.add_argument_group("answers", "defaults in brackets")
    group.add_argument("--doc-stride", type=int, default=128, metavar="N", help="tokens between windows' starts [128]")
    group.add_argument("--max-answer-tokens", type=int, default=30, metavar="N", help="answers are no longer [30]")
    group.add_argument(
        "--null-threshold",
        type=float,
        metavar="X",
        help="answer nothing where that outscores the best span by more than X; 0 for SQuAD 2.0 [always answer]",
    )
    group.add_argument("--pointer-dim", type=int, default=64, metavar="P", help="0: a head without the pointer [64]")
    add_adapter_options(train)
    add_training_options(train, without=_UNUSED)

    evaluate = actions.add_parser("evaluate", help="exact match and F1 of a saved run", allow_abbrev=False)
    evaluate.set_defaults(run=run_evaluate)
    predict = actions.add_parser("predict", help="answer questions with a saved run", allow_abbrev=False)
    predict.set_defaults(run=run_predict)
    for saved in (evaluate, predict):
        saved.add_argument("directory", type=Path, help="the --output of a training, or one of its checkpoints")
        saved.add_argument(
            "--data", required=saved is predict, metavar="FILE", help=".json or .jsonl; default: the run's own --eval"
        )
        add_backbone_options(saved, required=False)
    predict.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write the answers to")
    predict.add_argument("--n-best", type=Path, metavar="FILE", help="JSON to write the candidates to")


def run_train(arguments: argparse.Namespace) -> int:
    import torch

    from adapterkern.model.backbone import load_backbone
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.recipes.qa.task import QuestionAnswering, SpanSettings
    from adapterkern.training import TrainConfig, train

    values = vars(arguments)
    fields = {field.name for field in dataclasses.fields(TrainConfig)} - _UNUSED
    config = TrainConfig(**{name: values[name] for name in fields})
    settings = SpanSettings(
        doc_stride=arguments.doc_stride,
        max_answer_tokens=arguments.max_answer_tokens,
        null_threshold=arguments.null_threshold,
        pointer_dim=arguments.pointer_dim,
    )
    dtype = arguments.dtype or "fp32"
    llama, tokenizer = load_backbone(arguments.model, num_layers=arguments.backbone_layers, dtype=dtype)
    torch.manual_seed(config.seed)
    adapters = AdapterConfig(**{name: values[name] for name in ADAPTER_FIELDS})
    model = LlamaAdapter(llama, adapters, **model_flags(arguments))
    model.print_trainable_parameters()
    task = QuestionAnswering(model, settings)
    result = train(
        model,
        arguments.train,
        config,
        tokenizer=tokenizer,
        eval_data=arguments.eval,
        task=task,
        on_start=lambda: save_run_sources(arguments),
    )
    if result.stopped:
        return 130
    print_metrics(result.metrics or {})
    print(f"saved in {config.output_dir}: {result.steps} steps in {result.seconds:.0f} s")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    from adapterkern.training import evaluate

    task, config, tokenizer, sources = _load(arguments)
    data = evaluation_data(arguments, sources)
    print_metrics(evaluate(task.model, data, config, tokenizer=tokenizer, task=task))
    return 0


def run_predict(arguments: argparse.Namespace) -> int:
    from adapterkern.files import write_json

    task, config, tokenizer, _ = _load(arguments)
    predictions = task.predict(arguments.data, config, tokenizer)
    write_json(arguments.output, {id_: prediction.text for id_, prediction in predictions.items()})
    if arguments.n_best is not None:
        write_json(arguments.n_best, {id_: [c._asdict() for c in p.candidates] for id_, p in predictions.items()})
    empty = sum(not prediction.text for prediction in predictions.values())
    print(f"{len(predictions)} answers in {arguments.output}, {empty} of them empty")
    return 0


def _load(arguments: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """The task, its configuration, the tokenizer, and where the run's backbone and data came from."""
    from adapterkern.recipes.qa.task import QuestionAnswering
    from adapterkern.training.saved import load_config

    sources = run_sources(arguments)
    config = load_config(arguments.directory)
    model, tokenizer = load_saved_model(arguments, sources, config.train_adapters)
    return QuestionAnswering.from_pretrained(model, arguments.directory), config, tokenizer, sources
