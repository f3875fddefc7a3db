"""``adapterkern distill``."""

import argparse
import dataclasses
from typing import Any

from adapterkern.cli.backbone import backbone_options, device
from adapterkern.cli.options import (
    OF_PLAIN_LOSS,
    add_adapter_options,
    add_backbone_options,
    add_data_options,
    add_options,
    add_training_options,
    folder,
    from_options,
    model_flags,
)
from adapterkern.cli.run import Job, adapted, check_rows, check_train_and_eval, is_share_of_train, named, train_run
from adapterkern.training.config import TrainConfig

NAME, SUMMARY = "distill", "train adapters on a teacher's soft labels, or keep a model close to its original behavior"
HELP = """\
Train adapters on a teacher's soft labels: (1 - W) * cross-entropy + W * T^2 * divergence.

  # the first 8 layers learn from all of them; nothing is loaded twice
  adapterkern distill --model SmolLM2.gguf --backbone-layers 8 --teacher whole --train texts.jsonl --output run

  # another teacher with the same vocabulary
  adapterkern distill --model SmolLM2.gguf --teacher ./SmolLM2-1.7B --train texts.jsonl --output run

  # learn a task, and keep the behavior on other texts: the teacher is the model with its adapters off
  adapterkern distill --model SmolLM2.gguf --train qa.jsonl --keep texts.jsonl --output run
  adapterkern distill --model SmolLM2.gguf --train reviews.csv --task classification --keep texts.jsonl --output run

  # a teacher that is the same model with another adapter: what an earlier training has saved
  adapterkern distill --model SmolLM2.gguf --teacher ./big-run --train qa.jsonl --adapter-dim 8 --output small-run

  # half of the steps: the model completes the prompts itself, and is held to the teacher on what it says
  adapterkern distill --model SmolLM2.gguf --train qa.jsonl --on-policy 0.5 --divergence reverse-kl --output run

  # instructions that the model is to follow without them
  adapterkern distill --model SmolLM2.gguf --train qa.jsonl --teacher-context "Answer in French. " --output run

texts.jsonl has the key text, qa.jsonl prompt and completion, reviews.csv the columns text and label.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from adapterkern.recipes.distillation.settings import ContextSettings, RolloutSettings, SoftLabelSettings

    add_backbone_options(parser)
    add_data_options(parser)
    group = parser.add_argument_group("soft labels")
    group.add_argument(
        "--teacher",
        default="itself",
        metavar="WHICH",
        help="itself: the model with its adapters off; whole: all layers where --backbone-layers cuts them; "
        "a .gguf file, transformers folder or hub name; or a training's --output: its adapter, on the same backbone; "
        "default %(default)s",
    )
    group.add_argument("--keep", metavar="FILE", help="texts on which the model should match the teacher")
    group.add_argument("--eval-keep", metavar="FILE", help="the same, to evaluate on")
    add_options(group, SoftLabelSettings)
    add_options(group, ContextSettings)
    group.add_argument(
        "--teacher-labels",
        type=folder,
        metavar="DIR",
        help="keep the teacher's --top-k likeliest tokens here: it runs once per text, also for other runs",
    )
    add_options(parser.add_argument_group("the model's own completions", "without --keep"), RolloutSettings)
    add_adapter_options(parser)
    add_training_options(parser, without=OF_PLAIN_LOSS)
    parser.set_defaults(task="causal-lm")


def run(arguments: argparse.Namespace) -> int:
    from adapterkern.model.backbone import check_hub, check_source, load_backbone
    from adapterkern.model.files.folder import adapter_files
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.model.quantized import check_load_in
    from adapterkern.recipes.distillation import Distillation, KeepBehaviour, WithKept, first_layers
    from adapterkern.recipes.distillation.keeping import check_task
    from adapterkern.recipes.distillation.labels import check_labels
    from adapterkern.recipes.distillation.rollouts import check_shape
    from adapterkern.recipes.distillation.settings import ContextSettings, RolloutSettings, SoftLabelSettings
    from adapterkern.training.drift import as_texts

    cut = arguments.num_layers
    is_adapter = adapter_files(arguments.teacher) is not None
    is_model = arguments.teacher not in ("itself", "whole") and not is_adapter
    if arguments.eval_keep and not arguments.eval:
        raise ValueError("--eval: expected a file together with --eval-keep, got none")
    if arguments.eval_keep and is_share_of_train(arguments.eval):
        raise ValueError(f"--eval: expected a file together with --eval-keep, got a share of --train, {arguments.eval}")
    if arguments.teacher == "whole" and cut is None:
        raise ValueError("--backbone-layers: expected a number of layers together with --teacher whole, got none")

    soft_labels, rollouts = from_options(arguments, SoftLabelSettings), from_options(arguments, RolloutSettings)
    context, settings = from_options(arguments, ContextSettings), dataclasses.asdict(soft_labels)
    if arguments.keep or arguments.eval_keep:
        if rollouts.on_policy:
            raise ValueError(f"--on-policy: expected 0 with --keep, whose texts are given, got {rollouts.on_policy}")
        if context.teacher_context is not None:
            raise ValueError("--teacher-context: expected none with --keep, got one")
        if arguments.teacher_labels is not None:
            raise ValueError(f"--teacher-labels: expected none with --keep, got {arguments.teacher_labels}")

    def check(config: TrainConfig) -> None:
        if is_model:
            check_source(arguments.teacher, "--teacher")
            check_hub(arguments.teacher, "--teacher")
            check_load_in(arguments.load_in, arguments.teacher, device())
        if config.labeled and not (arguments.keep or arguments.eval_keep):
            raise ValueError(
                f"--task: expected causal-lm without --keep, since soft labels are those of tokens, got {config.task}"
            )
        check_task(config)
        rollouts.check(soft_labels, config)
        context.check(config)
        if arguments.teacher_labels is not None:
            check_labels(arguments.teacher_labels, soft_labels, rollouts, config)
        check_train_and_eval(arguments.train, arguments.eval, config)
        if rollouts.on_policy:
            with named("--train"):
                check_shape(arguments.train, config)
        check_rows("--keep", arguments.keep, as_texts(config))
        check_rows("--eval-keep", arguments.eval_keep, as_texts(config))

    def job(whole: Any, tokenizer: Any, config: TrainConfig) -> Job:
        llama = whole if cut is None else first_layers(whole, cut)
        teacher = whole if arguments.teacher == "whole" else None
        if is_model:
            teacher, other = load_backbone(arguments.teacher, **backbone_options(arguments))
            if other.get_vocab() != tokenizer.get_vocab():
                raise ValueError(
                    f"--teacher: expected the tokens of {arguments.model}, got others in {arguments.teacher}"
                )
        model = adapted(arguments, llama)
        if is_adapter:
            teacher = LlamaAdapter.from_pretrained(model.reference(), arguments.teacher, **model_flags(arguments))
            teacher.requires_grad_(False)
        if not (arguments.keep or arguments.eval_keep):
            more = dataclasses.asdict(context) | dataclasses.asdict(rollouts)
            task = Distillation(model, teacher, teacher_labels=arguments.teacher_labels, **settings, **more)
            return Job(model, arguments.train, arguments.eval, task)
        rows, eval_rows = (
            of_task if kept is None else WithKept(of_task, kept)
            for of_task, kept in ((arguments.train, arguments.keep), (arguments.eval, arguments.eval_keep))
        )
        return Job(model, rows, eval_rows, KeepBehaviour(model, teacher, **settings))

    # The whole backbone, and not what --backbone-layers leaves of it.
    def load(_: argparse.Namespace) -> tuple[Any, Any]:
        return load_backbone(arguments.model, **backbone_options(arguments))

    kind = KeepBehaviour if arguments.keep or arguments.eval_keep else Distillation
    return train_run(arguments, job, load, check, kind=kind)
