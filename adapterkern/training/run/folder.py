"""A run's folder: what may be there before, and the saved task that ``eval`` and users read afterwards.

    adapter_model.safetensors, adapter_config.json    the adapter (not for a head trained alone)
    head.safetensors, head_config.json                the classification head with its label names (not for causal-lm)
    task.json                                         the TrainConfig: how to tokenise, pad and score
    README.md                                         the model card
    tasks/NAME/...                                    instead, for several tasks: those three of each
    metrics.jsonl, training.png, checkpoints/         see report.py and checkpoint.py
    sources.json                                      from a command: where backbone and evaluation data are

A checkpoint's folder holds the first four as well, and can be used in the same way.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from adapterkern.files import read_json, remove_temporaries
from adapterkern.model.files.card import CARD_NAME, MARK, Training, write_card
from adapterkern.model.files.folder import CONFIG_NAME, WEIGHTS_NAME
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training.config import TrainConfig
from adapterkern.training.heads import HEAD_CONFIG, HEAD_WEIGHTS
from adapterkern.training.run.checkpoint import CheckpointError, checkpoints, remove_leftovers
from adapterkern.training.run.report import METRICS_NAME, PLOT_NAME
from adapterkern.training.saved import FOLDER, SOURCES_NAME, TASK_NAME

TASKS_FOLDER = "tasks"
ROUTING_WEIGHTS, ROUTING_CONFIG = "routing.safetensors", "routing_config.json"
DISTILLATION_CONFIG = "distillation.json"
MULTITASK_CONFIG = f"{TASKS_FOLDER}/multitask.json"
_FILES = (
    *(METRICS_NAME, PLOT_NAME, TASK_NAME, HEAD_WEIGHTS, HEAD_CONFIG, WEIGHTS_NAME, CONFIG_NAME),
    *(ROUTING_WEIGHTS, ROUTING_CONFIG, DISTILLATION_CONFIG),
)


def prepare_folder(config: TrainConfig) -> None:
    """Make ``output_dir``, and see that this run may write there. Of an earlier run nothing is removed yet.

    Raises:
        FileExistsError: an earlier run is there, and neither ``overwrite`` nor ``resume`` is set.
        OSError: nothing can be written there, which is better known before the training than after it.
    """
    if config.output_dir is None:
        return
    directory = Path(config.output_dir)
    if config.resume:
        remove_leftovers(directory)
        for name in (*_FILES, CARD_NAME):
            remove_temporaries(directory / name)
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory):
        pass
    # By itself sources.json is no run: it is there before the first checkpoint.
    found = [name for name in (*_FILES, FOLDER, MULTITASK_CONFIG) if (directory / name).exists()]
    if found and not config.overwrite:
        raise FileExistsError(
            f"output_dir: {directory} holds an earlier run ({found[0]}): resume it (resume=True, --resume), "
            "replace it (overwrite=True, --overwrite), or name another folder"
        )


def remove_earlier_run(config: TrainConfig) -> None:
    """With ``overwrite``, remove an earlier run's files from ``output_dir``, and no others: its card, not another."""
    if config.output_dir is None or not config.overwrite:
        return
    directory = Path(config.output_dir)
    for path in (directory / name for name in (*_FILES, SOURCES_NAME, FOLDER, TASKS_FOLDER)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    card = directory / CARD_NAME
    if card.exists() and MARK.encode() in card.read_bytes():
        card.unlink()


def newest_checkpoint(output_dir: Path) -> Path:
    """Raises ``FileNotFoundError`` if there is none."""
    found = checkpoints(output_dir)
    if not found:
        raise FileNotFoundError(f"resume: expected a checkpoint in {output_dir / FOLDER}, found none")
    return found[-1]


def settings_to_resume(config: TrainConfig, name: str) -> tuple[Path, dict[str, Any]] | None:
    """Where the run to resume has its settings of a kind of task, and what they are; None where none is resumed.

    Raises:
        CheckpointError: it has none: it is of another kind. ValueError: they are damaged.
    """
    if not config.resume or config.output_dir is None:
        return None
    path = newest_checkpoint(Path(config.output_dir)) / name
    try:
        return path, read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing: the run was begun with another kind of task") from error


_SETTINGS = ("epochs", "lr", "schedule", "warmup", "weight_decay", "max_norm", "max_length", "precision", "seed")


def write_run_card(directory: Path, model: LlamaAdapter, config: TrainConfig, training: dict[str, Any]) -> None:
    """Write the model card of the adapter or head that lies in ``directory``; where several lie, each has its own.

    ``training`` are the fields of a :class:`~adapterkern.model.files.card.Training` that ``config`` does not know.
    """
    if config.train_adapters and not (directory / CONFIG_NAME).exists():
        return
    settings = {"rows a step": config.rows_per_step} | {name: getattr(config, name) for name in _SETTINGS}
    adapter = model.adapter_config() if config.train_adapters else None
    write_card(directory, model.base, adapter, Training(settings=settings, **training))
