"""``adapterkern train``."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from adapterkern.cli.options import add_adapter_options, add_backbone_options, add_data_options, add_training_options
from adapterkern.cli.run import NEW, Job, adapted, check_train_and_eval, is_share_of_train, train_run
from adapterkern.cli.words import command
from adapterkern.training.config import TrainConfig

logger = logging.getLogger(__name__)

NAME, SUMMARY = "train", "train adapters on your data"
HELP = """\
Train adapters (and a head for labels or numbers) on a frozen LLaMA.

  # labels: reviews.csv has the columns text and label
  adapterkern train --model SmolLM2.gguf --train reviews.csv --eval test.csv --output run --every 2

  # a list of labels per text, or a number: the column label holds it
  adapterkern train --model SmolLM2.gguf --train topics.jsonl --output run --task multi-label
  adapterkern train --model SmolLM2.gguf --train ratings.csv --output run --task regression

  # language modeling: qa.jsonl has the keys prompt and completion, or messages
  adapterkern train --model ./llama --train qa.jsonl --output run --task causal-lm --precision bf16

  # a saved adapter, and its head where the labels are the same, trained further
  adapterkern train --model SmolLM2.gguf --train more.csv --output run-2 --from run

  # a new adapter on top of a saved one, which is frozen and is saved with it
  adapterkern train --model SmolLM2.gguf --train reviews.csv --output on-run --stack-on run

Ctrl-C stops after the running step and leaves a checkpoint; `adapterkern train --resume --output run` continues from
there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_backbone_options(parser)
    add_data_options(parser)
    add_adapter_options(parser)
    start = "go on from a saved adapter: a run, a checkpoint, or what save_pretrained wrote"
    parser.add_argument("--from", dest="start", type=Path, metavar="DIR", help=start)
    below = "run this saved adapter before the new one, frozen; several, the lowest first, by repeating the option"
    parser.add_argument("--stack-on", type=Path, action="append", default=[], metavar="DIR", help=below)
    add_training_options(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.start is not None:
        arguments.start = _start(arguments)
    arguments.below = _below(arguments)

    labels: list[str] = []

    def check(config: TrainConfig) -> None:
        known = () if arguments.start is None else _saved_labels(arguments.start, config)
        labels.extend(check_train_and_eval(arguments.train, arguments.eval, config, known) or ())

    def job(llama: Any, tokenizer: Any, config: TrainConfig) -> Job:
        model = adapted(arguments, llama)
        head = None if arguments.start is None else _head(arguments.start, arguments.train, labels, config)
        return Job(model, arguments.train, arguments.eval, head=head)

    return train_run(arguments, job, check=check, one_adapter=arguments.start is None)


def _start(arguments: argparse.Namespace) -> Path:
    """The folder of the adapter to go on from. Raises ``ValueError`` if it has not one, or is to be written over."""
    run = _one_adapter("--from", arguments.start, arguments)
    if run.sources is not None:
        _warn_of_other_share(arguments, run.sources.eval_data)
    return run.directory


def _one_adapter(option: str, source: Path, arguments: argparse.Namespace) -> Any:
    """The saved run of an adapter that ``option`` names. Raises as ``_start``."""
    from adapterkern.inference.runs import find_run
    from adapterkern.model.files.folder import adapter_files
    from adapterkern.training.saved import CHECKPOINTS

    run, output = find_run(source), Path(arguments.output_dir)
    if adapter_files(run.directory) is None:
        raise ValueError(f"{option}: expected a run of one adapter, got {source}, {command(run.kind.__name__)}")
    folder = run.directory.resolve()
    if folder == output.resolve() or (output / CHECKPOINTS).resolve() in folder.parents:
        raise ValueError(f"--output: expected another folder than that of {option}, which is kept, got {output}")
    return run


def _below(arguments: argparse.Namespace) -> dict[str, Path]:
    """The folders of the adapters to run below the new one, by their names.

    Raises ``ValueError`` as ``_start``, or if two have one name.
    """
    from adapterkern.model.config import check_name

    found: dict[str, Path] = {}
    for source in arguments.stack_on:
        if arguments.start is not None:
            raise ValueError(f"--stack-on: expected a new adapter to run on {source}, got --from too")
        if not arguments.train_adapters:
            raise ValueError(f"--stack-on: expected an adapter to train on {source}, got --no-train-adapters")
        name = check_name(Path(os.path.abspath(source)).name, "--stack-on")
        if name in (*found, NEW):
            raise ValueError(f"--stack-on: expected folders of different names, other than {NEW}, got {name!r}")
        found[name] = _one_adapter("--stack-on", source, arguments).directory
    return found


def _warn_of_other_share(arguments: argparse.Namespace, before: Any) -> None:
    """Warn if the earlier run has held out another part of the same file: it may have learned what is held out now."""
    from adapterkern.training.data.split import HeldOut

    if isinstance(before, HeldOut) and is_share_of_train(arguments.eval):
        now = HeldOut(arguments.train, arguments.eval, arguments.seed)
        same = before.train_data in (now.train_data, os.path.abspath(now.train_data))
        if same and (before.share, before.seed) != (now.share, now.seed):
            logger.warning(
                "--eval: %s has held out %s with --seed %d, and may have learned what is held out now: %s, --seed %d",
                *(arguments.start, before.name, before.seed, now.name, now.seed),
            )


def _saved_labels(start: Path, config: TrainConfig) -> list[str]:
    """The labels of the head saved there; none if there is none for this task."""
    from adapterkern.training.heads import head_kind, saved_labels

    return saved_labels(start, config.task) if head_kind(start) == config.task else []


def _head(start: Path, data: str, labels: list[str], config: TrainConfig) -> Any:
    """The head saved there; None, with a warning, if it is for another task or lacks some of the ``labels``."""
    from adapterkern.training.heads import head_kind
    from adapterkern.training.saved import load_head

    kind = head_kind(start)
    if kind != config.task:
        if kind is not None and config.labeled:
            logger.warning("--from: the head starts anew, since the saved one is for %s, not %s", kind, config.task)
        return None
    known = _saved_labels(start, config)
    if new := [name for name in labels if name not in known]:
        logger.warning("--from: the head starts anew, since %s has labels that the saved one has not: %s", data, new[0])
        return None
    return load_head(start, config)
