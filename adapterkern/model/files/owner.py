"""Whose files a folder holds: nothing is saved over a model's, or beside another library's adapter.

The check stands before everything that writes an adapter, a head or a run, so a refusal leaves the folder as it was.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from adapterkern.files import check_owner, read_json

MODEL_CONFIG = "config.json"
OTHERS_CONFIG = "adapter_config.json"  # PEFT's, AdapterHub's, and ours up to 0.1.0
RUN_CONFIG, CHECKPOINT_CONFIG = "task.json", "state.json"  # beside an adapter that belongs to a training
OURS = "adapters."  # how every key of ours begins in the file that transformers' Trainer resumes from
_PICKLED = re.compile(rf"{re.escape(Path(WEIGHTS_NAME).stem)}(-\d+-of-\d+|\.[\w-]+)?\.bin")
_SAFE = re.compile(rf"{re.escape(Path(SAFE_WEIGHTS_NAME).stem)}(-\d+-of-\d+|\.[\w-]+)?\.safetensors")


def check_folder(directory: str | Path, argument: str = "directory", owner: str = "adapterkern") -> None:
    """Raise ``ValueError`` if ``directory`` holds a model or another library's adapter, ``OSError`` if it is a file.

    Args:
        directory: need not exist.
        argument: what the message calls it.
        owner: the library whose format is about to be written, ``"adapterkern"``, ``"AdapterHub"`` or ``"PEFT"``.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{argument}: expected a folder, got {directory}, which is a file")
    if (name := _of_a_model(directory)) is not None:
        raise ValueError(
            f"{argument}: expected a folder without a model, got {directory}, which holds one ({name}): saving there "
            "would damage it; name another folder"
        )
    ours = owner == "adapterkern"
    try:
        check_owner(directory / OTHERS_CONFIG, owner, _WRITTEN_BY[owner])
        check_owner(directory / "adapterkern.json", owner, is_ours if ours else lambda _: False)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}; name another folder") from error


def check_no_run(directory: Path) -> None:
    """Raise ``ValueError`` if an adapter in ``directory`` belongs to a training, outside of ``writing`` there."""
    if any(directory.resolve().is_relative_to(folder) for folder in _writing):
        return
    holds = ""
    if is_ours(_read(directory / CHECKPOINT_CONFIG)):
        holds = f"a training's checkpoint ({CHECKPOINT_CONFIG})"
    elif is_ours(_read(directory / RUN_CONFIG)):
        adapters = (name for name in ("adapterkern.json", OTHERS_CONFIG) if (directory / name).exists())
        holds = f"a training's adapter ({RUN_CONFIG})" if any(adapters) else ""
    if holds:
        raise ValueError(
            f"directory: expected a folder without one of a training, got {directory}, which holds {holds}: it would "
            "be replaced; name another folder"
        )


_writing: list[Path] = []


@contextlib.contextmanager
def writing(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Inside the block adapters are saved in ``directory``, and in folders inside it, as parts of a training."""
    folder = Path(directory).resolve()
    _writing.append(folder)
    try:
        yield
    finally:
        _writing.remove(folder)


def is_ours(config: dict[str, Any]) -> bool:
    """Whether the JSON of a saved adapter, head or router is this package's."""
    return "format_version" in config


def is_adapterhub(config: dict[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is that of AdapterHub's ``adapters``."""
    return isinstance(config.get("config"), dict)


def is_adaption_prompt(config: dict[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is that of PEFT's ``AdaptionPrompt``."""
    return config.get("peft_type") == "ADAPTION_PROMPT"


_WRITTEN_BY = {"adapterkern": is_ours, "AdapterHub": is_adapterhub, "PEFT": is_adaption_prompt}


def whose(directory: Path) -> str:
    """What ``directory`` holds and who loads it, for a message; "" if there is nothing that is known."""
    saved = _read(directory / OTHERS_CONFIG)
    if is_adaption_prompt(saved):
        return "PEFT's gated prompts, which LlamaAdapter.from_peft loads"
    if "peft_type" in saved:
        return f"PEFT's adapter (peft_type {saved['peft_type']!r}), which peft.PeftModel.from_pretrained loads"
    if is_adapterhub(saved):
        return "AdapterHub's adapter, which LlamaAdapter.from_adapterhub loads"
    if saved and not is_ours(saved):
        return f"another library's adapter, with the fields {', '.join(sorted(saved)[:6])}"
    name = _of_a_model(directory)
    return "" if name is None else f"a model ({name}), which transformers loads"


def _of_a_model(directory: Path) -> str | None:
    """The name of a file by which transformers would load ``directory`` as a model; None if there is none."""
    if _read(directory / MODEL_CONFIG).keys() & {"model_type", "architectures"}:
        return MODEL_CONFIG
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        name = path.name
        if name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME) or _PICKLED.fullmatch(name):
            return name
        if _SAFE.fullmatch(name) and not _has_our_keys(path):
            return name
    return None


def _has_our_keys(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return all(key.startswith(OURS) for key in file.keys())  # noqa: SIM118 it is no dict
    except (SafetensorError, OSError):
        return False


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty if there is none."""
    try:
        return read_json(path, ours=False)
    except (ValueError, OSError):
        return {}
