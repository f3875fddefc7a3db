"""Whether a checkpoint is whole and belongs to the run that resumes: asked before anything of the run is changed."""

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterkern import checks
from adapterkern.files import check_values
from adapterkern.model.config import ADDED, FREE_IN_ADAPTERS, MODULES, SIZES, AdapterConfig
from adapterkern.model.inside import needs_inside
from adapterkern.training.config import FREE_ON_RESUME, LENGTHS, TrainConfig
from adapterkern.training.run.lengths import check_length
from adapterkern.training.run.results import CheckpointError

if TYPE_CHECKING:
    from adapterkern.training.run.checkpoint import TrainingState


FIELDS: dict[str, Any] = {
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
# Checkpoints of earlier versions lack some of these; they are accepted without that check.
_ORIGIN: dict[str, type] = {
    **{"task": str, "settings": dict, "adapters": list, "backbone": dict},
    **{"eval_fingerprint": str, "drift_fingerprint": str, "head": dict},
}

SCHEDULE = ("base_lrs", "_last_lr", "last_epoch", "_step_count")  # what a schedule's state is made of


def check_fields(path: Path, saved: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` for a field of ``state.json`` with values of another kind inside."""

    def pair(value: Any) -> bool:
        kinds = isinstance(value, list) and len(value) == 2 and all(_is_number(v) for v in value if v is not None)
        return kinds and value[0] is not None

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    for name, kind in _ORIGIN.items():
        if name in saved and type(saved[name]) is not kind:
            raise _other(path, name, kind.__name__, saved[name])
    for name in ("step", "skipped_steps", "skipped_in_a_row"):
        if not _is_count(saved[name]):
            raise _other(path, name, "an integer >= 0", saved[name])
    for name, expected, values, fits in (
        ("window", "pairs of loss and norm", saved["window"], pair),
        ("optimizer_state", "lists of names", saved["optimizer_state"].values(), names),
        ("adapters", "objects", saved.get("adapters", []), lambda value: isinstance(value, dict)),
    ):
        if odd := [value for value in values if not fits(value)]:
            raise _other(path, name, expected, odd[0])


def _other(path: Path, field: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(f"{path}: field {field!r}: expected {expected}, got {got!r:.80}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_same_run(path: Path, saved: dict[str, Any], state: "TrainingState") -> None:
    """Raise ``CheckpointError`` unless the checkpoint is of a run with the same settings, data and model."""
    origin = state.origin
    if "task" in saved and saved["task"] != origin.get("task", saved["task"]):
        raise CheckpointError(
            f"{path}: the run was begun with another task: {saved['task']:.80}, not {origin['task']}: resume with the "
            "same, or begin another run"
        )
    settings = origin.get("settings", {})
    if not isinstance(saved.get("settings", {}), dict):  # from a file of the task's
        raise CheckpointError(f"{path.parent}: the task's settings: expected an object, got {saved['settings']!r:.80}")
    _check_same_values(path, saved.get("settings", settings), settings)
    check_settings(path, saved["config"], state.config)
    if saved["data_fingerprint"] != state.data_fingerprint:
        raise CheckpointError(
            f"{path}: the run was begun with other training data or another tokenizer: resume with the same, or begin "
            "another run"
        )
    check_length(path, saved["step"], state.config, state.steps_per_epoch)
    head = origin.get("head", {})
    _check_same_values(path, saved.get("head", head), head, which=" in its head")
    evaluated = origin.get("eval_fingerprint")
    if (before := saved.get("eval_fingerprint", evaluated)) != evaluated:
        data = "other evaluation data" if before and evaluated else f"{'' if before else 'no '}evaluation data"
        data += "" if before and evaluated else f", and has {'none' if before else 'some'} now"
        raise CheckpointError(
            f"{path}: the run was begun with {data}: resume with the same, and score the finished run on others"
        )
    both_measured = saved.get("drift_fingerprint"), origin.get("drift_fingerprint")
    if None not in both_measured and both_measured[0] != both_measured[1]:
        raise CheckpointError(
            f"{path}: drift was measured on other texts so far: resume with the same, or with drift_data none"
        )
    before_is, backbone = saved.get("backbone", {}), origin.get("backbone", {})
    for name in sorted(backbone.keys() & before_is.keys() - {"weights"}):  # first, since adapters follow its layers
        if before_is[name] != backbone[name]:
            raise CheckpointError(
                f"{path}: the run was begun with a backbone of {name}={before_is[name]!r:.80}, not "
                f"{backbone[name]!r:.80}: resume with the same"
            )
    # Equally many, in runs of one task with the same settings.
    both = zip(saved.get("adapters", []), origin.get("adapters", []), strict=False)
    for number, (before, adapter) in enumerate(both):
        which = f" in trained adapter {number}" if len(saved["adapters"]) > 1 else ""
        _check_same_values(path, adapter | ADDED | before, adapter, FREE_IN_ADAPTERS, which)
    shapes = {name: list(p.shape) for name, p in state.parameters.items()}
    if saved["parameters"] != shapes:
        differing = sorted(n for n in shapes | saved["parameters"] if shapes.get(n) != saved["parameters"].get(n))
        name = differing[0]
        raise CheckpointError(
            f"{path}: another model: parameter {name:.200} had shape {saved['parameters'].get(name)!s:.80}, "
            f"and has {shapes.get(name)}"
        )
    weights = before_is.get("weights"), backbone.get("weights")
    if None not in weights and weights[0] != weights[1]:
        raise CheckpointError(
            f"{path}: the run was begun with other backbone weights (another model, or dtype of its weights): resume "
            "with the same"
        )


def check_settings(path: Path, before: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise ``CheckpointError`` for a setting with another value than the run was begun with."""
    # Earlier versions had fewer settings, which were as their defaults are.
    then = TrainConfig().to_dict() | dict(before)
    not_given = {name for name in ("lr", "head_lr") if getattr(config, name) is None}
    _check_same_values(path, then, config.to_dict(), FREE_ON_RESUME | LENGTHS | not_given)


def check_adapter(path: Path, before: Mapping[str, Any], backbone: Mapping[str, Any], adapter: AdapterConfig) -> None:
    """Raise ``CheckpointError`` for a field of an adapter with another value, as it would be on the run's backbone.

    Not compared: ``modules_to_save``, whose paths only the backbone knows.
    """
    size, layers = backbone.get("hidden_size"), backbone.get("num_hidden_layers")
    if isinstance(size, int) and isinstance(layers, int):
        free: tuple[str, ...] = (*FREE_IN_ADAPTERS, MODULES)
        if adapter.max_params is not None and needs_inside(adapter):  # the size that a budget decides is known later
            adapter = dataclasses.replace(adapter, max_params=None)
            free = (*free, SIZES[adapter.kind][0])
        now = adapter.resolve(size, layers).to_dict()
        _check_same_values(path, now | ADDED | dict(before), now, free)


def _check_same_values(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = (), which: str = ""
) -> None:
    if problem := checks.other_value(before, now, free, which):
        raise CheckpointError(f"{path}: {problem}")


def check_tensors(path: Path, tensors: Mapping[str, Tensor], saved: dict[str, Any], state: "TrainingState") -> None:
    """Raise ``CheckpointError`` unless there is a tensor for every parameter and moment, of its shape and kind."""

    def check(key: str, shape: Sequence[int], finite: bool = True) -> None:
        found = tensors.get(key)
        if found is None or tuple(found.shape) != tuple(shape):
            got = "none" if found is None else f"one of {tuple(found.shape)}"
            raise CheckpointError(
                f"{path}: {key:.200}: missing or of another shape: expected {tuple(shape)}, got {got}"
            )
        try:
            check_values(f"{path}: {key}", found, finite=finite)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    for name, parameter in state.parameters.items():
        check(f"parameter/{name}", parameter.shape)
    for name, keys in saved["optimizer_state"].items():
        if name not in state.parameters:
            raise CheckpointError(f"{path}: the optimizer's state of {name:.200}: expected that of a trained parameter")
        if missing := sorted({"step", "exp_avg", "exp_avg_sq"} - set(keys)):
            raise CheckpointError(f"{path}: the optimizer's state of {name}: expected {missing[0]}, got {keys!r:.80}")
        for key in keys:
            shape = () if key == "step" else state.parameters[name].shape
            check(f"optimizer/{key}/{name}", shape, finite=key != "exp_avg_sq")  # a square may have overflowed
    try:
        torch.Generator().set_state(tensors["generator/cpu"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: generator/cpu: expected a state of torch's generator: {error}") from error


def check_restorable(path: Path, saved: dict[str, Any], state: "TrainingState") -> None:
    """Raise ``CheckpointError`` unless schedule and scaler can take what was saved of them."""
    schedule, groups = saved["schedule"], len(state.optimizer.param_groups)
    for name in SCHEDULE:
        value, many = schedule.get(name), name.endswith("lrs") or name == "_last_lr"
        if many and not (isinstance(value, list) and len(value) == groups and all(map(_is_scale, value))):
            raise CheckpointError(f"{path}: schedule: {name}: expected {groups} numbers >= 0, got {value!r:.80}")
        if not many and not (_is_count(value) and isinstance(value, int)):
            raise CheckpointError(f"{path}: schedule: {name}: expected an integer >= 0, got {value!r:.80}")
    if state.scaler is None:
        return
    scaler = saved["scaler"]
    for name in state.scaler.state_dict():
        got = None if scaler is None else scaler.get(name)
        if not _is_scale(got):
            raise CheckpointError(f"{path}: scaler: {name}: expected a number >= 0, got {got!r:.80}")


def _is_count(value: object) -> bool:
    """Whether it is a number from 0 to what a float holds exactly."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 2**53


def _is_scale(value: Any) -> bool:
    """Whether it is a number >= 0, which may be large: a scale doubles for as long as no gradient is too large."""
    return _is_number(value) and value >= 0
