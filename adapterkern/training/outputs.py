"""A run's folder: what may be there before, and the saved task that ``eval`` and users read afterwards.

    adapter_model.safetensors, adapter_config.json    the adapter (not for a head trained alone)
    head.safetensors, head_config.json                the classification head with its label names (not for causal-lm)
    task.json                                         the TrainConfig: how to tokenise, pad and score
    tasks/NAME/...                                    instead, for several tasks: those three of each
    metrics.jsonl, training.png, checkpoints/         see report.py and checkpoint.py

A checkpoint's folder holds the first three as well, and can be used in the same way.
"""

import os
import shutil
from pathlib import Path

from adapterkern.files import read_json, write_json
from adapterkern.llama import CONFIG_NAME, WEIGHTS_NAME, LlamaAdapter
from adapterkern.training.checkpoint import FOLDER, checkpoints
from adapterkern.training.config import TrainConfig
from adapterkern.training.heads import HEAD_CONFIG, HEAD_WEIGHTS, ClassificationHead
from adapterkern.training.report import METRICS_NAME, PLOT_NAME

TASK_NAME = "task.json"
TASKS_FOLDER = "tasks"
ROUTING_WEIGHTS, ROUTING_CONFIG = "routing.safetensors", "routing_config.json"
FORMAT_VERSION = 1
_FILES = (
    *(METRICS_NAME, PLOT_NAME, TASK_NAME, HEAD_WEIGHTS, HEAD_CONFIG, WEIGHTS_NAME, CONFIG_NAME),
    *(ROUTING_WEIGHTS, ROUTING_CONFIG),
)


def prepare_folder(config: TrainConfig) -> None:
    """Make ``output_dir``; with ``overwrite`` remove an earlier run's files from it, and no others.

    Raises:
        FileExistsError: an earlier run is there, and neither ``overwrite`` nor ``resume`` is set.
    """
    if config.output_dir is None or config.resume:
        return
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    found = [directory / name for name in (*_FILES, FOLDER, TASKS_FOLDER) if (directory / name).exists()]
    if found and not config.overwrite:
        raise FileExistsError(
            f"output_dir: {directory} holds an earlier run ({found[0].name}): resume it (resume=True, --resume), "
            "replace it (overwrite=True, --overwrite), or name another folder"
        )
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def newest_checkpoint(output_dir: Path) -> Path:
    """Raises ``FileNotFoundError`` if there is none."""
    found = checkpoints(output_dir)
    if not found:
        raise FileNotFoundError(f"resume: expected a checkpoint in {output_dir / FOLDER}, found none")
    return found[-1]


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
    write_json(directory / TASK_NAME, {"format_version": FORMAT_VERSION, "config": config.to_dict()})


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
