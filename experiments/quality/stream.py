"""The backbone in two parts: the layers that no method changes, run once per text, and those above.

``stream`` is the residual stream below layer ``first`` of all texts of a set, made once and kept in the cache folder.
``suffix`` makes a causal language model of the layers from ``first`` on, which takes that stream as ``inputs_embeds``.
It is a plain transformers model, so every method applies to it as it would to a whole one.

Texts are padded on the right and the decoder is causal, so no real token sees padding, and no mask is needed.
"""

import copy
import fcntl
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapterkern.files import replacing
from adapterkern.recipes.demo import corpora
from experiments.quality.sets import Part

BATCH = 32


def suffix(llama: Any, first: int, *, share: bool = True) -> Any:
    """A copy of the layers from ``first`` on, with the final norm and the LM head.

    ``share``: embeddings and LM head are those of ``llama``, not copies.
    """
    embeddings = {id(p): p for m in (llama.model.embed_tokens, llama.lm_head) for p in m.parameters() if share}
    below, llama.model.layers = llama.model.layers, llama.model.layers[first:]
    try:
        made = copy.deepcopy(llama, embeddings)
    finally:
        llama.model.layers = below
    made.config.num_hidden_layers = len(made.model.layers)
    if getattr(made.config, "layer_types", None):
        made.config.layer_types = made.config.layer_types[first:]
    for i, layer in enumerate(made.model.layers):
        layer.self_attn.layer_idx = i
    return made.requires_grad_(False)


def stream(llama: Any, first: int, part: Part, name: str) -> np.ndarray:
    """The residual stream (N, L, d) below layer ``first``, fp32, mapped from a file that is made the first time."""
    path = corpora.cache_folder() / "quality" / f"{name}-{first}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
        if not path.exists():
            _make(llama, first, part, path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _make(llama: Any, first: int, part: Part, path: Path) -> None:
    model = copy.copy(llama.model)
    model._modules = dict(llama.model._modules) | {"layers": llama.model.layers[:first], "norm": nn.Identity()}
    with replacing(path) as temporary:
        shape = (*part.ids.shape, llama.config.hidden_size)
        out = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        for start in range(0, len(part), BATCH):
            ids = torch.from_numpy(part.ids[start : start + BATCH]).long()
            out[start : start + BATCH] = model(input_ids=ids, use_cache=False).last_hidden_state.numpy()
        out.flush()


def mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The mean of hidden states (B, L, d) over each row's first ``lengths`` tokens: (B, d)."""
    real = torch.arange(hidden.shape[1]) < lengths[:, None]
    return torch.einsum("bld,bl->bd", hidden, real.to(hidden.dtype)) / lengths[:, None]
