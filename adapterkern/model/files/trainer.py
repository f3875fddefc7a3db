"""The file that transformers' Trainer resumes from: an adapter's tensors by their names within the model.

Trainer reads nothing else of our folder, and passes on what it has read to ``load_state_dict``. So the file has one
more tensor, the bytes of ``adapterkern.json``: by it the model knows the configuration that a run was begun with.
"""

import logging
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapterkern import checks
from adapterkern.files import replacing
from adapterkern.model.config import FREE_IN_ADAPTERS, MODULES, AdapterConfig
from adapterkern.model.extra import saved_shapes
from adapterkern.model.files.folder import BELOW, CONFIG_NAME, check_tensors, check_weights, read_described
from adapterkern.model.files.owner import OURS

if TYPE_CHECKING:
    from adapterkern.model.saving import Saved

TRAINER_WEIGHTS = "model.safetensors"
_DESCRIBED = "config"  # the tensor with the bytes of adapterkern.json, beside the adapter's layers
_KEY = re.compile(rf"{re.escape(OURS)}([^.]+)\.{_DESCRIBED}")
logger = logging.getLogger(__name__)


def write_trainer(directory: Path, folders: Mapping[str, Path], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the file for the adapters that ``write_adapter`` has just written to ``folders``, by their names."""
    named: dict[str, Tensor] = {}
    for name, folder in folders.items():
        described = bytearray((folder / CONFIG_NAME).read_bytes())
        named |= {f"{OURS}{name}.{key}": t for key, t in tensors[name].items()}
        named[f"{OURS}{name}.{_DESCRIBED}"] = torch.frombuffer(described, dtype=torch.uint8)
    with replacing(directory / TRAINER_WEIGHTS) as temporary:
        save_file(named, temporary, metadata={"format": "pt"})


def take_described(model: "Saved", state: MutableMapping[str, Any], prefix: str = "") -> None:
    """Remove the configuration from what the file held, if it is there, and compare it with the model's adapter.

    Args:
        state: tensors by their names, which begin with ``prefix``.

    Raises:
        ValueError: the model has no adapter of this name or another configuration, its backbone has another shape, or
            the configuration or a tensor is damaged. Other weights of the backbone, and another active adapter, are a
            warning in the log.
    """
    for key in [key for key in state if key.startswith(prefix) and _KEY.fullmatch(key, len(prefix))]:
        name = key.removeprefix(prefix).split(".")[1]
        _check(model, f"the checkpoint's {key}", name, state.pop(key), _of(state, f"{prefix}{OURS}{name}."))


def _of(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _bytes(where: str, described: Any) -> bytes:
    """What a tensor of bytes holds, also if all tensors have been cast, to a dtype that has the numbers up to 255."""
    if isinstance(described, Tensor) and described.dim() == 1 and not described.is_complex():
        values = described.detach().cpu()
        as_bytes = values.nan_to_num(-1).clamp(0, 255).to(torch.uint8)
        if bool((as_bytes.to(values.dtype) == values).all()):
            return as_bytes.numpy().tobytes()
    is_tensor = isinstance(described, Tensor)
    got = f"{tuple(described.shape)} of {described.dtype}" if is_tensor else f"{described!r:.80}"
    raise ValueError(f"{where}: expected the bytes of {CONFIG_NAME}, got {got}")


def _check(model: "Saved", where: str, name: str, described: Any, tensors: Mapping[str, Tensor]) -> None:
    model.check_attached()
    saved, _ = read_described(where, model.base, _bytes(where, described))
    if name not in model.adapters:
        there = ", ".join(map(repr, model.adapters)) or "none"
        raise ValueError(
            f"name: the run was begun with the adapter {name!r:.80}, which this model does not have, got {there}: name "
            "it so with add_adapter, or begin another run"
        )
    config = model.adapter_config(name)
    try:
        before = AdapterConfig.from_dict(saved["adapter"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    began, now = (c.to_dict() | {MODULES: list(c.modules_to_save or ())} for c in (before, config))
    if problem := checks.other_value(began, now, FREE_IN_ADAPTERS):
        raise ValueError(f"config: {problem}")
    extra = saved_shapes(model.base, config.modules_to_save or ())
    check_tensors("the checkpoint", tensors, config, model.base, extra)
    check_weights(where, saved["base"], model.base, model.backbone_digest(name), strict=None)
    began_on = [entry["name"] for entry in saved.get(BELOW, ()) if isinstance(entry, dict) and "name" in entry]
    if (active := model.active_adapters()) and name not in active:
        logger.warning(
            "the checkpoint is of the adapter %r, and %r is active: set_adapter(%r) before the run goes on, or it "
            "trains another one",
            *(name, model.active_adapter, name),
        )
    elif began_on and active != (stack := [*began_on, name]):
        logger.warning(
            "the checkpoint is of the stack %s, and %s is active: set_adapter(%r) before the run goes on, or it trains "
            "another one",
            *(" → ".join(stack), " → ".join(active) or "none", stack),
        )
