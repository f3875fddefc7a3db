"""Checkpoints: folders that are whole or absent, hold no pickle, and resume a run to the same numbers.

    checkpoints/step-00000120/
        adapterkern.safetensors, adapterkern.json     the adapter, as LlamaAdapter.from_pretrained reads it
        head.safetensors, head_config.json            the head, if there is one; other tasks save other
                                                      files, in subfolders too
        task.json                                     the TrainConfig
        training.safetensors                          fp32 parameters, moments, generator states (uint8)
        state.json                                    step, schedule, scaler, what a resumed run must match, and the
                                                      SHA-256 of every other file and of its own fields

A checkpoint is written into a hidden folder beside its final place, and renamed once every byte has reached the disk.
Older ones are removed only after that, and renamed first, so neither a half-written nor a half-removed folder looks
like a checkpoint. The order of rows is a function of (seed, epoch), so the step determines the position in the data.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkern.files import flush, read_json, read_tensors, read_versioned, replacing, sha256, write_json
from adapterkern.model.config import AdapterConfig
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.run.best import Best
from adapterkern.training.run.lengths import check_length, extend
from adapterkern.training.run.matching import (
    FIELDS,
    SCHEDULE,
    check_adapter,
    check_fields,
    check_restorable,
    check_same_run,
    check_settings,
    check_tensors,
)
from adapterkern.training.run.results import CheckpointError
from adapterkern.training.saved import CHECKPOINTS
from adapterkern.training.saved import checkpoints as checkpoints

FORMAT_VERSION = 2
STATE_NAME = "state.json"
TENSORS_NAME = "training.safetensors"


@dataclasses.dataclass
class TrainingState:
    """Everything that a run's next step depends on, except the data and the backbone."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    scaler: Any  # a torch GradScaler or None
    config: TrainConfig
    data_fingerprint: str
    # "task", "settings", "head", "adapters", "backbone", "eval_fingerprint", "drift_fingerprint": must match in a
    # resumed run, if the checkpoint has them too.
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    # the settings in a checkpoint of 0.1.0, whose state.json has none; None where they are not known
    settings_in: Callable[[Path], dict[str, Any] | None] = lambda _: None
    steps_per_epoch: int = 1
    best: Best | None = None  # if the run keeps the best evaluation
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


def remove_leftovers(output_dir: Path) -> None:
    """Remove folders that a killed process left half-written or half-removed among the checkpoints."""
    for path in (output_dir / CHECKPOINTS).glob(".*step-*"):
        shutil.rmtree(path)


def save_checkpoint(output_dir: Path, state: TrainingState, gathered: Gathered, save_model: Any) -> Path:
    """Write a checkpoint, then remove all but the newest ``config.keep_checkpoints`` and that of the best evaluation.

    Every rank must call it; rank 0 writes.

    Args:
        save_model: called with a folder; writes the files that make the checkpoint usable without the run.

    Returns:
        the checkpoint's folder.
    """
    return processes.on_rank_zero(lambda: _write(output_dir, state, gathered, save_model))


def _write(output_dir: Path, state: TrainingState, gathered: Gathered, save_model: Any) -> Path:
    target = _folder(output_dir, state.step)
    if target.exists():  # the run resumed from it and has made no step since
        if (saved := read_state(target)).get("best") != (now := _described_best(state)["best"]):  # but an evaluation
            described = saved | {"best": now}
            write_json(target / STATE_NAME, described | {"sha256": _digest(described)})
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
    best = None if state.best is None else _folder(output_dir, state.best.step)
    for old in checkpoints(output_dir)[: -state.config.keep_checkpoints]:
        if old != best:
            _remove(old)
    return target


def _folder(output_dir: Path, step: int) -> Path:
    return output_dir / CHECKPOINTS / f"step-{step:08d}"


def read_state(directory: Path) -> dict[str, Any]:
    """The fields of a checkpoint's ``state.json``. Raises ``CheckpointError`` if it is missing or damaged."""
    path = directory / STATE_NAME
    with _as_checkpoint_error(directory):
        saved = read_versioned(path, FORMAT_VERSION, FIELDS)
        check_fields(path, saved)
        digest = saved.pop("sha256", None)
        if digest != _digest(saved):
            raise CheckpointError(f"{path}: damaged: field 'sha256' does not match the other fields")
    return saved


@contextlib.contextmanager
def _as_checkpoint_error(directory: Path) -> Iterator[None]:
    """Raise what the readers of files raise as ``CheckpointError``."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: damaged: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(str(error)) from error


def check_begun_with(directory: Path, config: TrainConfig, adapter: AdapterConfig | None = None) -> None:
    """Raise ``CheckpointError`` if the run of a checkpoint was begun otherwise: what is known without its backbone.

    Args:
        adapter: of a run that trains one, not resolved yet.
    """
    path, saved = directory / STATE_NAME, read_state(directory)
    check_settings(path, saved["config"], config)
    check_length(path, saved["step"], config, saved.get("steps_per_epoch"))
    if adapter is not None and adapter.max_params is None and len(saved.get("adapters", ())) == 1:
        check_adapter(path, saved["adapters"][0], saved.get("backbone", {}), adapter)


def load_checkpoint(directory: Path, state: TrainingState) -> None:
    """Load a checkpoint into ``state``: parameters, optimizer, schedule, scaler, generators, step.

    Nothing is changed before everything has been checked. The schedule is that of ``state.config``, which may have
    more or fewer steps than before.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another configuration, data or model.
    """
    path, weights = directory / STATE_NAME, directory / TENSORS_NAME
    saved = read_state(directory)
    tensors = _read_tensors(directory, saved)
    with _as_checkpoint_error(directory):
        if "settings" not in saved and (earlier := state.settings_in(directory)) is not None:
            saved["settings"] = earlier
        best = None if saved.get("best") is None else Best.from_dict(saved["best"])
    check_same_run(path, saved, state)
    check_tensors(weights, tensors, saved, state)
    check_restorable(path, saved, state)
    if best is not None and best.step:
        best.parameters = _best_parameters(directory, tensors, best.step, state)

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
    schedule = state.schedule.state_dict()
    state.schedule.load_state_dict(schedule | {name: saved["schedule"][name] for name in SCHEDULE})
    for group, lr in zip(state.optimizer.param_groups, saved["schedule"]["_last_lr"], strict=True):
        group["lr"] = lr
    if state.scaler is not None:
        state.scaler.load_state_dict(saved["scaler"])
    _set_generators(tensors)
    if (measured := saved.get("drift_fingerprint")) is not None:  # also of a run that goes on without
        state.origin["drift_fingerprint"] = measured
    state.step = saved["step"]
    state.skipped_steps = saved["skipped_steps"]
    state.skipped_in_a_row = saved["skipped_in_a_row"]
    state.prefix_cached = saved["prefix_cached"]
    state.window = [(loss, norm) for loss, norm in saved["window"]]
    state.best = best or state.best
    extend(state, saved["config"])


def _read_tensors(directory: Path, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of whose files none is missing or damaged. Raises ``CheckpointError``."""
    weights = directory / TENSORS_NAME
    with _as_checkpoint_error(directory):
        present = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}
        for name, digest in saved["files"].items():
            if name not in present:  # as is a name outside of the folder
                raise CheckpointError(f"{directory}: damaged: {name!r:.200} is missing")
            if sha256(directory / name) != digest:
                raise CheckpointError(f"{directory / name}: damaged: its SHA-256 differs from the one in {STATE_NAME}")
        if TENSORS_NAME not in saved["files"]:
            raise CheckpointError(f"{directory / STATE_NAME}: field 'files': {TENSORS_NAME} is missing")
        return read_tensors(weights, weights=False)


def _best_parameters(
    directory: Path, tensors: Mapping[str, Tensor], step: int, state: TrainingState
) -> dict[str, Tensor]:
    """What was trained at the best evaluation, from its own checkpoint, which may be ``directory``."""
    if (folder := directory.with_name(f"step-{step:08d}")) != directory:
        if not folder.exists():
            raise CheckpointError(f"{folder}: missing: the checkpoint of the run's best evaluation")
        saved = read_state(folder)
        tensors = _read_tensors(folder, saved)
        check_tensors(folder / TENSORS_NAME, tensors, saved, state)
    return {name: tensors[f"parameter/{name}"] for name in state.parameters}


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
        "steps_per_epoch": state.steps_per_epoch,
        "skipped_steps": state.skipped_steps,
        "skipped_in_a_row": state.skipped_in_a_row,
        "prefix_cached": state.prefix_cached,
        "window": state.window,
        "config": state.config.to_dict(),
        "data_fingerprint": state.data_fingerprint,
        **state.origin,
        **_described_best(state),
        "schedule": {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"} | {"lr_lambdas": []},
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "optimizer_state": {name: sorted(values) for name, values in gathered.optimizer.items()},
        "parameters": {name: list(p.shape) for name, p in gathered.parameters.items()},
    }


def _described_best(state: TrainingState) -> dict[str, Any]:
    return {"best": None if state.best is None else state.best.to_dict()}


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
