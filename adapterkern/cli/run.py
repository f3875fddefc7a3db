"""What every command that trains or evaluates does: build, call, print on rank 0, return the status."""

import argparse
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterkern.cli import dtype
from adapterkern.cli.options import COLUMNS, adapter_config, as_asked, from_options, model_flags
from adapterkern.cli.together import check_together
from adapterkern.cli.words import command
from adapterkern.model.config import AdapterConfig
from adapterkern.training.config import TrainConfig

if TYPE_CHECKING:
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.training import Task
    from adapterkern.training.saved import Sources


logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """What a command adds to a training."""

    model: "LlamaAdapter"
    train_data: Any
    eval_data: Any
    task: "Task[Any] | None" = None
    sources: "Sources | Mapping[str, Sources] | None" = None  # default: those of the arguments


def load_arguments_backbone(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The backbone that the arguments name, and its tokenizer."""
    from adapterkern.model.backbone import load_backbone

    return load_backbone(arguments.model, num_layers=arguments.num_layers, dtype=arguments.dtype)


def sources_of(arguments: argparse.Namespace, eval_data: str | None, tokenizer: Any) -> "Sources":
    """What ``sources.json`` holds of a run with these arguments."""
    from adapterkern.training.saved import Sources

    return Sources(arguments.model, arguments.num_layers, arguments.dtype, eval_data, _tokens(tokenizer))


def _tokens(tokenizer: Any) -> str:
    """A digest of the tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def train_run(
    arguments: argparse.Namespace,
    job: Callable[[Any, Any, TrainConfig], Job],
    load: Callable[[argparse.Namespace], tuple[Any, Any]] = load_arguments_backbone,
    check: Callable[[TrainConfig], None] | None = None,
    *,
    one_adapter: bool = True,
) -> int:
    """Train what ``job`` makes of (backbone, tokenizer, configuration); the status of the command.

    Args:
        check: raises for data that the command cannot use; by default ``check_train_and_eval``.
        one_adapter: the run trains one, which the options describe.

    Raises what ``adapterkern.train`` raises; all that can be known without the backbone before it is loaded.
    """
    import torch

    from adapterkern.model.backbone import check_source
    from adapterkern.model.liger import check_installed
    from adapterkern.training import Task, train
    from adapterkern.training.optimization import check_lr
    from adapterkern.training.run.folder import check_output

    config = from_options(arguments, TrainConfig)
    check_lr(config)
    adapter = adapter_config(arguments)
    check_source(arguments.model)
    if arguments.liger:
        check_installed()
    check_output(config, Task.files, adapter if one_adapter else None)
    if check is not None:
        check(config)
    else:
        check_train_and_eval(arguments.train, arguments.eval, config)
    arguments.dtype = dtype.of_arguments(arguments)
    llama, tokenizer = load(arguments)
    torch.manual_seed(config.seed)
    model, train_data, eval_data, task, sources = job(llama, tokenizer, config)
    result = train(
        model,
        train_data,
        config,
        tokenizer=tokenizer,
        eval_data=eval_data,
        task=task,
        sources=sources or sources_of(arguments, arguments.eval, tokenizer),
    )
    if result.stopped:
        return 130
    print_metrics(result.metrics or {})
    size = f"{result.trainable_parameters:,} parameters"
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
    with _named(option):
        return check_data(path, config, labels)


def check_questions(option: str, path: str | None, config: TrainConfig, labeled: bool = True) -> None:
    """The same of a file of questions. ``labeled``: they need their answers."""
    from adapterkern.recipes.qa.squad import check_questions

    if path is not None:
        check_file(option, path)
        with _named(option):
            check_questions(path, config.skip_bad_rows, labeled)


@contextlib.contextmanager
def _named(option: str) -> Iterator[None]:
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
    train_file: str | os.PathLike[str] | None, eval_file: str | os.PathLike[str] | None, config: TrainConfig
) -> None:
    """``check_rows`` of ``--train``, and of ``--eval``, which may have the labels of ``--train`` alone."""
    check_rows("--eval", eval_file, config, check_rows("--train", train_file, config))


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

    if os.path.isdir(path) and format_of(path):
        raise IsADirectoryError(f"{option}: expected a file, got the folder {path}")
    if not os.path.exists(path) and hub_name(path) is None:
        raise FileNotFoundError(f"{option}: no file {'' if os.path.splitext(path)[1] else 'or folder '}{path}")


def adapted(arguments: argparse.Namespace, llama: Any, show: bool = True) -> "LlamaAdapter":
    """``llama`` with the adapter of the arguments; prints how many parameters it trains if ``show``."""
    from adapterkern.model.llama import LlamaAdapter

    model = LlamaAdapter(llama, adapter_config(arguments), **model_flags(arguments))
    if show:
        trainable, total = model.get_nb_trainable_parameters()
        if getattr(arguments, "train_adapters", True):
            share = 100 * trainable / total
            say(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")
        else:
            say(f"adapters: {trainable:,} of {total:,} params, frozen: --no-train-adapters trains the head alone")
    return model


def evaluate_run(arguments: argparse.Namespace) -> int:
    """Print the metrics of the saved run in ``arguments.directory``, of whatever kind it is."""
    from adapterkern.training import evaluate

    task, config, tokenizer, data = load_saved(arguments)
    print_metrics(evaluate(task.model, data, config, tokenizer=tokenizer, task=task))
    return 0


def load_saved(arguments: argparse.Namespace, answers: bool = False) -> tuple["Task[Any]", TrainConfig, Any, Any]:
    """A saved run's task, configuration and tokenizer, and the data to use it on: ``--data``, or the run's own.

    Args:
        answers: the run must answer questions, and those in the data need not have answers.

    Raises:
        FileNotFoundError: a file of the run is missing.
        ValueError: one is damaged; or there is no data.
    """
    from adapterkern.model.backbone import load_backbone
    from adapterkern.model.liger import check_installed
    from adapterkern.recipes.multitask.task import MultiTask
    from adapterkern.recipes.qa.task import QuestionAnswering

    if arguments.liger:
        check_installed()
    arguments.directory = evaluated_folder(arguments.directory)
    kind = task_class(arguments.directory)
    if answers and not issubclass(kind, QuestionAnswering):
        raise ValueError(f"{arguments.directory}: expected a run of question answering, got {command(kind.__name__)}")
    data: Any
    if issubclass(kind, MultiTask):
        source, data = _sources_of_tasks(arguments)
        for name, path in data.items():
            _check_saved_data(arguments, MultiTask.folder(arguments.directory, name), path)
    else:
        source = _saved_sources(arguments)
        data = arguments.data or source.eval_data
        if data is None:
            raise ValueError(
                f"--data: expected a file, because {arguments.directory} was trained without --eval; got none"
            )
        _check_saved_data(arguments, arguments.directory, data, issubclass(kind, QuestionAnswering), not answers)
    llama, tokenizer = load_backbone(
        arguments.model or _known(source.model, arguments.directory),
        num_layers=source.num_layers if arguments.num_layers is None else arguments.num_layers,
        dtype=arguments.dtype or source.dtype,
    )
    if source.tokenizer not in (None, _tokens(tokenizer)):
        model = arguments.model or source.model
        logger.warning("%s: was trained with other tokens than those of %s", arguments.directory, model)
    task, config = kind.from_pretrained(llama, arguments.directory, **model_flags(arguments))
    return task, as_asked(arguments, config), tokenizer, data


def _check_saved_data(
    arguments: argparse.Namespace, directory: Path, path: str, questions: bool = False, labeled: bool = True
) -> None:
    """Raise what can be known of a saved run's data, and of the options that read it, without its backbone."""
    from adapterkern.training.data.rows import ColumnError
    from adapterkern.training.heads import saved_labels
    from adapterkern.training.saved import load_config

    config = as_asked(arguments, load_config(directory))
    text, label, prompt, completion = (repr(getattr(config, name)) for name in COLUMNS)
    reads = {"classification": f"{text} and {label}", "causal-lm": f"{prompt} and {completion}, or {text}"}
    task = "question answering" if questions else config.task
    check_together(arguments, task=task)
    try:
        if questions:
            check_questions("--data", path, config, labeled)
        else:
            check_rows("--data", path, config, saved_labels(directory) if config.task == "classification" else None)
    except ColumnError as error:
        columns = reads.get(task, "'question', 'context' and 'answers'")
        raise ColumnError(f"{error}. {directory} is a run of {task}, which reads {columns}") from error


def evaluated_folder(directory: Path) -> Path:
    """``directory``; of a run that has not finished the newest checkpoint, with a warning.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or nothing of a run in it.
    """
    from adapterkern.recipes.multitask.task import MULTITASK_CONFIG
    from adapterkern.training.run.checkpoint import STATE_NAME, checkpoints
    from adapterkern.training.saved import TASK_NAME

    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such folder; expected the --output of a training, or a checkpoint")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory}: expected the --output of a training, or a checkpoint, got a file")
    if any((directory / name).exists() for name in (TASK_NAME, MULTITASK_CONFIG, STATE_NAME)):
        return directory
    if found := checkpoints(directory):
        logger.warning("%s: has not finished; this is of its newest checkpoint, %s", directory, found[-1].name)
        return found[-1]
    names = sorted(path.name for path in directory.iterdir())
    there = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise FileNotFoundError(
        f"{directory}: expected a finished training or a checkpoint, with {TASK_NAME}; "
        f"got a folder with {there or 'no files'}"
    )


def _known(model: str, directory: Path) -> str:
    """The backbone in a run's sources. Raises ``FileNotFoundError`` if it was a path, and nothing is there now."""
    if os.path.isabs(model) and not os.path.exists(model):
        raise FileNotFoundError(
            f"--model: {directory} was trained on {model}, which is not there; say where it is now, got no --model"
        )
    return model


def _saved_sources(arguments: argparse.Namespace) -> "Sources":
    """Where the run's backbone and data came from; not needed where ``--model`` and ``--data`` say both."""
    from adapterkern.training.saved import Sources, load_sources

    try:
        return load_sources(arguments.directory)
    except FileNotFoundError as error:
        if arguments.model is None or arguments.data is None:
            options = " and ".join(f"--{name}" for name in ("model", "data") if getattr(arguments, name) is None)
            raise FileNotFoundError(f"{error.filename}: expected that file, or {options}; got neither") from None
        return Sources(arguments.model)


def _sources_of_tasks(arguments: argparse.Namespace) -> tuple["Sources", dict[str, str]]:
    """Of a run of several tasks: the sources of one of them, and each task's own data."""
    from adapterkern.recipes.multitask.task import MultiTask
    from adapterkern.training.saved import load_sources

    names = MultiTask.saved_names(arguments.directory)
    if arguments.data is not None:
        folder = MultiTask.folder(arguments.directory, names[0])
        raise ValueError(f"--data: expected none for a run of several tasks; evaluate one of them, as {folder}")
    sources = {name: load_sources(MultiTask.folder(arguments.directory, name)) for name in names}
    data = {name: source.eval_data for name, source in sources.items() if source.eval_data is not None}
    if not data:
        raise ValueError(f"{arguments.directory}: expected tasks with data to evaluate on, got none")
    return next(iter(sources.values())), data


def task_class(directory: str | os.PathLike[str]) -> "type[Task[Any]]":
    """The class of a saved run's task; ``Task``, with a warning, for a class that is not of this package."""
    from adapterkern.recipes.multitask.task import MULTITASK_CONFIG, MultiTask
    from adapterkern.recipes.qa.task import QuestionAnswering
    from adapterkern.recipes.routing.task import ROUTING_CONFIG, RoutedTask
    from adapterkern.training.heads import head_kind
    from adapterkern.training.saved import TASK_NAME, load_kind
    from adapterkern.training.task import Task

    # A distilled model is evaluated without its teacher.
    classes: dict[str, type[Task[Any]]] = dict.fromkeys(("Task", "Distillation", "KeepBehaviour"), Task)
    classes |= {kind.__name__: kind for kind in (MultiTask, QuestionAnswering, RoutedTask)}
    directory = Path(directory)
    kind = load_kind(directory) if (directory / TASK_NAME).exists() else None
    if kind is None:  # saved before task.json named the kind
        if (directory / MULTITASK_CONFIG).exists():
            return MultiTask
        if (directory / ROUTING_CONFIG).exists():
            return RoutedTask
        return QuestionAnswering if head_kind(directory) == "span" else Task
    if kind not in classes:
        logger.warning("%s: evaluated as a plain Task, since %r is not of this package", directory / TASK_NAME, kind)
    return classes.get(kind, Task)


def print_metrics(metrics: Mapping[str, float]) -> None:
    """One line per metric."""
    width = max(18, *map(len, metrics)) if metrics else 0
    for name, value in metrics.items():
        say(f"{name:{width}} {value:.4f}")


def say(message: str) -> None:
    """Print on rank 0 alone."""
    from adapterkern.training import processes

    if processes.is_rank_zero():
        print(message, flush=True)
