"""The divergences as their definitions have them, over whole logits, and a count of what is allocated."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def plain(z: Tensor, t: Tensor, T: float, divergence: str) -> Tensor:
    """D of each token, as the definition has it."""
    p, q = (t / T).softmax(-1), (z / T).softmax(-1)
    if divergence == "kl":
        return (p * (p.log() - q.log())).sum(-1)
    m = (p + q) / 2
    return ((p * (p.log() - m.log())).sum(-1) + (q * (q.log() - m.log())).sum(-1)) / 2


class Allocations(TorchDispatchMode):
    """The largest tensor that any operator made, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out
