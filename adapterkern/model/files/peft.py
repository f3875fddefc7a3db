"""Read and write gated prompts in the file format of PEFT's ``AdaptionPrompt`` (0.21).

On LLaMA and Mistral both compute the same. Gates of heads become one if they are equal. Its folder has

    adapter_config.json         peft_type ADAPTION_PROMPT, adapter_len (P), adapter_layers: how many, from the top
    adapter_model.safetensors   keys base_model.model.model.layers.{i}.self_attn.adaption_prompt (1, P, d) and
                                .adaption_gate (1,)

The two files are not a pair of ``write_pair``: the format has no field for a hash.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from adapterkern import checks
from adapterkern.files import check_values, read_json, read_tensors, replacing, write_json
from adapterkern.model.config import BIAS_SCALE, MAX_PROMPT_LENGTH, PROMPT, AdapterConfig
from adapterkern.model.files.card import hub_name
from adapterkern.model.files.owner import OTHERS_CONFIG, check_folder

CONFIG_NAME = OTHERS_CONFIG
WEIGHTS_NAME = "adapter_model.safetensors"
_TYPE = "ADAPTION_PROMPT"
_FAMILIES = ("llama", "mistral")  # for which PEFT computes what we do
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.adaption_(prompt|gate)")
_NAMES = {"prompt": "embeddings", "gate": "gate"}  # theirs → ours


def read_peft(
    directory: str | os.PathLike[str], hidden_size: int, num_layers: int
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Gated prompts that PEFT saved: their configuration, and fp32 tensors by our names (``{i}.embeddings``).

    Args:
        directory: the folder.
        hidden_size, num_layers: the backbone's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another kind of adapter, or not for such a backbone; the message names file
            and field.
    """
    path = Path(directory) / CONFIG_NAME
    saved = read_json(path, ours=False)
    try:
        if saved.get("peft_type") != _TYPE:
            raise ValueError(f"peft_type: expected {_TYPE}, got {saved.get('peft_type')!r:.80}")
        if saved.get("target_modules") not in (None, "self_attn"):
            raise ValueError(f"target_modules: expected self_attn, got {saved['target_modules']!r:.80}")
        length = checks.integer("adapter_len", saved.get("adapter_len"), 1, MAX_PROMPT_LENGTH)
        count = checks.integer("adapter_layers", saved.get("adapter_layers"), 1, num_layers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    config = AdapterConfig(kind="prompt", prompt_length=length, layers=tuple(range(num_layers - count, num_layers)))
    return config, _read_weights(Path(directory) / WEIGHTS_NAME, config, hidden_size)


def _read_weights(path: Path, config: AdapterConfig, hidden_size: int) -> dict[str, Tensor]:
    saved = read_tensors(path)
    shapes = {"prompt": (1, config.prompt_length, hidden_size), "gate": (1,)}
    found = {}
    for key, tensor in saved.items():
        match = _KEY.fullmatch(key)
        if match is None or int(match[1]) not in (config.layers or ()):
            raise ValueError(f"{path}: {key:.200}: expected prompts and gates of layers {config.layers} alone")
        if tensor.shape != shapes[match[2]] or not tensor.is_floating_point():
            got = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{path}: {key}: expected {shapes[match[2]]} of floating point, got {got}")
        check_values(f"{path}: {key}", tensor)
        tensor = tensor.float()
        found[f"{match[1]}.{_NAMES[match[2]]}"] = tensor[0].contiguous() if match[2] == "prompt" else tensor
    for layer in config.layers or ():
        for theirs, ours in _NAMES.items():
            if f"{layer}.{ours}" not in found:
                raise ValueError(f"{path}: layer {layer}: adaption_{theirs}: expected a tensor, got none")
    return found


def write_peft(
    directory: str | os.PathLike[str], config: AdapterConfig, tensors: Mapping[str, Tensor], llama: Any
) -> None:
    """Write gated prompts so that ``peft.PeftModel.from_pretrained`` loads them.

    Args:
        directory: created if it does not exist.
        config: resolved.
        tensors: by our names.
        llama: the backbone.

    Raises:
        OSError: a file cannot be written.
        ValueError: a field of ``config``, or the backbone's family, that PEFT does not support, or the folder holds a
            model or another library's adapter.
    """
    directory = Path(directory)
    check_folder(directory, owner="PEFT")
    top = tuple(range(len(llama.model.layers)))[-len(config.layers or ()) :]
    for field, expected in (("kind", PROMPT), ("layers", top), ("modules_to_save", None), (BIAS_SCALE, None)):
        got = getattr(config, field) or None
        if got != expected:
            raise ValueError(f"{field}: expected {expected!r} for PEFT's AdaptionPrompt, got {got!r}")
    if (family := llama.config.model_type) not in _FAMILIES:
        raise ValueError(f"llama: expected one of {', '.join(_FAMILIES)} for PEFT's AdaptionPrompt, got {family}")
    fields = {
        "adapter_layers": len(top),
        "adapter_len": config.prompt_length,
        "base_model_name_or_path": hub_name(llama),
        "inference_mode": True,
        "peft_type": _TYPE,
        "target_modules": "self_attn",
        "task_type": "CAUSAL_LM",
    }
    saved = {}
    for layer in top:
        for theirs, ours in _NAMES.items():
            tensor = tensors[f"{layer}.{ours}"].detach().to("cpu", copy=True)
            if theirs == "gate" and len(tensor) > 1:
                if (tensor != tensor[0]).any():
                    raise ValueError(
                        "prompt_gate: expected one gate for each layer for PEFT's AdaptionPrompt, got gates of heads "
                        f"that differ at layer {layer}"
                    )
                tensor = tensor[:1]
            key = f"base_model.model.model.layers.{layer}.self_attn.adaption_{theirs}"
            saved[key] = (tensor[None] if theirs == "prompt" else tensor).contiguous()
    with replacing(directory / WEIGHTS_NAME) as temporary:
        save_file(saved, temporary, metadata={"format": "pt"})
    write_json(directory / CONFIG_NAME, fields)
