"""Weight preparation: what the kernels read in place of the six fp32 parameters.

    A = round(W_down·diag(γ))   rowsum(A)   c = W_down·β + b_down   round(W_up)

LayerNorm's scale is folded into the down projection, so that one product of the raw rows is enough:
u = ρ(x·Aᵀ − μ·rowsum(A)). The row sums are those of the *rounded* A: then μ cancels in the product to fp32 accuracy.
Sums of the unrounded weights would leave μ times a bf16 rounding error (relative error of z at a mean of 100σ: 1.6e-3
with the rounded weights' sums, 1.6e-1 without).

A scale α multiplies W_up and b_up before they are rounded. Without LayerNorm A = round(W_down), c = b_down, and there
are no row sums.

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
    a_sum: Tensor  # (n, R) fp32, row sums of the rounded A; (n, 0) without LayerNorm
    c: Tensor  # (n, R) fp32, W_down·β + b_down
    w_up: Tensor  # (n, D, R) compute dtype, times the scale
    b_up: Tensor  # (n, D) fp32, times the scale

    @property
    def row_sums(self) -> Tensor | None:
        """``a_sum`` as the kernels take it: None without LayerNorm."""
        return self.a_sum if self.a_sum.shape[1] else None

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields, in order."""
        return self.A, self.a_sum, self.c, self.w_up, self.b_up


# Parameters may start anywhere (e.g. in a flat buffer): their alignment must not compile another variant.
@triton.jit(do_not_specialize_on_alignment=["p_gamma", "p_beta", "p_wd", "p_bd", "p_wu", "p_bu", "p_scale"])
def _prepare_kernel(
    p_gamma,  # (n, d), or None with the next and p_asum: no LayerNorm
    p_beta,  # (n, d)
    p_wd,  # (n, r, d)
    p_bd,  # (n, r)
    p_wu,  # (n, d, r)
    p_bu,  # (n, d)
    p_scale,  # (n,), or None: 1
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
            a = w
            if p_gamma is not None:
                a *= tl.load(p_gamma + n * d + o_d, mask=m_d, other=0).to(tl.float32)
                offset += w * tl.load(p_beta + n * d + o_d, mask=m_d, other=0).to(tl.float32)
            a = narrow(a, p_a.dtype.element_ty)
            tl.store(p_a + (n * R + i) * D + o_d, a, mask=o_d < D)
            total += a.to(tl.float32)
        bias = tl.load(p_bd + n * r + i, mask=i < r, other=0).to(tl.float32)
        if p_asum is not None:
            tl.store(p_asum + n * R + i, tl.sum(total, 0))
        tl.store(p_c + n * R + i, tl.sum(offset, 0) + bias)
    else:
        o_w = (i - R) * BLOCK + tl.arange(0, BLOCK)
        i_d = o_w // R
        i_r = o_w % R
        up = tl.load(p_wu + (n * d + i_d) * r + i_r, mask=(i_d < d) & (i_r < r), other=0).to(tl.float32)
        first = (i_r == 0) & (i_d < D)
        up_bias = tl.load(p_bu + n * d + i_d, mask=first & (i_d < d), other=0).to(tl.float32)
        if p_scale is not None:
            scale = tl.load(p_scale + n).to(tl.float32)
            up *= scale
            up_bias *= scale
        tl.store(p_wup + n * D * R + o_w, narrow(up, p_wup.dtype.element_ty), mask=i_d < D)
        tl.store(p_bup + n * D + i_d, up_bias, mask=first)


def empty_prepared(down_weight: Tensor, dtype: torch.dtype, norm: bool = True) -> Prepared:
    """Uninitialized tensors for a down projection (n, r, d), or (r, d) for n = 1."""
    r, d = down_weight.shape[-2:]
    n = down_weight.shape[0] if down_weight.dim() == 3 else 1
    R, D = padded_adapter_dim(r), padded_hidden_size(d)

    def empty(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=down_weight.device)

    return Prepared(
        A=empty(dtype, n, R, D),
        a_sum=empty(torch.float32, n, R if norm else 0),
        c=empty(torch.float32, n, R),
        w_up=empty(dtype, n, D, R),
        b_up=empty(torch.float32, n, D),
    )


def scale_of(weights: Sequence[Tensor | None], factor: float) -> Tensor | None:
    """The scale (n,) as the kernels take it, None for 1: the seventh of the parameters, or made of a number."""
    if len(weights) > 6:
        return weights[6].contiguous()  # type: ignore[union-attr]
    down: Tensor = weights[2]  # type: ignore[assignment]
    n = down.shape[0] if down.dim() == 3 else 1
    return None if factor == 1 else torch.full((n,), factor, dtype=torch.float32, device=down.device)


def prepare(weights: Sequence[Tensor | None], dtype: torch.dtype, factor: float = 1.0) -> Prepared:
    """Launch the preparation of the parameters, stacked (n, …), or of one adapter's without the leading n.

    The first two are None without LayerNorm. The scale is the seventh, if that is a tensor, and otherwise ``factor``.
    """
    down: Tensor = weights[2]  # type: ignore[assignment]
    out = empty_prepared(down, dtype, weights[0] is not None)
    r, d = down.shape[-2:]
    n, R, D = out.A.shape
    block = 1024
    _prepare_kernel[(R + ceil_div(D * R, block), n)](
        *(w if w is None else w.contiguous() for w in weights[:6]), scale_of(weights, factor),
        out.A, out.row_sums, out.c, out.w_up, out.b_up, d=d, r=r, D=D, R=R, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
