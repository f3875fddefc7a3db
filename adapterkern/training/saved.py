"""What a finished run or checkpoint leaves in its folder: writing and reading it.

    adapterkern.safetensors, adapterkern.json    the adapter (not for a head trained alone)
    head.safetensors, head_config.json           the head with its kind and label names (not for causal-lm)
    task.json       the kind of task, and the TrainConfig: how to tokenize, pad and score
    sources.json    where backbone and evaluation data are, if the run was started by a command

A task may save other files beside these, or in folders of its own.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterkern.files import read_json, read_versioned, write_json
from adapterkern.model.files.below import files_below
from adapterkern.model.files.card import CARD_NAME, push_folder
from adapterkern.model.files.folder import CONFIG_NAME, WEIGHTS_NAME, adapter_files
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.split import HeldOut
from adapterkern.training.head_kinds import HEADS
from adapterkern.training.heads import HEAD_CONFIG, HEAD_WEIGHTS, Head

TASK_NAME = "task.json"
SOURCES_NAME = "sources.json"
CHECKPOINTS = "checkpoints"  # a folder inside the run's folder
_CHECKPOINT = re.compile(r"step-(\d{8,})")
FORMAT_VERSION = 1  # of task.json


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = Path(output_dir) / CHECKPOINTS
    found = [p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def save_run(
    directory: Path,
    model: LlamaAdapter,
    head: Head | None,
    config: TrainConfig,
    *,
    kind: str,
    name: str | None = None,
) -> None:
    """Write the adapter (``name``, or the active one), the head and ``task.json``, each file atomically."""
    if config.train_adapters:
        model.save_pretrained(directory, name or model.active_adapter)
    if head is not None:
        head.save_pretrained(directory)
    save_config(directory, config, kind)


def save_config(directory: Path, config: TrainConfig, kind: str) -> None:
    """Write ``task.json``. ``kind`` is the name of the task's class."""
    saved = config.to_dict() | {"output_dir": None}  # the folder may be moved or uploaded
    write_json(directory / TASK_NAME, {"format_version": FORMAT_VERSION, "kind": kind, "config": saved})


def load_config(directory: str | os.PathLike[str]) -> TrainConfig:
    """The configuration of a saved run of any kind. Raises like ``load_run``."""
    path = Path(directory) / TASK_NAME
    if not path.exists() and (found := checkpoints(directory)):
        raise FileNotFoundError(
            f"{path}: no such file. The newest checkpoint of a run that has not finished is {found[-1]}"
        )
    saved = read_versioned(path, FORMAT_VERSION, {"config": dict})
    try:
        return TrainConfig.from_dict(saved["config"] | {"output_dir": None, "resume": False, "overwrite": False})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_kind(directory: str | os.PathLike[str]) -> str | None:
    """The name of the task's class; None for a run that 0.1.0 saved. Raises like ``load_run``."""
    return read_versioned(Path(directory) / TASK_NAME, FORMAT_VERSION, {}).get("kind")


def load_run(directory: str | os.PathLike[str]) -> tuple[TrainConfig, Head | None]:
    """The configuration and the head (None for causal-lm) that ``train`` saved, for ``evaluate``.

    ``LlamaAdapter.from_pretrained(llama, directory)`` reads the adapter; there is none if the configuration says
    ``train_adapters=False``. ``output_dir``, ``resume`` and ``overwrite`` have their defaults: the run is finished.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; the message names file and field.
    """
    config = load_config(directory)
    return config, load_head(directory, config)


def load_head(directory: str | os.PathLike[str], config: TrainConfig) -> Head | None:
    """The head of a saved run with this configuration; None for causal-lm. Raises like ``load_run``."""
    return HEADS[config.task].from_pretrained(directory) if config.labeled else None


def load_model(
    llama: Any, directory: str | os.PathLike[str], config: TrainConfig, *, fused: bool = True, liger: bool = False
) -> LlamaAdapter:
    """``llama`` with the run's adapter, or with none if it trained a head alone. Raises like ``load_run``."""
    if config.train_adapters:
        return LlamaAdapter.from_pretrained(llama, directory, fused=fused, liger=liger)
    return LlamaAdapter(llama, None, fused=fused, liger=liger)


def push_to_hub(directory: str | os.PathLike[str], repo_id: str, **options: Any) -> str:
    """Upload what ``train`` saved in ``directory`` to the Hugging Face hub; returns the repository's URL.

    That is the adapter, the head, ``task.json`` and the model card: no checkpoints, no metrics, no other file.
    ``options`` are huggingface_hub's ``private``, ``token``, ``revision`` and ``commit_message``.

    Raises:
        FileNotFoundError: no run is saved there.
        ValueError: its configuration is damaged.
    """
    config = load_config(directory)
    files = [CARD_NAME, TASK_NAME]
    if config.train_adapters:
        files += [*(adapter_files(directory) or (WEIGHTS_NAME, CONFIG_NAME)), *files_below(directory)]
    files += [HEAD_WEIGHTS, HEAD_CONFIG] if (Path(directory) / HEAD_CONFIG).exists() else []
    return push_folder(Path(directory), repo_id, files, **options)


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where a run's backbone and evaluation data are, so that ``adapterkern eval DIR`` finds them."""

    model: str
    num_layers: int | None = None
    dtype: str = "fp32"
    eval_data: str | HeldOut | None = None  # a path or a hub name, or a part of the training data
    tokenizer: str | None = None  # a digest of its tokens
    options: Mapping[str, Any] | None = None  # of the command that began the run
    load_in: str | None = None  # 8bit or 4bit, of a backbone that was quantized as it was loaded


def save_sources(directory: Path, sources: Sources | Mapping[str, Sources]) -> None:
    """Write ``sources.json`` into a run's folder, or one into each subfolder of a mapping. Paths are absolute."""
    for folder, of_folder in (sources if isinstance(sources, Mapping) else {"": sources}).items():
        fields = dataclasses.asdict(of_folder)
        part = fields["eval_data"]
        for of, name in ((fields, "model"), (part, "train_data") if isinstance(part, dict) else (fields, "eval_data")):
            if of[name] is not None and os.path.exists(of[name]):  # a hub name stays
                of[name] = os.path.abspath(of[name])
        write_json(directory / folder / SOURCES_NAME, fields)


def load_sources(directory: str | os.PathLike[str]) -> Sources:
    """Read ``sources.json`` of a run, or of the run that a checkpoint belongs to.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the message names file and field.
    """
    path = Path(directory) / SOURCES_NAME
    if not path.exists():
        absolute = Path(os.path.abspath(directory))
        for step in (absolute, *absolute.parents):
            if step.parent.name == CHECKPOINTS and step.name.startswith("step-"):
                path = step.parent.parent / absolute.relative_to(step) / SOURCES_NAME  # the run's, or a subfolder's
                break
    saved = read_json(path)
    if isinstance(saved.get("eval_data"), dict):
        try:
            saved["eval_data"] = HeldOut.from_dict(saved["eval_data"])
        except ValueError as error:
            raise ValueError(f"{path}: eval_data: {error}") from error
    kinds: dict[str, Any] = {"model": str, "num_layers": int | None, "dtype": str, "tokenizer": str | None}
    kinds |= {"eval_data": str | HeldOut | None, "options": dict | None, "load_in": str | None}
    for name, kind in kinds.items():
        value = saved.setdefault(name, None)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{path}: {name}: expected {getattr(kind, '__name__', kind)}, got {value!r:.80}")
    return Sources(**{name: saved[name] for name in kinds})
