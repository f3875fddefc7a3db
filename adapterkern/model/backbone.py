"""Load a backbone, or its first layers, from a transformers folder, a hub name or a GGUF file."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterkern import checks
from adapterkern.model.decoder import decoder_layers, keep_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_backbone(
    source: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    dtype: str = "fp32",
    device: torch.device | str | None = None,
) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        source: a ``.gguf`` file, a folder that transformers saved, or a name on the hub.
        num_layers: the number of decoder layers to keep, counted from the first; default all.
        dtype: of the weights, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        device: default the first CUDA device if there is one, else the CPU; in a process started by torchrun or
            accelerate, the CUDA device of its local rank.

    Raises:
        FileNotFoundError: there is no such ``.gguf`` file or folder.
        ValueError: ``num_layers`` is not from 1 to the number of layers, or the dtype is unknown.
    """
    checks.choice("dtype", dtype, tuple(DTYPES))
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
        checks.integer("num_layers", num_layers, 1, len(decoder_layers(llama)))
        keep_layers(llama.model, 0, num_layers)
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    llama.to(device or (cuda if torch.cuda.is_available() else "cpu"))
    return llama.eval(), tokenizer
