"""Checkpoints: folders that are whole or absent, hold no pickle, and resume a run to the same numbers.

    checkpoints/step-00000120/
        adapterkern.safetensors, adapterkern.json     the adapter, as LlamaAdapter.from_pretrained reads it
        head.safetensors, head_config.json            the classification head, if there is one; other tasks save other
                                                      files, in subfolders too
        task.json                                     the TrainConfig
        training.safetensors                          fp32 parameters, moments, generator states (uint8)
        state.json                                    step, schedule, scaler, what a resumed run must match, and the
                                                      SHA-256 of every other file and of its own fields

A checkpoint is written into a hidden folder beside its final place, and renamed once every byte has reached the disk.
Older ones are removed only after that, and renamed first, so neither a half-written nor a half-removed folder looks
like a checkpoint. The order of rows is a function of (seed, epoch), so the step determines the position in the data.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkern.files import flush, read_json, read_versioned, replacing, sha256, write_json
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import processes
from adapterkern.training.config import FREE_ON_RESUME, TrainConfig
from adapterkern.training.saved import CHECKPOINTS

FORMAT_VERSION = 2
STATE_NAME = "state.json"
TENSORS_NAME = "training.safetensors"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another run; the message names the file or field."""


@dataclasses.dataclass
class TrainingState:
    """Everything that a run's next step depends on, except the data and the backbone."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    scaler: Any  # a torch GradScaler or None
    config: TrainConfig
    data_fingerprint: str
    # "task", "settings", "adapters", "backbone": must match in a resumed run, if the checkpoint has them too.
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    # the settings in a checkpoint of 0.1.0, whose state.json has none; None where they are not known
    settings_in: Callable[[Path], dict[str, Any] | None] = lambda _: None
    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    prefix_cached: bool = False
    window: list[tuple[float, float | None]] = dataclasses.field(default_factory=list)  # (loss, norm) not logged yet


_SHAPES = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


def describe_backbone(model: LlamaAdapter) -> dict[str, Any]:
    """The backbone's shape, and a SHA-256 of a sample of its weights; None if this process does not hold them all."""
    described = {name: _field(model.config, name) for name in _SHAPES}
    for name in model.adapters:  # remembered: saves compare them, and the backbone may be sharded by then
        model.backbone_digest(name)
    return described | {"weights": model.backbone_digest()["exact"]}


def _field(config: Any, name: str) -> Any:
    """A field of a configuration; None if it has none, or raises because its layers differ in it."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


class Gathered(NamedTuple):
    """What a run has learned, by parameter name, gathered from all ranks."""

    parameters: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]  # moments and step count, for updated parameters


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = Path(output_dir) / CHECKPOINTS
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def remove_leftovers(output_dir: Path) -> None:
    """Remove folders that a killed process left half-written or half-removed among the checkpoints."""
    for path in (output_dir / CHECKPOINTS).glob(".*step-*"):
        shutil.rmtree(path)


def save_checkpoint(output_dir: Path, state: TrainingState, gathered: Gathered, save_model: Any) -> Path:
    """Write a checkpoint, then remove all but the newest ``config.keep_checkpoints``.

    Every rank must call it; rank 0 writes.

    Args:
        save_model: called with a folder; writes the files that make the checkpoint usable without the run.

    Returns:
        the checkpoint's folder.
    """
    return processes.on_rank_zero(lambda: _write(output_dir, state, gathered, save_model))


def _write(output_dir: Path, state: TrainingState, gathered: Gathered, save_model: Any) -> Path:
    target = output_dir / CHECKPOINTS / f"step-{state.step:08d}"
    if target.exists():  # the run resumed from it and has made no step since
        return target
    folder = target.parent
    temporary = folder / f".{target.name}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_model(temporary)
        with replacing(temporary / TENSORS_NAME) as path:  # names the file if the disk is full
            save_file(_tensors(gathered), path)
        written = sorted(temporary.rglob("*"))
        files = {path.relative_to(temporary).as_posix(): sha256(path) for path in written if path.is_file()}
        described = _described(state, gathered) | {"files": files}
        write_json(temporary / STATE_NAME, described | {"sha256": _digest(described)})
        for path in (*written, temporary / STATE_NAME, temporary):
            flush(path)
        temporary.rename(target)
        flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(output_dir)[: -state.config.keep_checkpoints]:
        _remove(old)
    return target


def load_checkpoint(directory: Path, state: TrainingState) -> None:
    """Load a checkpoint into ``state``: parameters, optimizer, schedule, scaler, generators, step.

    Nothing is changed before everything has been checked.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another configuration, data or model.
    """
    try:
        saved = read_versioned(directory / STATE_NAME, FORMAT_VERSION, _FIELDS)
        for name, kind in _ORIGIN.items():
            if name in saved and type(saved[name]) is not kind:
                raise CheckpointError(
                    f"{directory / STATE_NAME}: field {name!r}: expected {kind.__name__}, got {saved[name]!r}"
                )
        digest = saved.pop("sha256", None)
        if digest != _digest(saved):
            raise CheckpointError(f"{directory / STATE_NAME}: damaged: field 'sha256' does not match the other fields")
        for name, digest in saved["files"].items():
            outside = Path(name).is_absolute() or ".." in Path(name).parts
            if outside or sha256(directory / name) != digest:
                raise CheckpointError(f"{directory / name}: damaged: its SHA-256 differs from the one in {STATE_NAME}")
        if TENSORS_NAME not in saved["files"]:
            raise CheckpointError(f"{directory / STATE_NAME}: field 'files': {TENSORS_NAME} is missing")
        tensors = load_file(directory / TENSORS_NAME)
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{directory}: damaged: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(str(error)) from error
    if "settings" not in saved and (earlier := state.settings_in(directory)) is not None:
        saved["settings"] = earlier
    _check_same_run(directory / STATE_NAME, saved, state)
    _check_tensors(directory / TENSORS_NAME, tensors, saved, state)

    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(processes.sharded_like(tensors[f"parameter/{name}"], parameter))
    state.optimizer.load_state_dict(
        {
            "state": {
                index: {
                    key: processes.sharded_like(tensors[f"optimizer/{key}/{name}"], state.parameters[name])
                    for key in saved["optimizer_state"][name]
                }
                for index, name in enumerate(_optimizer_order(state))
                if name in saved["optimizer_state"]
            },
            "param_groups": state.optimizer.state_dict()["param_groups"],
        }
    )
    state.schedule.load_state_dict(saved["schedule"])
    for group, lr in zip(state.optimizer.param_groups, saved["schedule"]["_last_lr"], strict=True):
        group["lr"] = lr
    if state.scaler is not None:
        state.scaler.load_state_dict(saved["scaler"])
    _set_generators(tensors)
    state.step = saved["step"]
    state.skipped_steps = saved["skipped_steps"]
    state.skipped_in_a_row = saved["skipped_in_a_row"]
    state.prefix_cached = saved["prefix_cached"]
    state.window = [(loss, norm) for loss, norm in saved["window"]]


def _tensors(gathered: Gathered) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"parameter/{name}": p for name, p in gathered.parameters.items()}
    for name, values in gathered.optimizer.items():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in values.items()}
    tensors["generator/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"generator/cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    # Copies: safetensors refuses tensors that share memory.
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _digest(described: dict[str, Any]) -> str:
    """SHA-256 of the fields of ``state.json``, so that a single changed digit in it is detected."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _set_generators(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["generator/cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            # A checkpoint from a machine with fewer devices has no state for the others: they keep theirs.
            if f"generator/cuda:{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"generator/cuda:{index}"], index)


def _optimizer_order(state: TrainingState) -> list[str]:
    names = {id(p): name for name, p in state.parameters.items()}
    return [names[id(p)] for group in state.optimizer.param_groups for p in group["params"]]


def _described(state: TrainingState, gathered: Gathered) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "skipped_steps": state.skipped_steps,
        "skipped_in_a_row": state.skipped_in_a_row,
        "prefix_cached": state.prefix_cached,
        "window": state.window,
        "config": state.config.to_dict(),
        "data_fingerprint": state.data_fingerprint,
        **state.origin,
        "schedule": {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"} | {"lr_lambdas": []},
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "optimizer_state": {name: sorted(values) for name, values in gathered.optimizer.items()},
        "parameters": {name: list(p.shape) for name, p in gathered.parameters.items()},
    }


_FIELDS: dict[str, Any] = {
    "step": int,
    "skipped_steps": int,
    "skipped_in_a_row": int,
    "prefix_cached": bool,
    "window": list,
    "config": dict,
    "data_fingerprint": str,
    "schedule": dict,
    "scaler": dict | None,
    "optimizer_state": dict,
    "parameters": dict,
    "files": dict,
}
# Checkpoints of 0.1.0 lack some of these; they are accepted without that check.
_ORIGIN: dict[str, type] = {"task": str, "settings": dict, "adapters": list, "backbone": dict}


def _check_same_run(path: Path, saved: dict[str, Any], state: TrainingState) -> None:
    origin = state.origin
    if "task" in saved and saved["task"] != origin.get("task", saved["task"]):
        raise CheckpointError(f"{path}: the run was begun with another task: {saved['task']}, not {origin['task']}")
    settings = origin.get("settings", {})
    _check_same_values(path, saved.get("settings", settings), settings)
    _check_same_values(path, saved["config"], state.config.to_dict(), FREE_ON_RESUME)
    if saved["data_fingerprint"] != state.data_fingerprint:
        raise CheckpointError(f"{path}: the run was begun with other training data or another tokenizer")
    # Equally many, in runs of one task with the same settings.
    both = zip(saved.get("adapters", []), origin.get("adapters", []), strict=False)
    for number, (before, adapter) in enumerate(both):
        for name in sorted(before.keys() - {"init"}):  # all values come from the checkpoint, whatever the init
            if before[name] != adapter.get(name):
                which = f" in trained adapter {number}" if len(saved["adapters"]) > 1 else ""
                raise CheckpointError(
                    f"{path}: the run was begun with {name}={before[name]!r}{which}, not {adapter.get(name)!r}: "
                    "resume with the same value, or begin another run"
                )
    shapes = {name: list(p.shape) for name, p in state.parameters.items()}
    if saved["parameters"] != shapes:
        differing = sorted(n for n in shapes | saved["parameters"] if shapes.get(n) != saved["parameters"].get(n))
        name = differing[0]
        raise CheckpointError(
            f"{path}: another model: parameter {name} had shape {saved['parameters'].get(name)}, "
            f"and has {shapes.get(name)}"
        )
    backbone = origin.get("backbone", {})
    for name in sorted(backbone.keys() & saved.get("backbone", {}).keys()):
        value, now_is = saved["backbone"][name], backbone[name]
        if name == "weights" and None not in (value, now_is) and value != now_is:
            raise CheckpointError(f"{path}: the run was begun with other backbone weights")
        if name != "weights" and value != now_is:
            raise CheckpointError(f"{path}: the run was begun with a backbone of {name}={value!r}, not {now_is!r}")


def _check_same_values(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> None:
    for name in sorted((before.keys() | now.keys()) - set(free)):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"{path}: the run was begun with {name}={before.get(name)!r}, not {now.get(name)!r}: "
                "resume with the same value, or begin another run"
            )


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], saved: dict[str, Any], state: TrainingState) -> None:
    for name, parameter in state.parameters.items():
        found = tensors.get(f"parameter/{name}")
        if found is None or found.shape != parameter.shape:
            raise CheckpointError(f"{path}: parameter {name} is missing or of another shape")
    for name, keys in saved["optimizer_state"].items():
        if name not in state.parameters or any(f"optimizer/{key}/{name}" not in tensors for key in keys):
            raise CheckpointError(
                f"{path}: the optimizer's state of {name} is incomplete, or {name} is not a trained parameter"
            )
    if "generator/cpu" not in tensors:
        raise CheckpointError(f"{path}: generator/cpu is missing")


def saved_names(directory: Path) -> set[str]:
    """The files that the task saved in a checkpoint, relative to it; none if ``state.json`` is damaged."""
    try:
        files = read_json(directory / STATE_NAME).get("files")
    except (FileNotFoundError, ValueError):
        return set()
    names = files if isinstance(files, dict) else ()
    inside = {name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts}
    return inside - {TENSORS_NAME, STATE_NAME, ""}


def _remove(directory: Path) -> None:
    hidden = directory.with_name(f".old-{directory.name}.{os.getpid()}")
    directory.rename(hidden)
    shutil.rmtree(hidden)
