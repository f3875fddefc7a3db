"""What every command that trains does: build, call, print on rank 0, return the status."""

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterkern.cli import dtype
from adapterkern.cli.backbone import backbone_options, check_attention, check_weights
from adapterkern.cli.config_file import typed_options
from adapterkern.cli.options import adapter_config, from_options, model_flags
from adapterkern.model.config import AdapterConfig
from adapterkern.training.config import TrainConfig

if TYPE_CHECKING:
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.training import Task
    from adapterkern.training.heads import Head
    from adapterkern.training.saved import Sources


logger = logging.getLogger(__name__)
NEW = "default"  # the name of the adapter that a command trains


class Job(NamedTuple):
    """What a command adds to a training."""

    model: "LlamaAdapter"
    train_data: Any
    eval_data: Any
    task: "Task[Any] | None" = None
    sources: "Sources | Mapping[str, Sources] | None" = None  # default: those of the arguments
    head: "Head | None" = None


def load_arguments_backbone(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The backbone that the arguments name, and its tokenizer."""
    from adapterkern.model.backbone import load_backbone

    return load_backbone(arguments.model, num_layers=arguments.num_layers, **backbone_options(arguments))


def sources_of(arguments: argparse.Namespace, eval_data: Any, tokenizer: Any) -> "Sources":
    """What ``sources.json`` holds of a run with these arguments. ``eval_data`` may be a share of the training rows."""
    from adapterkern.inference.runs import tokens_digest
    from adapterkern.training.data.split import HeldOut
    from adapterkern.training.saved import Sources

    if is_share_of_train(eval_data):
        eval_data = HeldOut(arguments.train, eval_data, arguments.seed)
    of_backbone = arguments.model, arguments.num_layers, arguments.dtype
    return Sources(
        *of_backbone,
        eval_data,
        tokens_digest(tokenizer),
        typed_options(arguments),
        None if arguments.load_in == "none" else arguments.load_in,
    )


def train_run(
    arguments: argparse.Namespace,
    job: Callable[[Any, Any, TrainConfig], Job],
    load: Callable[[argparse.Namespace], tuple[Any, Any]] = load_arguments_backbone,
    check: Callable[[TrainConfig], None] | None = None,
    *,
    kind: "type[Task[Any]] | None" = None,
    one_adapter: bool = True,
) -> int:
    """Train what ``job`` makes of (backbone, tokenizer, configuration); the status of the command.

    Args:
        check: raises for data that the command cannot use; by default ``check_train_and_eval``.
        kind: the class of the job's task, if it has one.
        one_adapter: the run trains one, which the options describe.

    Raises what ``adapterkern.train`` raises; all that can be known without the backbone before it is loaded.
    """
    import torch

    from adapterkern.model.backbone import check_source
    from adapterkern.model.liger import check_installed
    from adapterkern.training import Task, train
    from adapterkern.training.optimization import check_lr
    from adapterkern.training.run.folder import check_output
    from adapterkern.training.run.trackers import tracker_names

    config = from_options(arguments, TrainConfig)
    check_lr(config)
    tracker_names(config)
    (kind or Task).check_config(config)
    adapter = adapter_config(arguments)
    check_source(arguments.model)
    if arguments.liger:
        check_installed()
    check_weights(arguments, config)
    check_output(config, Task.files, adapter if one_adapter else None)
    if check is not None:
        check(config)
    else:
        check_train_and_eval(arguments.train, arguments.eval, config)
    check_drift_file(arguments.drift, config, arguments.num_layers)
    arguments.dtype = dtype.of_arguments(arguments)
    check_attention(arguments, config)
    llama, tokenizer = load(arguments)
    torch.manual_seed(config.seed)
    made = job(llama, tokenizer, config)
    result = train(
        made.model,
        made.train_data,
        config,
        tokenizer=tokenizer,
        eval_data=made.eval_data,
        drift_data=arguments.drift,
        head=made.head,
        task=made.task,
        sources=made.sources or sources_of(arguments, arguments.eval, tokenizer),
        dry_run=arguments.dry_run,
    )
    if result.stopped:
        return 130
    if result.dry_run:
        return 0
    print_metrics(result.metrics or {})
    size = f"{result.trainable_parameters:,} parameters"
    size += f" of step {result.best_step}" if result.best_step else ""
    say(f"saved in {config.output_dir}: {size}, {result.steps} steps in {result.seconds:.0f} s")
    return 0


def check_rows(
    option: str,
    path: str | os.PathLike[str] | None,
    config: TrainConfig,
    labels: Sequence[str] | None = None,
) -> list[str] | None:
    """Raise ``DataError`` or ``OSError`` if a training could not use an option's data, whatever the tokenizer.

    Args:
        labels: those that the rows may have; by default any.

    Returns:
        the labels; None without data.
    """
    from adapterkern.training.data.examples import check_data

    if path is None:
        return None
    check_file(option, path)
    with named(option):
        return check_data(path, config, labels)


def check_drift_file(path: str | None, config: TrainConfig, num_layers: int | None) -> None:
    """``check_rows`` of ``--drift``; warn where the backbone is its first ``num_layers`` alone."""
    from adapterkern.training.drift import as_texts

    try:
        check_rows("--drift", path, as_texts(config))
    except FileNotFoundError as error:
        if not config.resume:
            raise
        raise FileNotFoundError(f"{error}; --drift none goes on without") from error
    if path is not None and num_layers is not None:
        logger.warning(
            "--drift: does not say what is forgotten with --backbone-layers %d: the first layers of a backbone are no "
            "language model",
            num_layers,
        )


def check_questions(option: str, path: str | None, config: TrainConfig, labeled: bool = True) -> None:
    """The same of a file of questions. ``labeled``: they need their answers."""
    from adapterkern.recipes.qa.squad import check_questions

    if path is not None:
        check_file(option, path)
        with named(option):
            check_questions(path, config.skip_bad_rows, labeled)


@contextlib.contextmanager
def named(option: str) -> Iterator[None]:
    """Name the option in errors about its data."""
    from adapterkern.training.data.rows import DataError

    try:
        yield
    except DataError as error:
        raise type(error)(f"{option}: {error}") from error
    except (OSError, ImportError) as error:
        if not str(error).startswith("data: "):
            raise
        raise type(error)(f"{option}: {str(error).removeprefix('data: ')}") from error


def check_train_and_eval(
    train_file: str | os.PathLike[str] | None,
    eval_file: str | os.PathLike[str] | None,
    config: TrainConfig,
    known: Sequence[str] = (),
) -> list[str] | None:
    """``check_rows`` of ``--train``, whose labels it returns, and of ``--eval``, which may have these alone.

    Args:
        known: the labels of a saved head, which is kept, and may be evaluated on all of them, if it has the training's.
    """
    labels = check_rows("--train", train_file, config)
    if not is_share_of_train(eval_file):
        check_rows("--eval", eval_file, config, known if labels and set(labels) <= set(known) else labels)
    return labels


def is_share_of_train(eval_file: str | os.PathLike[str] | None) -> bool:
    """Whether ``--eval`` is a share of the training rows. Raises ``ValueError`` for one that cannot be."""
    from adapterkern.training.data.split import is_share

    return is_share(eval_file)


def check_mixed(option: str, adapter: AdapterConfig, config: TrainConfig) -> None:
    """Raise ``ValueError`` for what an adapter cannot have, or a training, whose batches mix several.

    Args:
        option: that sets the adapter's ``modules_to_save``.
    """
    if adapter.modules_to_save:
        raise ValueError(
            f"{option}: expected no modules of the backbone, which all adapters of a batch share, got "
            f"{','.join(adapter.modules_to_save)}"
        )
    if adapter.bias_scale:
        raise ValueError(
            "bias_scale: expected False, since all adapters of a batch share the backbone's linear layers, got True"
        )
    if not config.train_adapters:
        raise ValueError("--train-adapters: expected several adapters to train, got --no-train-adapters")


def check_both(train_file: Path | None, eval_file: Path | None, config: TrainConfig) -> None:
    """``check_train_and_eval``, of files of which a command needs both or neither.

    Raises:
        ValueError: one of them is given.
    """
    if (train_file is None) != (eval_file is None):
        raise ValueError("--train, --eval: expected both files or neither, got one")
    check_train_and_eval(train_file, eval_file, config)


def check_file(option: str, path: str | os.PathLike[str]) -> None:
    """Raise ``OSError`` if there is no such file or folder, and the text cannot name a dataset on the hub."""
    from adapterkern.training.data.formats.names import format_of, hub_name

    if str(path).endswith("%") and not os.path.exists(path):
        raise ValueError(
            f"{option}: expected a file, got {path}: a share of --train is for --eval of a single training"
        )
    if os.path.isdir(path) and format_of(path):
        raise IsADirectoryError(f"{option}: expected a file, got the folder {path}")
    if not os.path.exists(path) and hub_name(path) is None:
        raise FileNotFoundError(f"{option}: no file {'' if os.path.splitext(path)[1] else 'or folder '}{path}")


def adapted(arguments: argparse.Namespace, llama: Any, show: bool = True) -> "LlamaAdapter":
    """``llama`` with the adapter of the arguments, saved or new; prints how many parameters it trains if ``show``."""
    from adapterkern.model.llama import LlamaAdapter

    if (start := getattr(arguments, "start", None)) is not None:
        model = LlamaAdapter.from_pretrained(llama, start, **model_flags(arguments))
        say(f"going on from the adapter in {start}")
    elif below := getattr(arguments, "below", None):
        model = LlamaAdapter(llama, None, **model_flags(arguments))
        stack: list[str] = []
        for name, folder in below.items():
            model.load_adapter(folder, name)
            stack += [*model.adapters_below(name), name]
        model.add_adapter(NEW, adapter_config(arguments))
        model.set_adapter([*stack, NEW])
    else:
        model = LlamaAdapter(llama, adapter_config(arguments), **model_flags(arguments))
    model.fuse_norm = getattr(arguments, "fuse_norm", False)
    if on := model.adapters_below():
        how = "trained too" if arguments.train_stack else "frozen"
        say(f"on top of {' → '.join(on)}, {how}")
    if show:
        trainable, total = model.get_nb_trainable_parameters()
        if arguments.train_stack:
            trainable += sum(p.numel() for name in on for p in model.adapter_parameters(name))
        if getattr(arguments, "train_adapters", True):
            share = 100 * trainable / total
            say(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")
        else:
            say(f"adapters: {trainable:,} of {total:,} params, frozen: --no-train-adapters trains the head alone")
    return model


def print_metrics(metrics: Mapping[str, float]) -> None:
    """One line per metric."""
    width = max(18, *map(len, metrics)) if metrics else 0
    for name, value in metrics.items():
        say(f"{name:{width}} {value:.4g}" if 0 < abs(value) < 1e-3 else f"{name:{width}} {value:.4f}")


def say(message: str) -> None:
    """Print on rank 0 alone."""
    from adapterkern.training import processes

    if processes.is_rank_zero():
        print(message, flush=True)
