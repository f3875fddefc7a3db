"""Weights of a frozen backbone in 8 or 4 bits, by bitsandbytes: what ``load_backbone`` asks transformers for.

4 bits are NF4 (QLoRA, Dettmers et al. 2023) with quantized scales, 8 bits are LLM.int8 (Dettmers et al. 2022). The
matrices of the layers are quantized; embeddings, norms and the LM head keep the backbone's dtype, in which products
are computed.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from adapterkern import checks

PACKED = ("8bit", "4bit")
CHOICES = ("none", *PACKED)


def check_load_in(load_in: str | None, source: str | os.PathLike[str], device: torch.device) -> None:
    """Raise what can be known before weights are read.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: ``load_in`` is unknown, bitsandbytes does not run on the device, or the weights of ``source`` are
            quantized already.
    """
    if load_in is None:
        return
    checks.choice("load_in", load_in, CHOICES)
    if load_in == "none":
        return
    if Path(source).suffix == ".gguf":
        raise ValueError(
            f"load_in: expected none for {source}, whose weights are packed already, and unpacked into the dtype; got "
            f"{load_in}"
        )
    from adapterkern.files import read_json

    file = Path(source, "config.json")
    if file.is_file():
        check_plain(source, load_in, read_json(file, ours=False).get("quantization_config"))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in: expected bitsandbytes, which is not installed: pip install bitsandbytes")
    import bitsandbytes  # takes a second

    known = sorted(bitsandbytes.supported_torch_devices)
    if device.type not in known:
        raise ValueError(f"load_in: expected a device of bitsandbytes ({', '.join(known)}), got {device.type}")


def check_plain(source: str | os.PathLike[str], load_in: str | None, quantized: Any) -> None:
    """Raise ``ValueError`` if weights are to be quantized whose ``config.json`` says how they are ``quantized``."""
    if load_in in PACKED and quantized:
        raise ValueError(
            f"load_in: expected none for {source}, whose weights are quantized already, and loaded as they are; got "
            f"{load_in}"
        )


def quantization(load_in: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of transformers' ``from_pretrained`` for weights in ``load_in``, and products in ``dtype``."""
    if load_in not in PACKED:
        return {}
    from transformers import BitsAndBytesConfig

    how: dict[str, Any] = {"load_in_8bit": True}
    if load_in == "4bit":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        how["bnb_4bit_compute_dtype"] = dtype
    return {"quantization_config": BitsAndBytesConfig(**how), "device_map": {"": device}}
