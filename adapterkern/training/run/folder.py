"""A run's folder: what may be there before the run, and what is removed when an earlier run is replaced.

    data_summary.json, metrics.jsonl, training.png    see report.py
    checkpoints/                                      see checkpoint.py
    task.json, sources.json, the adapter, ...         see saved.py; ``Task.files`` names what a task saves
    README.md                                         the model card
    trackers/                                         see trackers.py

A checkpoint's folder holds what the task saves too, and can be loaded in the same way.
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from adapterkern.files import check_owner, check_pair, remove_temporaries
from adapterkern.model.config import AdapterConfig
from adapterkern.model.files.below import files_below
from adapterkern.model.files.card import CARD_NAME, MARK, Training, write_card
from adapterkern.model.files.folder import ADAPTER_FILES, OLD_WEIGHTS_NAME, adapter_files
from adapterkern.model.files.owner import check_folder
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.heads import HEAD_CONFIG, HEAD_WEIGHTS
from adapterkern.training.run.checkpoint import check_begun_with, checkpoints, remove_leftovers, saved_names
from adapterkern.training.run.lock import check_writable, locked
from adapterkern.training.run.report import DATA_NAME, METRICS_NAME, PLOT_NAME, read_metrics
from adapterkern.training.run.trackers import remove_tracked
from adapterkern.training.saved import CHECKPOINTS, SOURCES_NAME, TASK_NAME

_FILES = (METRICS_NAME, DATA_NAME, PLOT_NAME, TASK_NAME, HEAD_WEIGHTS, HEAD_CONFIG, *ADAPTER_FILES)
# What other kinds of task saved in 0.1.0, for a run whose checkpoints, and so the list of its files, are gone.
_EARLIER_FILES = ("routing.safetensors", "routing_config.json", "distillation.json", "tasks/multitask.json")
_EARLIER_FOLDERS = "tasks/*"
# JSON files and a field that each of them has.
_MARKS = dict.fromkeys((TASK_NAME, HEAD_CONFIG, "routing_config.json", "multitask.json"), "format_version")
_MARKS |= {SOURCES_NAME: "model", "distillation.json": "temperature"}


@contextlib.contextmanager
def run_folder(config: TrainConfig, files: Sequence[str]) -> Iterator[None]:
    """Hold ``output_dir`` inside the block, a run: rank 0 locks it. Nothing of an earlier run is removed yet.

    Raises:
        what ``check_output`` raises, on every rank.
    """
    with contextlib.ExitStack() as stack:
        processes.on_rank_zero(lambda: _enter(stack, config, files))
        yield


def _enter(stack: contextlib.ExitStack, config: TrainConfig, files: Sequence[str]) -> None:
    if config.output_dir is None:
        return
    directory = Path(config.output_dir)
    check_output(config, files)
    stack.enter_context(locked(directory))
    remove_leftovers(directory)
    if config.resume:
        for name in (*_FILES, *files, CARD_NAME):
            remove_temporaries(directory / name)


def check_output(config: TrainConfig, files: Sequence[str], adapter: AdapterConfig | None = None) -> None:
    """Check that a run may write to ``output_dir``, before anything that takes time. Writes nothing.

    Args:
        files: what the task saves.
        adapter: compared with a resumed run's, if it trains one.

    Raises:
        BlockingIOError: another run is writing there.
        ValueError: a model, another library's adapter or another program's file is there that this run would replace.
        FileExistsError: an earlier run is there, and neither ``overwrite`` nor ``resume`` is set.
        FileNotFoundError: with ``resume``, there is no checkpoint.
        CheckpointError: it is damaged, or the run was begun with other settings or another adapter.
        OSError: the folder is not writable.
    """
    if config.output_dir is None:
        return
    directory = Path(config.output_dir)
    check_writable(directory)
    _check_owned(directory, {*_FILES, *files, *_EARLIER_FILES, SOURCES_NAME})
    if config.resume:
        check_begun_with(newest_checkpoint(directory), config, adapter)
        return
    # sources.json alone is not a run: it is written before the first checkpoint.
    found = [name for name in (*_FILES, *files, *_EARLIER_FILES) if (directory / name).exists()]
    # Neither is a folder of checkpoints in which the first was never finished.
    found += [CHECKPOINTS] if any((directory / CHECKPOINTS).glob("[!.]*")) else []
    if found and not config.overwrite:
        resume = "resume it (resume=True), " if checkpoints(directory) else ""
        stopped = "" if resume or (directory / TASK_NAME).exists() else ", which stopped before its first checkpoint"
        raise FileExistsError(
            f"output_dir: {directory} holds an earlier run ({found[0]}){stopped}: {resume}"
            "replace it (overwrite=True), or name another folder"
        )


def _check_owned(directory: Path, names: Collection[str]) -> None:
    """Raise ``ValueError`` if ``directory``, or a folder inside it that the run writes to, has files of others."""
    folders = {directory, *(path.parent for path in map(directory.joinpath, names)), *directory.glob(_EARLIER_FOLDERS)}
    own = {Path(name).name for name in names}
    for folder in sorted(folder for folder in folders if folder.is_dir()):
        check_folder(folder, "output_dir")
        try:
            for path in sorted(path for path in folder.iterdir() if path.name in own and path.is_file()):
                _check_file(path)
        except ValueError as error:
            raise ValueError(f"output_dir: {error}; name another folder") from error


def _check_file(path: Path) -> None:
    """Raise ``ValueError`` if a file of a run's name is not a run's."""
    if (mark := _MARKS.get(path.name)) is not None:
        check_owner(path, "adapterkern", lambda saved: not saved or mark in saved)
    elif path.suffix == ".safetensors" and path.name != OLD_WEIGHTS_NAME:
        configs = [path.with_name(f"{path.stem}{end}") for end in ("_config.json", ".json")]
        check_pair(path, next((config for config in configs if config.exists()), configs[0]))
    elif path.name == METRICS_NAME:
        read_metrics(path)
    elif path.name == PLOT_NAME and not any((path.parent / name).exists() for name in (METRICS_NAME, TASK_NAME)):
        raise ValueError(f"{path}: expected a run's plot or none, got one without {METRICS_NAME} and {TASK_NAME}")


def remove_earlier_run(config: TrainConfig, files: Sequence[str]) -> None:
    """With ``overwrite``, remove an earlier run's files from ``output_dir``, and no others.

    The earlier run may be of another kind: its checkpoints list what it saved. The card goes if this package wrote it.
    """
    if config.output_dir is None or not config.overwrite:
        return
    directory = Path(config.output_dir)
    names = {*_FILES, *files, *_EARLIER_FILES, SOURCES_NAME, *files_below(directory)}
    for checkpoint in checkpoints(directory):
        names |= saved_names(checkpoint)
    paths = {directory / name for name in names}
    # Each folder that has files of the run may have a card and the sources, too.
    for folder in {path.parent for path in paths} | set(directory.glob(_EARLIER_FOLDERS)):
        paths |= {folder / name for name in (*_FILES, SOURCES_NAME)}
    # Weights before their configurations, by which they are known to be a run's: see `check_pair`.
    for path in sorted(paths, key=lambda path: (path.suffix == ".json", path)):
        if path.name != CARD_NAME and path.is_file():
            path.unlink()
    for folder in sorted({path.parent for path in paths}, reverse=True):
        card = folder / CARD_NAME
        if card.is_file() and MARK.encode() in card.read_bytes():
            card.unlink()
        while folder != directory and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
    remove_tracked(directory)
    # The checkpoints last, since they hold the list: an interrupted removal can be repeated.
    remove_leftovers(directory)
    for checkpoint in checkpoints(directory):
        shutil.rmtree(checkpoint)
    if (directory / CHECKPOINTS).is_dir() and not any((directory / CHECKPOINTS).iterdir()):
        (directory / CHECKPOINTS).rmdir()


def newest_checkpoint(output_dir: Path) -> Path:
    """The newest checkpoint of a run. Raises ``FileNotFoundError`` if there is none."""
    found = checkpoints(output_dir)
    if not found:
        begun = (output_dir / METRICS_NAME).exists() and not (output_dir / TASK_NAME).exists()
        hint = ": the run there stopped before its first; begin again (overwrite=True)" if begun else ""
        for run in output_dir.parents[:2]:
            if any(output_dir in (run / CHECKPOINTS, checkpoint) for checkpoint in checkpoints(run)):
                hint = f": output_dir is the folder of the run, {run}"
        raise FileNotFoundError(f"resume: expected a checkpoint in {output_dir / CHECKPOINTS}, got none{hint}")
    return found[-1]


_SETTINGS = (
    "epochs",
    "lr",
    "head_lr",
    "schedule",
    "warmup",
    "weight_decay",
    "max_norm",
    "max_length",
    "precision",
    "seed",
)


def write_run_card(directory: Path, model: LlamaAdapter, config: TrainConfig, training: dict[str, Any]) -> None:
    """Write the model card of the adapter or head in ``directory``; a task with several adapters has one per adapter.

    Args:
        training: the fields of ``Training`` other than ``settings``.
    """
    if config.train_adapters and adapter_files(directory) is None:
        return
    settings = {"rows per step": config.rows_per_step}
    settings |= {name: value for name in _SETTINGS if (value := getattr(config, name)) is not None}
    adapter = model.adapter_config() if config.train_adapters else None
    below = model.adapters_below() if config.train_adapters else ()
    write_card(directory, model.base, adapter, Training(settings=settings, **training), below)
