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

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from adapterkern.card import CARD_NAME, MARK, Training, push_folder, write_card
from adapterkern.files import read_json, remove_temporaries, write_json
from adapterkern.folder import CONFIG_NAME, WEIGHTS_NAME
from adapterkern.llama import LlamaAdapter
from adapterkern.training.backbone import SOURCES_NAME
from adapterkern.training.checkpoint import FOLDER, CheckpointError, checkpoints, remove_leftovers
from adapterkern.training.config import TrainConfig
from adapterkern.training.heads import HEAD_CONFIG, HEAD_WEIGHTS, ClassificationHead
from adapterkern.training.report import METRICS_NAME, PLOT_NAME

TASK_NAME = "task.json"
TASKS_FOLDER = "tasks"
ROUTING_WEIGHTS, ROUTING_CONFIG = "routing.safetensors", "routing_config.json"
DISTILLATION_CONFIG = "distillation.json"
MULTITASK_CONFIG = f"{TASKS_FOLDER}/multitask.json"
FORMAT_VERSION = 1
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


def save_task(
    directory: Path,
    model: LlamaAdapter,
    head: ClassificationHead | None,
    config: TrainConfig,
    name: str | None = None,
) -> None:
    """Write the adapter (the active one, or ``name``), the head and ``task.json``, each file atomically."""
    if config.train_adapters:
        model.save_pretrained(directory, name)
    if head is not None:
        head.save_pretrained(directory)
    save_config(directory, config)


def save_config(directory: Path, config: TrainConfig) -> None:
    """Write ``task.json``."""
    # Where the run wrote is nobody's business where the folder goes.
    saved = config.to_dict() | {"output_dir": None}
    write_json(directory / TASK_NAME, {"format_version": FORMAT_VERSION, "config": saved})


_SETTINGS = ("epochs", "lr", "schedule", "warmup", "weight_decay", "max_norm", "max_length", "precision", "seed")


def write_run_card(directory: Path, model: LlamaAdapter, config: TrainConfig, training: dict[str, Any]) -> None:
    """Write the model card of the adapter or head that lies in ``directory``; where several lie, each has its own.

    ``training`` are the fields of a :class:`~adapterkern.card.Training` that ``config`` does not know.
    """
    if config.train_adapters and not (directory / CONFIG_NAME).exists():
        return
    settings = {"rows a step": config.rows_per_step} | {name: getattr(config, name) for name in _SETTINGS}
    adapter = model.adapter_config() if config.train_adapters else None
    write_card(directory, model.base, adapter, Training(settings=settings, **training))


def push_to_hub(directory: str | os.PathLike[str], repo_id: str, **options: Any) -> str:
    """Upload what :func:`train` saved in ``directory`` to the Hugging Face hub; the repository's URL comes back.

    That is the adapter, the head, ``task.json`` and the card: no checkpoints, no metrics, nothing else of the folder.
    ``options`` are ``private``, ``token``, ``revision`` and ``commit_message``, as huggingface_hub has them.

    Raises:
        FileNotFoundError: no run is saved there. ValueError: its configuration is damaged.
    """
    config = load_config(directory)
    files = [CARD_NAME, TASK_NAME]
    files += [WEIGHTS_NAME, CONFIG_NAME] if config.train_adapters else []
    files += [HEAD_WEIGHTS, HEAD_CONFIG] if (Path(directory) / HEAD_CONFIG).exists() else []
    return push_folder(Path(directory), repo_id, files, **options)


def load_task(directory: str | os.PathLike[str]) -> tuple[TrainConfig, ClassificationHead | None]:
    """The configuration and the head (None for causal-lm) that :func:`train` saved; ``evaluate`` takes both.

    The adapter is read by ``LlamaAdapter.from_pretrained(llama, directory)``; there is none if the configuration says
    ``train_adapters=False``. The configuration comes without ``output_dir`` and ``resume``: it is a finished run's.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged; the message names file and field.
    """
    config = load_config(directory)
    return config, ClassificationHead.from_pretrained(directory) if config.task == "classification" else None


def load_config(directory: str | os.PathLike[str]) -> TrainConfig:
    """The configuration of a finished run of any task. Raises as :func:`load_task`."""
    path = Path(directory) / TASK_NAME
    saved = read_json(path)
    if saved.get("format_version") != FORMAT_VERSION or not isinstance(saved.get("config"), dict):
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION} and a config")
    try:
        return TrainConfig.from_dict(saved["config"] | {"output_dir": None, "resume": False, "overwrite": False})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
