"""What every command about a saved run does: find it, check its data, open it, evaluate it."""

import argparse
import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkern import checks
from adapterkern.cli.backbone import backbone_options, check_saved_backbone
from adapterkern.cli.options import COLUMNS, as_asked, model_flags
from adapterkern.cli.run import check_drift_file, check_questions, check_rows, print_metrics, say
from adapterkern.cli.together import check_together
from adapterkern.cli.words import command
from adapterkern.training.config import LABELED, TrainConfig

if TYPE_CHECKING:
    from adapterkern.inference.runs import Opened, SavedRun
    from adapterkern.training import Task
    from adapterkern.training.data.rows import Row

logger = logging.getLogger(__name__)


def evaluate_run(arguments: argparse.Namespace) -> int:
    """Print the metrics of the saved run in ``arguments.directory``, of whatever kind it is.

    Of a run with a head also a report, on stderr, and to files if that is asked for.
    """
    from adapterkern.training import evaluate

    answers: list[Any] = []
    task, config, tokenizer, data = load_saved(arguments, check=functools.partial(_check_report, arguments))
    how: dict[str, Any] = {"tokenizer": tokenizer, "task": task, "answers": answers}
    print_metrics(evaluate(task.model, data, config, drift_data=arguments.drift, **how))
    _report(arguments, answers, task, data, config, tokenizer)
    return 0


def _check_report(arguments: argparse.Namespace, run: "SavedRun") -> None:
    """Raise what can be known of ``--report`` before the backbone is loaded."""
    from adapterkern.inference.report import check_directory, check_installed
    from adapterkern.recipes.multitask.task import MultiTask

    directory = getattr(arguments, "report", None)
    if directory is None:
        return
    checks.integer("worst", arguments.worst, 0)
    if not run.classifies:
        raise ValueError(f"report: expected a run with a classification head, got {run.directory}, which has none")
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise NotImplementedError(f"report: expected one process, got {processes}")
    check_installed()
    several = issubclass(run.kind, MultiTask)
    for name in MultiTask.saved_names(run.directory) if several else [""]:
        check_directory(directory / name)


def _report(
    arguments: argparse.Namespace, answers: list[Any], task: Any, data: Any, config: TrainConfig, tokenizer: Any
) -> None:
    """Print the reports on an evaluation, and write them if that is asked for; none of another task's."""
    from rich.console import Console

    from adapterkern.inference.report import WORST, check_installed, show, write_report
    from adapterkern.inference.reports import reports
    from adapterkern.training import processes

    if not answers or processes.world_size() > 1:
        return
    try:
        check_installed()
    except ImportError as error:
        logger.warning("%s", error)
        return
    console, directory = Console(stderr=True), getattr(arguments, "report", None)
    worst = getattr(arguments, "worst", WORST)
    for name, report in reports(task, answers, data, config, tokenizer, worst).items():
        if name:
            console.print(f"\n{name}", markup=False, highlight=False)
        show(report, console)
        if directory is not None:
            write_report(report, directory / name)
    if directory is not None:
        console.print(f"\nreport in {directory}", markup=False, highlight=False)


def load_saved(
    arguments: argparse.Namespace, answers: bool = False, check: Callable[["SavedRun"], None] | None = None
) -> tuple["Task[Any]", TrainConfig, Any, Any]:
    """A saved run's task, configuration and tokenizer, and the data to use it on: ``--data``, or the run's own.

    Args:
        answers: the run must answer questions, and those in the data need not have answers.
        check: raises for a run that the command cannot use.

    Raises:
        FileNotFoundError: a file of the run is missing.
        ValueError: one is damaged; or there is no data.
    """
    from adapterkern.recipes.multitask.task import MultiTask
    from adapterkern.recipes.qa.task import QuestionAnswering

    run = saved_run(arguments)
    if check is not None:
        check(run)
    if answers and not issubclass(run.kind, QuestionAnswering):
        raise ValueError(f"{run.directory}: expected a run of question answering, got {command(run.kind.__name__)}")
    data: Any
    if issubclass(run.kind, MultiTask):
        data = _data_of_tasks(arguments, run.directory)
        for name, path in data.items():
            _check_saved_data(arguments, MultiTask.folder(run.directory, name), path)
    else:
        data = arguments.data or (run.sources and run.sources.eval_data)
        if data is None:
            raise ValueError(f"--data: expected a file, because {run.directory} was trained without --eval; got none")
        _check_saved_data(arguments, run.directory, data, issubclass(run.kind, QuestionAnswering), not answers)
    _check_drift(arguments, run)
    task, config, tokenizer = open_run(arguments, run)
    return task, as_asked(arguments, config), tokenizer, data


def saved_run(arguments: argparse.Namespace) -> "SavedRun":
    """The run in ``arguments.directory``, on a backbone that can be there. Raises as ``find_run``."""
    from adapterkern.inference.runs import find_run
    from adapterkern.model.liger import check_installed

    if arguments.liger:
        check_installed()
    run = find_run(arguments.directory)
    check_saved_backbone(arguments, run)
    return run


def open_run(arguments: argparse.Namespace, run: "SavedRun") -> "Opened":
    """The run on its own backbone, or the one of the arguments."""
    flags: Any = model_flags(arguments) | backbone_options(arguments)
    checks.integer("skip_sites", skip := arguments.skip_sites, 0)
    opened = run.open(model=arguments.model, num_layers=arguments.num_layers, **flags)
    model = opened.task.model
    sites = max((len(model.adapter_config(name).layers or ()) for name in model.adapters), default=0)
    if skip and skip >= sites:
        raise ValueError(f"--skip-sites: expected fewer than the adapter's {sites} sites, got {skip}")
    model.skip_sites(skip)
    return opened


def write_rows(
    output: Path, found: Iterable[tuple["Row", Any]], count: int, doing: str, *, probabilities: bool = False
) -> None:
    """Write rows and what is ``found`` for them to a table, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    from adapterkern.inference.table import write_predictions

    console = Console(stderr=True)
    shown = track(found, doing, count, console=console, disable=not console.is_terminal)
    rows = write_predictions(output, ((row.values, one) for row, one in shown), probabilities=probabilities)
    say(f"{rows:,} rows in {output}")


def _check_drift(arguments: argparse.Namespace, run: "SavedRun") -> None:
    """Raise what can be known of ``--drift`` without the backbone."""
    from adapterkern.training.drift import check_drift

    if (path := getattr(arguments, "drift", None)) is not None:  # predictions have no such option
        config = as_asked(arguments, run.config)
        check_drift(config, path)
        trained = None if run.sources is None else run.sources.num_layers
        check_drift_file(path, config, trained if arguments.num_layers is None else arguments.num_layers)


def _data_of_tasks(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Each task's own data, of a run of several."""
    from adapterkern.recipes.multitask.task import MultiTask
    from adapterkern.training.saved import load_sources

    names = MultiTask.saved_names(directory)
    if arguments.data is not None:
        folder = MultiTask.folder(directory, names[0])
        raise ValueError(f"--data: expected none for a run of several tasks; evaluate one of them, as {folder}")
    sources = {name: load_sources(MultiTask.folder(directory, name)) for name in names}
    data = {name: source.eval_data for name, source in sources.items() if source.eval_data is not None}
    if not data:
        raise ValueError(f"{directory}: expected tasks with data to evaluate on, got none")
    return data


def _check_saved_data(
    arguments: argparse.Namespace, directory: Path, path: Any, questions: bool = False, labeled: bool = True
) -> None:
    """Raise what can be known of a saved run's data, and of the options that read it, without its backbone."""
    from adapterkern.training.data.rows import ColumnError
    from adapterkern.training.data.split import HeldOut
    from adapterkern.training.heads import saved_labels
    from adapterkern.training.saved import load_config

    path = path.train_data if isinstance(path, HeldOut) else path
    config = as_asked(arguments, load_config(directory))
    text, label, prompt, completion = (repr(getattr(config, name)) for name in COLUMNS)
    reads = dict.fromkeys(LABELED, f"{text} and {label}") | {"causal-lm": f"{prompt} and {completion}, or {text}"}
    task = "question answering" if questions else config.task
    check_together(arguments, task=task)
    try:
        if questions:
            check_questions("--data", path, config, labeled)
        else:
            check_rows("--data", path, config, saved_labels(directory, config.task) if config.labeled else None)
    except ColumnError as error:
        columns = reads.get(task, "'question', 'context' and 'answers'")
        raise ColumnError(f"{error}. {directory} is a run of {task}, which reads {columns}") from error
