"""A saved run, of whatever kind: what it holds, and all that answers with it, in one call."""

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapterkern.files import read_json
from adapterkern.model.backbone import check_hub, load_backbone, why_not_from_hub
from adapterkern.model.files.folder import CONFIG_NAME, adapter_files
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.multitask.task import MULTITASK_CONFIG, MultiTask
from adapterkern.recipes.qa.task import QuestionAnswering
from adapterkern.recipes.routing.task import ROUTING_CONFIG, RoutedTask
from adapterkern.training.config import TrainConfig
from adapterkern.training.heads import head_kind
from adapterkern.training.run.checkpoint import STATE_NAME, checkpoints
from adapterkern.training.saved import SOURCES_NAME, TASK_NAME, Sources, load_config, load_kind, load_sources
from adapterkern.training.task import Task

logger = logging.getLogger(__name__)

_EXPECTED = "expected the output folder of a training, a checkpoint or a saved adapter"
_UPLOADED = ["*.json", "*.safetensors"]  # what `push_to_hub` uploads, but for the card


class Opened(NamedTuple):
    """A saved run on its backbone."""

    task: Task[Any]
    config: TrainConfig
    tokenizer: Any


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a folder holds.

    Attributes:
        directory: where the files are: of a run that has not finished the newest checkpoint.
        kind: the class of its task. ``Task`` for an adapter alone, which a language model is made of.
        sources: where its backbone is; None where nothing says so.
        alone: it is an adapter without a training's files.
    """

    directory: Path
    kind: type[Task[Any]]
    sources: Sources | None
    alone: bool = False

    @property
    def config(self) -> TrainConfig:
        """That of its training, by which its data are read. Raises ``ValueError`` for a damaged one."""
        if self.alone:
            return TrainConfig(task="causal-lm")
        return load_config(_one_folder(self.directory, self.kind))

    @property
    def classifies(self) -> bool:
        """Whether it labels texts, by heads. Raises as ``config``."""
        return not issubclass(self.kind, QuestionAnswering) and self.config.labeled

    def open(
        self,
        *,
        model: str | os.PathLike[str] | None = None,
        num_layers: int | None = None,
        dtype: str | None = None,
        device: torch.device | str | None = None,
        fused: bool = True,
        liger: bool = False,
        load_in: str | None = None,
        attn: str | None = None,
    ) -> Opened:
        """The run on its backbone, or on ``model``; the arguments are those of ``api.load``.

        Raises:
            FileNotFoundError: a file of the run, or its backbone, is missing.
            ValueError: a file is damaged or does not fit.
        """
        source, flags = self.backbone(model), {"fused": fused, "liger": liger}
        with torch.random.fork_rng(devices=[]):  # adapters are made before they are filled
            llama, tokenizer = load_backbone(
                source.model,
                num_layers=source.num_layers if num_layers is None else num_layers,
                dtype=dtype or source.dtype,
                device=device,
                load_in=load_in or source.load_in,
                attn=attn,
            )
            if source.tokenizer not in (None, tokens_digest(tokenizer)):
                logger.warning("%s: was trained with other tokens than those of %s", self.directory, source.model)
            if self.alone:
                adapted = LlamaAdapter.from_pretrained(llama, self.directory, **flags)
                return Opened(Task(adapted), self.config, tokenizer)
            task, config = self.kind.from_pretrained(llama, self.directory, **flags)
            return Opened(task, config, tokenizer)

    def backbone(self, model: str | os.PathLike[str] | None = None) -> Sources:
        """Where the backbone is: ``model``, or what the run says. Raises ``FileNotFoundError`` if that is nowhere."""
        if model is not None:
            return dataclasses.replace(self.sources or Sources("", dtype="auto"), model=os.fspath(model))
        if self.sources is None:
            raise FileNotFoundError(
                f"model: expected the backbone, since {self.directory / SOURCES_NAME} is not there to say what it was; "
                "got model=None"
            )
        known = self.sources.model
        if os.path.isabs(known) and not os.path.exists(known):
            raise FileNotFoundError(
                f"model: {self.directory} was trained on {known}, which is not there; say where it is now, got "
                "model=None"
            )
        return self.sources


def find_run(source: str | os.PathLike[str]) -> SavedRun:
    """What ``source`` holds: a folder, or a repository on the Hugging Face hub that ``push_to_hub`` has filled.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or nothing of ours in it.
        OSError: the hub does not have it, or cannot be asked.
        ValueError: a file is damaged.
    """
    directory = run_folder(_folder(source))
    kind = task_class(directory) if _is_run(directory) else Task
    folder = _one_folder(directory, kind)
    try:
        sources: Sources | None = load_sources(folder)
    except FileNotFoundError:
        sources = _described(folder)
    return SavedRun(directory, kind, sources, alone=not _is_run(directory))


def _one_folder(directory: Path, kind: type[Task[Any]]) -> Path:
    """The folder of a run's first task. All tasks of a run have one backbone, and one configuration."""
    return MultiTask.folder(directory, MultiTask.saved_names(directory)[0]) if kind is MultiTask else directory


def _folder(source: str | os.PathLike[str]) -> Path:
    name = os.fspath(source)
    if os.path.exists(name) or not isinstance(source, str) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        cached = check_hub(name, "directory", CONFIG_NAME)
        return Path(snapshot_download(name, allow_patterns=_UPLOADED, local_files_only=cached))
    except Exception as error:
        raise OSError(f"directory: no folder {name} here, and {why_not_from_hub(name, error)}") from error


def run_folder(directory: Path) -> Path:
    """``directory``; of a run that has not finished the newest checkpoint, with a warning. Raises as ``find_run``."""
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such folder; {_EXPECTED}")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory}: {_EXPECTED}, got a file")
    if _is_run(directory):
        return directory
    if found := checkpoints(directory):
        logger.warning("%s: has not finished; this is of its newest checkpoint, %s", directory, found[-1].name)
        return found[-1]
    if adapter_files(directory) is not None:
        return directory
    names = sorted(path.name for path in directory.iterdir())
    there = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise FileNotFoundError(
        f"{directory}: expected a finished training or a checkpoint, with {TASK_NAME}, or a saved adapter; "
        f"got a folder with {there or 'no files'}"
    )


def _is_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in (TASK_NAME, MULTITASK_CONFIG, STATE_NAME))


def _described(directory: Path) -> Sources | None:
    """The backbone that the adapter's own file names: of a run from the hub, or an adapter saved by itself."""
    files = adapter_files(directory)
    try:
        saved = read_json(directory / (files[1] if files else ROUTING_CONFIG))
    except FileNotFoundError:
        return None
    base, backbone = ({} if not isinstance(part := saved.get(key), dict) else part for key in ("base", "backbone"))
    name, layers = base.get("name_or_path") or backbone.get("name_or_path"), base.get("num_hidden_layers")
    if not isinstance(name, str) or not isinstance(layers, int):
        return None
    # Of a folder elsewhere the file has the last part of its path alone
    return Sources(name, layers, "auto") if "/" in name or os.path.exists(name) else None


def task_class(directory: str | os.PathLike[str]) -> type[Task[Any]]:
    """The class of a saved run's task; ``Task``, with a warning, for a class that is not of this package."""
    # A distilled model answers without its teacher.
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


def tokens_digest(tokenizer: Any) -> str:
    """A digest of the tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
