"""The stock PyTorch operations around the operator: what eager PyTorch casts, and adapters that a batch mixes."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern.ops.checks import LOW
from adapterkern.ops.reference import Weights, adapter_eager


def stock_dtype(x: Tensor, weights: Sequence[Tensor | None]) -> torch.dtype | None:
    """The dtype that eager PyTorch needs ``weights`` cast to for ``x``; None if it takes them as they are."""
    dtypes = {w.dtype for w in weights if w is not None}
    # With a low-precision x autocast is on. It casts fp32, but not fp64.
    wanted = torch.float32 if x.dtype in LOW else x.dtype
    return None if dtypes in ({x.dtype}, {wanted}) else wanted


def eager_mixed(
    x: Tensor, weights: Weights, index: Tensor, residual: Tensor | None, scale: Tensor | float, how: dict[str, Any]
) -> Tensor:
    """A call with ``index`` in stock PyTorch operations, one adapter at a time."""
    rows = x.reshape(*index.shape, math.prod(x.shape[index.dim() : -1]), x.shape[-1])  # -1 is ambiguous for 0 elements
    base = rows if residual is None else residual.reshape(rows.shape)
    y = base.clone()
    for e in range(weights.down_weight.shape[0]):
        chosen = index == e
        one = Weights(*(w if w is None else w[e] for w in weights))  # type: ignore[arg-type]
        by = scale[e] if isinstance(scale, Tensor) else scale
        y[chosen] = adapter_eager(rows[chosen], one, residual=base[chosen], scale=by, **how).to(x.dtype)
    return y.view(x.shape)


def eager_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast to x's dtype if that is a 16-bit one and autocast is off: fp32 modules then take x as it is."""
    kind = x.device.type
    if x.dtype in LOW and not torch.is_autocast_enabled(kind):
        return torch.autocast(kind, dtype=x.dtype)
    return contextlib.nullcontext()
