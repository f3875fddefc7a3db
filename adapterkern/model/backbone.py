"""Backbones by name: a transformers folder or hub name, or one GGUF file; whole, or their first layers."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterkern.model.decoder import decoder_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_backbone(
    source: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    dtype: str = "fp32",
    device: torch.device | str | None = None,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        source: a ``.gguf`` file, a folder that transformers saved, or a name on the hub.
        num_layers: keep only the first so many decoder layers; default all.
        dtype: of the weights, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        device: default the first CUDA device if there is one, else the CPU; in a process that torchrun or accelerate
            has started, the one of its local rank.

    Raises:
        FileNotFoundError: a ``.gguf`` file or folder that is not there.
        ValueError: more layers asked for than there are, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    path = Path(source)
    name, kwargs = os.fspath(source), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model: no file {path}")
        name, kwargs = os.fspath(path.parent), {"gguf_file": path.name}
    elif not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(f"model: no folder {path}")
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    llama: Any = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], **kwargs)
    if num_layers is not None:
        keep_first_layers(llama, num_layers)
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    llama.to(device or (cuda if torch.cuda.is_available() else "cpu"))
    return llama.eval(), tokenizer


def keep_first_layers(llama: Any, num_layers: int) -> None:
    """Cut the decoder after ``num_layers``; its final norm and head stay."""
    layers = decoder_layers(llama)
    if not 1 <= num_layers <= len(layers):
        raise ValueError(f"num_layers: expected 1 to {len(layers)}, got {num_layers}")
    llama.model.layers = layers[:num_layers]
    llama.config.num_hidden_layers = num_layers
    if getattr(llama.config, "layer_types", None) is not None:
        llama.config.layer_types = llama.config.layer_types[:num_layers]
