"""What a finished run or checkpoint leaves behind, written and read: ``task.json``, and where its sources are.

task.json       the TrainConfig: how to tokenise, pad and score
sources.json    from a command: where backbone and evaluation data are
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from adapterkern.files import read_json, write_json
from adapterkern.model.files.card import CARD_NAME, push_folder
from adapterkern.model.files.folder import CONFIG_NAME, WEIGHTS_NAME
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training.config import TrainConfig
from adapterkern.training.heads import HEAD_CONFIG, HEAD_WEIGHTS, ClassificationHead

TASK_NAME = "task.json"
FORMAT_VERSION = 1
FOLDER = "checkpoints"  # in a run's folder


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


SOURCES_NAME = "sources.json"


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where a run's backbone and evaluation data came from, so that ``adapterkern eval DIR`` finds them again."""

    model: str
    num_layers: int | None = None
    dtype: str = "fp32"
    eval_data: str | None = None


def save_sources(directory: str | os.PathLike[str], sources: Sources) -> None:
    """Write ``sources.json`` into a run's folder."""
    write_json(Path(directory) / SOURCES_NAME, dataclasses.asdict(sources))


def load_sources(directory: str | os.PathLike[str]) -> Sources:
    """Read it back; a checkpoint's is its run's.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged; the message names file and field.
    """
    path = Path(directory) / SOURCES_NAME
    if not path.exists():
        step = Path(os.path.abspath(directory))
        while step != step.parent:
            if step.parent.name == FOLDER and step.name.startswith("step-"):
                inside = Path(os.path.abspath(directory)).relative_to(step)  # tasks/NAME, or nothing
                path = step.parent.parent / inside / SOURCES_NAME
                break
            step = step.parent
    saved = read_json(path)
    kinds = {"model": str, "num_layers": int | None, "dtype": str, "eval_data": str | None}
    for name, kind in kinds.items():
        if not isinstance(saved.get(name), kind):
            raise ValueError(f"{path}: {name}: expected {kind}, got {saved.get(name)!r}")
    return Sources(**{name: saved[name] for name in kinds})
