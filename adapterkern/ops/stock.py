"""The stock PyTorch operations around the operator: what eager PyTorch casts, and adapters that a batch mixes."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern.ops.checks import LOW
from adapterkern.ops.closed_form import stats_dtype
from adapterkern.ops.dropout import Drop
from adapterkern.ops.reference import Weights, adapter_eager


def stock_dtype(x: Tensor, weights: Sequence[Tensor | None]) -> torch.dtype | None:
    """The dtype that eager PyTorch needs ``weights`` cast to for ``x``; None if it takes them as they are."""
    dtypes = {w.dtype for w in weights if w is not None}
    # With a low-precision x autocast is on. It casts fp32, but not fp64.
    wanted = torch.float32 if x.dtype in LOW else x.dtype
    return None if dtypes in ({x.dtype}, {wanted}) else wanted


def eager(
    x: Tensor,
    weights: Weights,
    index: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | float,
    gate: Tensor | None,
    drop: Drop | None,
    how: dict[str, Any],
) -> Tensor:
    """A call in stock PyTorch operations; with ``index`` one adapter at a time. ``gate`` is (T,)."""
    r, lead = weights.down_weight.shape[-2], x.shape[:-1]
    mask = None if drop is None else drop.mask(math.prod(lead), r, stats_dtype(x.dtype)).view(*lead, r)
    gate = None if gate is None else gate.view(lead)
    if index is None:
        return adapter_eager(x, weights, residual=residual, scale=scale, gate=gate, mask=mask, **how).to(x.dtype)
    shape = *index.shape, math.prod(x.shape[index.dim() : -1])  # -1 is ambiguous for 0 elements
    rows = x.reshape(*shape, x.shape[-1])
    base = rows if residual is None else residual.reshape(rows.shape)
    of_rows = {
        "gate": None if gate is None else gate.reshape(shape),
        "mask": None if mask is None else mask.view(*shape, r),
    }
    y = base.clone()
    for e in range(weights.down_weight.shape[0]):
        chosen = index == e
        one = Weights(*(w if w is None else w[e] for w in weights))  # type: ignore[arg-type]
        own: dict[str, Any] = {name: None if t is None else t[chosen] for name, t in of_rows.items()}
        by = scale[e] if isinstance(scale, Tensor) else scale
        y[chosen] = adapter_eager(rows[chosen], one, residual=base[chosen], scale=by, **own, **how).to(x.dtype)
    return y.view(x.shape)


def rms_norm(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's RMSNorm in y's dtype, rounded once; its kernels take a weight of that dtype alone."""
    wide = y.dtype
    if weight.dtype != wide:
        wide = torch.promote_types(weight.dtype, torch.promote_types(wide, torch.float32))
    return F.rms_norm(y.to(wide), y.shape[-1:], weight.to(wide), eps).to(y.dtype)


def eager_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast to x's dtype if that is a 16-bit one and autocast is off: fp32 modules then take x as it is."""
    kind = x.device.type
    if x.dtype in LOW and not torch.is_autocast_enabled(kind):
        return torch.autocast(kind, dtype=x.dtype)
    return contextlib.nullcontext()
