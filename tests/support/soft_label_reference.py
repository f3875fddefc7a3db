"""The divergences as their definitions have them, over whole logits, and a count of what is allocated."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def plain(
    z: Tensor, t: Tensor, T: float, divergence: str, beta: float | None = None, top_k: int | None = None
) -> Tensor:
    """D of each token, as the definition has it."""
    p, q = (t / T).softmax(-1), (z / T).softmax(-1)
    if top_k is not None:
        order = p.argsort(-1, descending=True)
        p, q = (
            torch.cat([x[..., :top_k], x[..., top_k:].sum(-1, keepdim=True)], -1)
            for x in (p.gather(-1, order), q.gather(-1, order))
        )
    beta = {"kl": 0.0, "reverse-kl": 1.0}.get(divergence, 0.5 if beta is None else beta)
    if beta == 0:
        return (p * (p.log() - q.log())).sum(-1)
    if beta == 1:
        return (q * (q.log() - p.log())).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p.log() - m.log())).sum(-1) + (1 - beta) * (q * (q.log() - m.log())).sum(-1)


class Allocations(TorchDispatchMode):
    """The largest tensor that any operator made, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out
