"""Read and write adapters in the file format of AdapterHub's library ``adapters`` (1.3.0).

Its bottlenecks are the operator of this package: on LLaMA they add scaling · up(act(down(norm(x)))) to the residual
stream, after the feed-forward network (``output_adapter``) or between attention and the feed-forward network
(``mh_adapter``). There x is the stream itself, or, in its parallel ones (``par_bn``), the stream before that module.
The norm is left out without ``ln_before``. Its folder has

    adapter_config.json      name, hidden_size, model and ``config``, the 33 fields of a BnConfig
    pytorch_adapter.bin      or adapter.safetensors; keys model.layers.{i}.{site}.adapters.{name}.{module}, where
                             adapter_norm_before and adapter_down.0 are two names of one LayerNorm; without one,
                             adapter_down.0 is the projection. ``scaling``, of shape (1,), if it is learned

and possibly a prediction head, which is neither read nor written here. A ``.bin`` file is a pickle; it is read by
torch's weights-only reader, which builds tensors and calls no other code.

The two files are not a pair of ``write_pair``: the format has no field for a hash.
"""

import io
import logging
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapterkern import checks
from adapterkern.files import check_values, read_json, read_tensors, replacing, write_json
from adapterkern.model.config import AdapterConfig
from adapterkern.model.decoder import text_decoder
from adapterkern.model.files.card import base_name
from adapterkern.model.files.owner import OTHERS_CONFIG, check_folder

CONFIG_NAME = OTHERS_CONFIG
logger = logging.getLogger(__name__)

BIN_NAME = "pytorch_adapter.bin"
SAFETENSORS_NAME = "adapter.safetensors"
VERSION = "adapters.1.3.0"  # the version of the library that has this format

_SITES = {"layer": "output_adapters", "attention": "attention_adapters"}  # by our place
_NORM, _ALIAS = "adapter_norm_before", "adapter_down.0"
_SCALE = "scaling"
_LEARNED = "learned"
_KEY = re.compile(r"(?:model\.)?layers\.(\d+)\.(output_adapters|attention_adapters)\.adapters\.([^.]+)\.(.+)")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "tanh": "tanh", "linear": "identity"}
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files without a version

# A BnConfig that is our operator has these values. The fields in _WITHOUT_EFFECT then only affect initialization.
_FIXED: dict[str, Any] = {
    "ln_after": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "dropout": 0.0,
    "phm_layer": False,
    "stochastic_depth": 0.0,
}
_WITHOUT_EFFECT: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter_reduction_factor": None,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
}
_READ = (
    "ln_before",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "mh_adapter",
    "output_adapter",
    "non_linearity",
    "reduction_factor",
)
_OPTIONAL = ("leave_out", "is_parallel", "scaling")


def read_adapterhub(
    directory: str | os.PathLike[str], hidden_size: int, num_layers: int
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """An adapter that ``adapters`` saved: its configuration, and its fp32 tensors by our names (``{i}.0.norm.weight``).

    ``adapter.safetensors`` is read if it exists, otherwise ``pytorch_adapter.bin``.

    Args:
        directory: the folder.
        hidden_size, num_layers: the backbone's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the adapter is not our operator or not for such a backbone; the message names
            file and field.
    """
    directory = Path(directory)
    path = directory / CONFIG_NAME
    saved = read_json(path)
    try:
        name, config = _read_config(saved, hidden_size, num_layers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    weights = directory / SAFETENSORS_NAME
    if not weights.exists():
        weights = directory / BIN_NAME
    return config, _read_weights(weights, name, config, hidden_size)


def _read_config(saved: dict[str, Any], hidden_size: int, num_layers: int) -> tuple[str, AdapterConfig]:
    name, fields = _check_name(saved.get("name")), saved.get("config")
    if saved.get("hidden_size") != hidden_size:
        raise ValueError(f"hidden_size: expected the backbone's {hidden_size}, got {saved.get('hidden_size')!r:.80}")
    if not isinstance(fields, dict):
        raise ValueError(f"config: expected an object of fields, got {fields!r:.80}")
    if fields.get("architecture") is not None:
        raise ValueError(f"architecture: expected a bottleneck adapter's None, got {fields['architecture']!r:.80}")
    if unknown := sorted(fields.keys() - {"architecture", *_FIXED, *_WITHOUT_EFFECT, *_READ, *_OPTIONAL}):
        raise ValueError(f"{unknown[0]:.80}: expected no such field, got {fields[unknown[0]]!r:.80}")
    # Its own reader allows a field to be missing if the class has a default; these have none.
    for field in _READ:
        if field not in fields:
            raise ValueError(f"{field}: expected a value, got none")
    for field, expected in _FIXED.items():
        got = fields.get(field, expected)
        if got != expected or isinstance(got, bool) != isinstance(expected, bool):
            raise ValueError(f"{field}: expected {expected!r}, which is this operator, got {got!r:.80}")
    parallel = checks.flag("is_parallel", fields.get("is_parallel", False))
    _check_residual(fields, parallel)
    scale = _scale(fields.get("scaling", 1.0))
    config = AdapterConfig(
        adapter_dim=_adapter_dim(fields["reduction_factor"], hidden_size, layers := _layers(fields, num_layers)),
        position=_position(fields, parallel),
        layers=layers,
        activation=_activation(fields["non_linearity"], "version" in saved),
        layer_norm=checks.flag("ln_before", fields["ln_before"]),
        scale=1.0 if scale == _LEARNED else scale,
        learned_scale=scale == _LEARNED,
    )
    return name, config


def _check_residual(fields: dict[str, Any], parallel: bool) -> None:
    """Raise ``ValueError`` unless the layer's own input and its module's output are both added, once."""
    if parallel:  # the other two fields are read by sequential adapters alone
        if fields["original_ln_after"] is not True:
            raise ValueError(
                f"original_ln_after: expected True of a parallel adapter, got {fields['original_ln_after']!r:.80}"
            )
        return
    if fields["original_ln_before"] is not True:
        raise ValueError(f"original_ln_before: expected True, got {fields['original_ln_before']!r:.80}")
    # x must be added exactly once: around the adapter, or by the layer and not around the adapter.
    around = checks.flag("original_ln_after", fields["original_ln_after"])
    if fields["residual_before_ln"] is not around:
        raise ValueError(
            f"residual_before_ln: expected {around} as original_ln_after, got {fields['residual_before_ln']!r:.80}"
        )


def _scale(value: Any) -> Any:
    """A number, or ``"learned"``."""
    if value == _LEARNED:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"scaling: expected a number or 'learned', got {value!r:.80}")
    return float(value)


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name: expected a string without dots, got {name!r:.80}")
    return name


def _layers(fields: dict[str, Any], num_layers: int) -> list[int]:
    left_out = fields.get("leave_out") or []
    if not isinstance(left_out, list) or not all(type(layer) is int for layer in left_out):
        raise ValueError(f"leave_out: expected a list of layer numbers, got {left_out!r:.80}")
    layers = [layer for layer in range(num_layers) if layer not in left_out]
    if not layers:
        raise ValueError(f"leave_out: expected to keep one of {num_layers} layers, got {left_out!r:.80}")
    return layers


def _position(fields: dict[str, Any], parallel: bool) -> Any:
    attention, layer = (checks.flag(field, fields[field]) for field in ("mh_adapter", "output_adapter"))
    if attention == layer:
        raise ValueError(f"mh_adapter: expected one of mh_adapter and output_adapter, got both {attention}")
    if parallel:
        return "parallel-attention" if attention else "parallel-mlp"
    return "attention" if attention else "layer"


def _activation(value: Any, has_version: bool) -> str:
    name = value.lower() if isinstance(value, str) else ""
    if not has_version:
        name = _RENAMED.get(name, name)
    if name not in _ACTIVATIONS:
        raise ValueError(f"non_linearity: expected one of {', '.join(_ACTIVATIONS)}, got {name or value!r:.80}")
    return _ACTIVATIONS[name]


def _adapter_dim(factor: Any, hidden_size: int, layers: list[int]) -> int:
    factors = dict.fromkeys(layers, factor)
    if isinstance(factor, dict):
        factors = {layer: factor.get(str(layer), factor.get("default")) for layer in layers}
    for value in factors.values():
        # A factor below 1 enlarges the dimension, up to 2**20 times here: a tiny one would need any amount of memory.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 2**-20 <= value < math.inf:
            raise ValueError(f"reduction_factor: expected a number > 0 for each layer, got {factor!r:.80}")
    dims = {max(1, int(hidden_size // value)) for value in factors.values()}
    if len(dims) > 1:
        raise ValueError(f"reduction_factor: expected one dimension for all layers, got {sorted(dims)} from {factor!r}")
    return dims.pop()


def _read_weights(path: Path, name: str, config: AdapterConfig, hidden_size: int) -> dict[str, Tensor]:
    saved = read_tensors(path) if path.suffix == ".safetensors" else _read_bin(path)
    if not isinstance(saved, Mapping) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise ValueError(f"{path}: expected a mapping from names to tensors, got {type(saved).__name__}")
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        match = _KEY.fullmatch(str(key))
        if match is None or match[2] != _SITES[config.place] or match[3] != name:
            raise ValueError(f"{path}: {key!s:.200}: expected only keys of {_SITES[config.place]}.adapters.{name:.80}")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
            got = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{path}: {key}: expected plain numbers, got {got}")
        sites.setdefault(match[1], {})[match[4]] = tensor
    layers = [str(layer) for layer in config.layers or ()]
    if odd := sorted(sites.keys() ^ set(layers)):
        raise ValueError(f"{path}: layer {odd[0]}: expected adapters of layers {layers}, got {sorted(sites)}")
    found = {}
    for layer in layers:
        tensors = sites[layer]
        for ours, theirs in _names(config).items():
            where = f"{path}: layer {layer}: {theirs}"
            shape = _shape(ours, hidden_size, config.adapter_dim)
            other = theirs.replace(_NORM, _ALIAS)
            alias = tensors.pop(other, None) if other != theirs else None
            tensor = tensors.pop(theirs, alias)
            if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
                got = "none" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
                raise ValueError(f"{where}: expected {shape} of floating point, got {got}")
            check_values(where, tensor)
            if alias is not None and (alias.dtype != tensor.dtype or not torch.equal(alias, tensor)):
                raise ValueError(f"{where}: expected the same as {other}, got other values")
            found[f"{layer}.0.{ours}"] = tensor.detach().to(torch.float32).contiguous()
        if tensors:
            raise ValueError(f"{path}: layer {layer}: {min(tensors)}: expected no such tensor")
    return found


def _read_bin(path: Path) -> Any:
    content = path.read_bytes()
    try:
        if zipfile.is_zipfile(file := io.BytesIO(content)):
            # torch compresses nothing: what claims to be larger than the file could fill the memory
            with zipfile.ZipFile(file) as archive:
                if (size := sum(member.file_size for member in archive.infolist())) > len(content):
                    raise ValueError(f"{size} bytes in a file of {len(content)}")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: the bytes decide what the reader meets
        raise ValueError(f"{path}: not a file of tensors: {str(error)[:200]}") from error


def _names(config: AdapterConfig) -> dict[str, str]:
    """Our names of an adapter's tensors, and theirs."""
    modules = {"down": _ALIAS, "up": "adapter_up"}
    if config.layer_norm:
        modules = {"norm": _NORM, "down": "adapter_down.1", "up": "adapter_up"}
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}
    return names | ({"scale": _SCALE} if config.learned_scale else {})


def _shape(name: str, hidden_size: int, adapter_dim: int) -> tuple[int, ...]:
    module, _, kind = name.partition(".")
    if module == "scale":
        return (1,)
    if kind == "weight" and module != "norm":
        return (adapter_dim, hidden_size) if module == "down" else (hidden_size, adapter_dim)
    return (adapter_dim,) if module == "down" else (hidden_size,)


def write_adapterhub(
    directory: str | os.PathLike[str],
    name: str,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    llama: Any,
    *,
    safetensors: bool = False,
) -> None:
    """Write an adapter so that ``adapters`` loads it as ``name``, each file atomically.

    Args:
        directory: created if it does not exist.
        name: non-empty, without dots.
        config: resolved, with explicit layers.
        tensors: by our names, as ``read_adapterhub`` returns them.
        llama: the backbone; the file describes it.
        safetensors: write ``adapter.safetensors`` instead of ``pytorch_adapter.bin``, which ``adapters`` reads by
            default. An existing file of the other kind is removed.

    Raises:
        OSError: a file cannot be written.
        ValueError: a field of ``config`` has a value that ``adapters`` does not support, ``name`` is not valid, or the
            folder holds a model or another library's adapter.
    """
    directory = Path(directory)
    check_folder(directory, owner="AdapterHub")
    _check_name(name)
    fixed = ("kind", "bottleneck"), ("depth", 1), ("text_only", False), ("bias_scale", False)
    for field, expected in (*fixed, *[("eps", 1e-5)] * config.layer_norm):
        if getattr(config, field) != expected:
            raise ValueError(f"{field}: expected {expected} for AdapterHub's adapters, got {getattr(config, field)}")
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save: expected none for AdapterHub's adapters, got {', '.join(config.modules_to_save)}"
        )
    if config.dropout:
        logger.warning(
            "dropout: the file has none, since AdapterHub's drops numbers of the branch, not of the bottleneck"
        )
    hidden_size, num_layers = text_decoder(llama).config.hidden_size, len(text_decoder(llama).layers)
    fields = {
        "ln_before": config.layer_norm,
        "original_ln_before": not config.is_parallel,
        "original_ln_after": True,
        "residual_before_ln": True,
        "is_parallel": config.is_parallel,
        "scaling": _LEARNED if config.learned_scale else config.scale,
        "mh_adapter": config.place == "attention",
        "output_adapter": config.place == "layer",
        "non_linearity": {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[config.activation],
        "reduction_factor": _reduction_factor(hidden_size, config.adapter_dim),
        "leave_out": [layer for layer in range(num_layers) if layer not in (config.layers or ())],
    }
    described = {
        "config": dict(sorted((_FIXED | _WITHOUT_EFFECT | fields).items())),
        "hidden_size": hidden_size,
        "model_class": type(llama).__name__,
        "model_name": base_name(llama),
        "model_type": llama.config.model_type,
        "name": name,
        "version": VERSION,
    }
    saved = {}
    for layer in config.layers or ():
        for ours, theirs in _names(config).items():
            for one in dict.fromkeys((theirs, theirs.replace(_NORM, _ALIAS))):
                key = f"model.layers.{layer}.{_SITES[config.place]}.adapters.{name}.{one}"
                # copies: safetensors refuses tensors that share memory
                saved[key] = tensors[f"{layer}.0.{ours}"].detach().to("cpu", copy=True).contiguous()
    kept, other = (SAFETENSORS_NAME, BIN_NAME) if safetensors else (BIN_NAME, SAFETENSORS_NAME)
    with replacing(directory / kept) as temporary:
        if safetensors:
            save_file(saved, temporary, metadata={"format": "pt"})
        else:
            content = io.BytesIO()  # torch.save to a full disk raises "unexpected pos", without the file's name
            torch.save(saved, content)
            temporary.write_bytes(content.getbuffer())
    write_json(directory / CONFIG_NAME, described)
    (directory / other).unlink(missing_ok=True)


def _reduction_factor(hidden_size: int, adapter_dim: int) -> float:
    """The factor from which ``adapters`` computes this dimension, as ``int(hidden_size // factor)``."""
    factor = hidden_size / adapter_dim
    # 10 // (10 / 3) is 2.0: if the quotient was rounded up, divide by half a dimension more.
    return factor if hidden_size // factor == adapter_dim else hidden_size / (adapter_dim + 0.5)
