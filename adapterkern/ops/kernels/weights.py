"""Weight preparation: what the kernels read in place of the six fp32 parameters.

    A = round(W_down·diag(γ))   rowsum(A)   c = W_down·β + b_down   round(W_up)

LayerNorm's scale is folded into the down projection, so that one product of the raw rows is enough:
u = ρ(x·Aᵀ − μ·rowsum(A)). The row sums are those of the *rounded* A: then μ cancels in the product to fp32 accuracy.
Sums of the unrounded weights would leave μ times a bf16 rounding error (relative error of z at a mean of 100σ: 1.6e-3
with the rounded weights' sums, 1.6e-1 without).

All outputs are padded with zeros: A to (R, D), W_up to (D, R) and b_up to D, where R is r rounded up to a power of two
>= 16 (a tensor-core tile's minimum) and D is d rounded up to a multiple of 128 (any column tile). So no kernel masks a
weight. One launch; it reads 2·r·d parameters and writes as many in the compute dtype.
"""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import narrow
from .tiles import ceil_div

COLUMN_ALIGNMENT = 128


def padded_adapter_dim(r: int) -> int:
    """r as the kernels see it: a power of two >= 16."""
    return max(16, 1 << (r - 1).bit_length())


def padded_hidden_size(d: int) -> int:
    """d as the prepared weights see it: a multiple of every column tile."""
    return ceil_div(d, COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Prepared:
    """The kernels' view of n stacked adapters (n = 1 for a plain call)."""

    A: Tensor  # (n, R, D) compute dtype
    a_sum: Tensor  # (n, R) fp32, row sums of the rounded A
    c: Tensor  # (n, R) fp32, W_down·β + b_down
    w_up: Tensor  # (n, D, R) compute dtype
    b_up: Tensor  # (n, D) fp32

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields, in order."""
        return self.A, self.a_sum, self.c, self.w_up, self.b_up


# Parameters may start anywhere (e.g. in a flat buffer): their alignment must not compile another variant.
@triton.jit(do_not_specialize_on_alignment=["p_gamma", "p_beta", "p_wd", "p_bd", "p_wu", "p_bu"])
def _prepare_kernel(
    p_gamma,  # (n, d)
    p_beta,  # (n, d)
    p_wd,  # (n, r, d)
    p_bd,  # (n, r)
    p_wu,  # (n, d, r)
    p_bu,  # (n, d)
    p_a,  # (n, R, D)
    p_asum,  # (n, R)
    p_c,  # (n, R)
    p_wup,  # (n, D, R)
    p_bup,  # (n, D)
    d: tl.constexpr,
    r: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Programs 0 … R−1 each make one row of A; the others each copy BLOCK elements of W_up.
    i = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    if i < R:
        total = tl.zeros((BLOCK,), tl.float32)
        offset = tl.zeros((BLOCK,), tl.float32)
        for o in range(0, D, BLOCK):
            o_d = o + tl.arange(0, BLOCK)
            m_d = (o_d < d) & (i < r)
            w = tl.load(p_wd + (n * r + i) * d + o_d, mask=m_d, other=0).to(tl.float32)
            gamma = tl.load(p_gamma + n * d + o_d, mask=m_d, other=0).to(tl.float32)
            beta = tl.load(p_beta + n * d + o_d, mask=m_d, other=0).to(tl.float32)
            a = narrow(w * gamma, p_a.dtype.element_ty)
            tl.store(p_a + (n * R + i) * D + o_d, a, mask=o_d < D)
            total += a.to(tl.float32)
            offset += w * beta
        bias = tl.load(p_bd + n * r + i, mask=i < r, other=0).to(tl.float32)
        tl.store(p_asum + n * R + i, tl.sum(total, 0))
        tl.store(p_c + n * R + i, tl.sum(offset, 0) + bias)
    else:
        o_w = (i - R) * BLOCK + tl.arange(0, BLOCK)
        i_d = o_w // R
        i_r = o_w % R
        up = tl.load(p_wu + (n * d + i_d) * r + i_r, mask=(i_d < d) & (i_r < r), other=0)
        tl.store(p_wup + n * D * R + o_w, narrow(up.to(tl.float32), p_wup.dtype.element_ty), mask=i_d < D)
        first = (i_r == 0) & (i_d < D)
        up_bias = tl.load(p_bu + n * d + i_d, mask=first & (i_d < d), other=0)
        tl.store(p_bup + n * D + i_d, up_bias.to(tl.float32), mask=first)


def empty_prepared(down_weight: Tensor, dtype: torch.dtype) -> Prepared:
    """Uninitialized tensors for a down projection (n, r, d), or (r, d) for n = 1."""
    r, d = down_weight.shape[-2:]
    n = down_weight.shape[0] if down_weight.dim() == 3 else 1
    R, D = padded_adapter_dim(r), padded_hidden_size(d)

    def empty(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=down_weight.device)

    return Prepared(
        A=empty(dtype, n, R, D),
        a_sum=empty(torch.float32, n, R),
        c=empty(torch.float32, n, R),
        w_up=empty(dtype, n, D, R),
        b_up=empty(torch.float32, n, D),
    )


def prepare(weights: Sequence[Tensor], dtype: torch.dtype) -> Prepared:
    """Launch the preparation of the six parameters, stacked (n, …), or of one adapter's without the leading n."""
    out = empty_prepared(weights[2], dtype)
    r, d = weights[2].shape[-2:]
    n, R, D = out.A.shape
    block = 1024
    _prepare_kernel[(R + ceil_div(D * R, block), n)](
        *(w.contiguous() for w in weights), *out.tensors(), d=d, r=r, D=D, R=R, BLOCK=block, num_warps=4
    )
    return out
