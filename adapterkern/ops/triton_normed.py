"""A sum, an adapter and an RMSNorm on a GPU, as native_normed.py has them: by clusters in one launch, else in two."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern.ops import choice
from adapterkern.ops.dropout import Drop


def _how(
    scale: Tensor | float, drop: Drop | None, w: Sequence[Any], device: torch.device
) -> tuple[Any, dict[str, Any]]:
    """The parameters, with a scale that is a tensor, and the arguments that forward and backward share."""
    learned = isinstance(scale, Tensor)
    how = {"factor": 1.0 if learned else scale, "by_clusters": choice.runs_clusters(device)}
    if drop is not None:
        how |= {"dropout": drop.rate, "seed": drop.seed}
    return (*w, scale) if learned else tuple(w), how


def forward(
    rows: Tensor,
    added: Tensor | None,
    w: Sequence[Any],
    weight: Tensor,
    norm_eps: float,
    eps: float,
    activation: str,
    compute: torch.dtype,
    save: bool = True,
    scale: Tensor | float = 1.0,
    drop: Drop | None = None,
) -> tuple[Tensor, ...]:
    """As native_normed.py's."""
    from adapterkern.ops.kernels import launch  # Triton takes a third of a second to import
    from adapterkern.ops.kernels.norm import Following

    s = rows if added is None else rows + added
    weights, how = _how(scale, drop, w, s.device)
    n = s.new_empty(s.shape)
    rho = s.new_empty(len(s) if save else 0, dtype=torch.float32)
    following = Following(weight.detach().float().contiguous(), n, rho if save else None, norm_eps)
    how |= {"eps": eps, "activation": activation, "compute": compute, "save": save, "following": following}
    y, *saved = launch.adapter_forward(s, weights, None, **how)
    return y, n, s, *saved, rho


def backward(
    dy: Tensor | None,
    dn: Tensor,
    rows: Tensor,
    y: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rho: Tensor,
    w: Sequence[Any],
    weight: Tensor,
    eps: float,
    activation: str,
    needed: Sequence[bool],
    scale: Tensor | float = 1.0,
    drop: Drop | None = None,
) -> list[Tensor | None]:
    """As native_normed.py's."""
    from adapterkern.ops.kernels import launch

    weights, how = _how(scale, drop, w, rows.device)
    dy = launch.norm_backward(dy, dn, y, rho, weight.detach().float().contiguous())
    how |= {"activation": activation, "needed": needed, "x_free": False}
    return launch.adapter_backward(dy, rows, z, mean, rstd, weights, None, **how)
