"""The folder of a saved adapter: ``adapter_model.safetensors``, ``adapter_config.json`` and ``README.md``.

Weights and configuration are a pair of ``write_pair``: after a full disk or a killed process the
folder has the old pair or the new one, and loading checks the weights against the hash in the configuration.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkern.files import check_owner, find_weights, read_versioned, write_pair
from adapterkern.model.config import AdapterConfig
from adapterkern.model.decoder import decoder_layers
from adapterkern.model.files.card import base_name, write_card

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1
_SHAPES = {
    "norm.weight": ("d",),
    "norm.bias": ("d",),
    "down.weight": ("r", "d"),
    "down.bias": ("r",),
    "up.weight": ("d", "r"),
    "up.bias": ("d",),
}


def write_adapter(directory: Path, llama: Any, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter of the backbone ``llama``, and its model card.

    Args:
        config: resolved, with explicit layers.
        tensors: contiguous, on the CPU; named ``{layer}.{number in the sequence}.{parameter}``.

    Raises:
        OSError: a file cannot be written; the message names it, and an earlier adapter in the folder stays.
        ValueError: the folder holds another library's adapter, or ``tensors`` are not those of ``config``.
    """
    check_owner(directory / CONFIG_NAME, "adapterkern", lambda saved: "format_version" in saved)
    _check_tensors(directory / WEIGHTS_NAME, tensors, config, llama.config.hidden_size)

    def save(path: Path) -> None:
        save_file(dict(tensors), path, metadata={"format": "pt"})

    fields = {"format_version": FORMAT_VERSION, "adapter": config.to_dict(), "base": _describe(llama)}
    write_pair(directory / WEIGHTS_NAME, directory / CONFIG_NAME, save, fields)
    write_card(directory, llama, config)


def read_adapter(llama: Any, directory: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """An adapter's resolved configuration and its tensors, checked against each other and against the backbone.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, has another format version, or was saved for a backbone of another shape; the
            message names the file, and the field or both shapes.
    """
    path, weights = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    saved = read_versioned(path, FORMAT_VERSION, {"adapter": dict, "base": dict, "weights_sha256": str})
    for name in ("hidden_size", "num_hidden_layers"):
        if name not in saved["base"]:
            raise ValueError(f"{path}: field {name!r} is missing")
    shape, expected = (
        [base[name] for name in ("hidden_size", "num_hidden_layers")] for base in (_describe(llama), saved["base"])
    )
    if shape != expected:
        raise ValueError(
            f"{path}: the adapter was saved for a backbone of hidden_size={expected[0]} and {expected[1]} layers, "
            f"got one of hidden_size={shape[0]} and {shape[1]} layers"
        )
    try:
        config = AdapterConfig.from_dict(saved["adapter"]).resolve(*shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        tensors = load_file(find_weights(weights, path, saved["weights_sha256"]))
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a safetensors file: {error}") from error
    _check_tensors(weights, tensors, config, shape[0])
    return config, tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], config: AdapterConfig, hidden_size: int) -> None:
    depth = min(config.depth, len(tensors) + 1)  # in a damaged file it may be any number
    adapters = [f"{layer}.{number}" for layer in config.layers or () for number in range(depth)]
    names = {f"{adapter}.{parameter}": parameter for adapter in adapters for parameter in _SHAPES}
    if odd := sorted(names.keys() ^ tensors.keys()):
        expected = "expected" if odd[0] in names else "not expected"
        raise ValueError(f"{path}: tensor {odd[0]}: {expected} by {CONFIG_NAME}")
    sizes = {"d": hidden_size, "r": config.adapter_dim}
    for name, parameter in names.items():
        shape = tuple(sizes[letter] for letter in _SHAPES[parameter])
        if tensors[name].shape != shape or not tensors[name].is_floating_point():
            got = f"{tuple(tensors[name].shape)} of {tensors[name].dtype}"
            raise ValueError(f"{path}: tensor {name}: expected {shape} of floating point by {CONFIG_NAME}, got {got}")


def _describe(llama: Any) -> dict[str, Any]:
    config = llama.config
    return {
        "model_type": config.model_type,
        "name_or_path": base_name(llama),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(decoder_layers(llama)),
    }
