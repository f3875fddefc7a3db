"""Runs of tiny language models over one backbone, in folders, to serve."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import adapterkern as ak
from tests.support import tiny_chat, tiny_run
from tests.support.tiny_llama import tiny

# Shapes that share a site, and others; all change what is generated.
SHAPES: list[dict[str, Any]] = [
    {"adapter_dim": 8, "layers": (2, 3)},
    {"adapter_dim": 4, "layers": (1, 3), "depth": 2},
    {"adapter_dim": 8, "layers": (3,), "position": "attention"},
    {"adapter_dim": 4, "layers": (0, 1, 2, 3), "activation": "gelu"},
]
CONTEXT = 4096


def save_runs(folder: Path, count: int, template: str | None = tiny_chat.CHATML) -> list[Path]:
    """``folder/llama``, which never ends a text, and adapters on it in ``folder/run0``, ``folder/run1``, ..."""
    changes = {"max_position_embeddings": CONTEXT, "eos_token_id": None, "initializer_range": 0.2}
    llama = tiny(vocab_size=len(tiny_chat.tokenizer()), **changes)
    tokenizer = tiny_chat.tokenizer(template)
    tokenizer.eos_token = None
    llama.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    llama = type(llama).from_pretrained(folder / "llama")
    made = []
    for number in range(count):
        model = ak.LlamaAdapter(llama, ak.AdapterConfig(**SHAPES[number % len(SHAPES)]))
        torch.manual_seed(number)
        for p in model.adapter_parameters():
            nn.init.normal_(p, std=0.5)
        made.append(folder / f"run{number}")
        model.save_pretrained(made[-1])
        llama = model.unload()
    return made


def prompt(number: int) -> str:
    """One of the prompts, which differ in length."""
    return " ".join(tiny_run.WORDS[number : 2 * number + 2])


def alone(folder: Path, run: Path | None, text: str, tokens: int) -> list[int]:
    """The tokens that a run answers by itself, greedily; ``None`` is the backbone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = AutoModelForCausalLM.from_pretrained(folder / "llama")
    model = llama if run is None else ak.LlamaAdapter.from_pretrained(llama, run)
    ids = AutoTokenizer.from_pretrained(folder / "llama")(text, return_tensors="pt")
    with torch.no_grad():
        made = model.eval().generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    found: list[int] = made[0, ids["input_ids"].shape[1] :].tolist()
    return found
