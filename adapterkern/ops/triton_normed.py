"""A sum, an adapter and an RMSNorm on a GPU, as native_normed.py has them: by clusters in one launch, else in two."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern.ops import choice
from adapterkern.ops.call import Call


def forward(
    rows: Tensor,
    added: Tensor | None,
    w: Sequence[Any],
    weight: Tensor,
    norm_eps: float,
    call: Call,
    save: bool,
) -> tuple[Tensor, ...]:
    """As native_normed.py's."""
    from adapterkern.ops.kernels import launch  # Triton takes a third of a second to import
    from adapterkern.ops.kernels.norm import Following

    s = rows if added is None else rows + added
    learned = isinstance(call.scale, Tensor)
    weights = (*w, call.scale) if learned else tuple(w)
    how: dict[str, Any] = {"factor": 1.0 if learned else call.scale, "by_clusters": choice.runs_clusters(s.device)}
    if call.drop is not None:
        how |= {"dropout": call.drop.rate, "seed": call.drop.seed}
    n = s.new_empty(s.shape)
    rho = s.new_empty(len(s) if save else 0, dtype=torch.float32)
    following = Following(weight.detach().float().contiguous(), n, rho if save else None, norm_eps)
    how |= {"eps": call.eps, "activation": call.activation, "compute": call.compute}
    how |= {"save": save, "following": following}
    y, *saved = launch.adapter_forward(s, weights, None, **how)
    return y, n, s, *saved, rho


def norm_backward(dn: Tensor, y: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """As native_normed.py's."""
    from adapterkern.ops.kernels import launch

    return launch.norm_backward(dn, y, rho, weight.detach().float().contiguous())
