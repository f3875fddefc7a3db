"""A sum, an adapter and an RMSNorm on a CPU, in one pass over blocks of rows (csrc/adapter_cpu_norm.h).

    s = x + added      y = adapter(s)      n = w·ρ·y, ρ = 1/√(mean(y²) + eps)

Kept for the backward are s, z, mean and rstd, as by the adapter alone, and by the norm y and ρ, fp32 (T,).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern.ops import native
from adapterkern.ops.call import Call
from adapterkern.ops.readable import aligned, expect, side_by_side


def _weight(weight: Tensor, d: int) -> Tensor:
    expect("next_weight", weight, (d,))
    return aligned(weight.detach().to(torch.float32).contiguous())


def forward(
    rows: Tensor,
    added: Tensor | None,
    w: Sequence[Any],
    weight: Tensor,
    norm_eps: float,
    call: Call,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, n and s (T, d); z, mean and rstd as native.py's; and ρ (T,). s is ``rows`` itself without ``added``."""
    count, d = rows.shape
    x = s = side_by_side(rows)
    if added is not None:
        expect("added", added, (count, d))
        added = side_by_side(added.to(x.dtype))
        s = torch.empty((count, d), dtype=x.dtype, device="cpu")
    n = torch.empty((count, d), dtype=x.dtype, device="cpu")
    rho = torch.empty(count if save else 0, dtype=torch.float32, device="cpu")
    given = _weight(weight, d)
    pointers = [0, 0, 0] if added is None else [x.data_ptr(), added.data_ptr(), s.data_ptr()]
    pointers += [n.data_ptr(), rho.data_ptr() if save else 0, given.data_ptr()]
    strides = [x.stride(0), 0 if added is None else added.stride(0)]
    around = pointers, strides, norm_eps
    y, z, mean, rstd = native.forward(s, w, call, save, around=around)
    return y, n, s, z, mean, rstd, rho


def norm_backward(dn: Tensor, y: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """The gradient of y (T, d) through the norm, of that of n."""
    count, d = y.shape
    dn, y = (side_by_side(t.to(y.dtype)) for t in (dn, y))
    rho = aligned(rho.to(torch.float32).contiguous())  # a hook on saved tensors may have made it another
    for name, t, shape in (("dn", dn, (count, d)), ("y", y, (count, d)), ("rho", rho, (count,))):
        expect(name, t, shape)
    given, dy = _weight(weight, d), torch.empty((count, d), dtype=y.dtype, device="cpu")
    native._C.norm_backward(
        *(native.instruction_set()[0], native._C.DTYPES[native._DTYPES[y.dtype]], count, d, dn.stride(0), y.stride(0)),
        *(t.data_ptr() for t in (dn, y, given, rho, dy)),
        torch.get_num_threads(),
    )
    return dy
