"""The RMSNorm that reads y: its output, and y's gradient. A program per row, which it reads twice, then from L1.

    n = w·ρ·y      dy = ρ(g − ρ·y·mean(g·ρ·y)), g = w·dn      ρ = 1/√(mean(y²) + eps)

Forward 2 units and backward 3. By clusters the forward is part of the adapter's: 1 unit, n.
"""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import follow
from .tiles import early_launch


class Following(NamedTuple):
    """The norm: its weight in fp32 (d,), where n (T, d) goes, and ρ (T,), which None does not keep."""

    weight: Tensor
    n: Tensor
    rstd: Tensor | None
    eps: float


@triton.jit
def norm_kernel(p_y, p_weight, p_n, p_rstd, eps, d: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    t = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BD)
    squares = tl.zeros((BD,), tl.float32)
    for lo in range(0, d, BD):
        y = tl.load(p_y + t * d + lo + o, mask=lo + o < d, other=0).to(tl.float32)
        squares += y * y
    rstd = 1 / tl.sqrt(tl.sum(squares) / d + eps)
    if p_rstd is not None:
        tl.store(p_rstd + t, rstd)
    for lo in range(0, d, BD):
        m = lo + o < d
        y = tl.load(p_y + t * d + lo + o, mask=m, other=0).to(tl.float32)
        n = y * rstd * tl.load(p_weight + lo + o, mask=m, other=0)
        tl.store(p_n + t * d + lo + o, n.to(p_n.dtype.element_ty), mask=m)


@triton.jit
def norm_backward_kernel(p_dn, p_y, p_rstd, p_weight, p_dy, d: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    t = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BD)
    rstd = tl.load(p_rstd + t)
    products = tl.zeros((BD,), tl.float32)
    for lo in range(0, d, BD):
        m = lo + o < d
        g = tl.load(p_dn + t * d + lo + o, mask=m, other=0).to(tl.float32)
        g *= tl.load(p_weight + lo + o, mask=m, other=0)
        products += g * tl.load(p_y + t * d + lo + o, mask=m, other=0).to(tl.float32)
    mean = tl.sum(products) / d * rstd
    for lo in range(0, d, BD):
        m = lo + o < d
        g = tl.load(p_dn + t * d + lo + o, mask=m, other=0).to(tl.float32)
        g *= tl.load(p_weight + lo + o, mask=m, other=0)
        y = tl.load(p_y + t * d + lo + o, mask=m, other=0).to(tl.float32)
        dy = rstd * (g - rstd * y * mean)
        tl.store(p_dy + t * d + lo + o, dy.to(p_dy.dtype.element_ty), mask=m)


def norm(y: Tensor, following: Following, *, pdl: bool) -> None:
    """Launch the norm of dense rows ``y`` (T, d), T >= 1."""
    T, d = y.shape
    f = following
    norm_kernel[(T,)](y, f.weight, f.n, f.rstd, f.eps, d=d, PDL=pdl, **_blocks(d), **early_launch(pdl))


def norm_backward(dn: Tensor, y: Tensor, rstd: Tensor, weight: Tensor, *, pdl: bool) -> Tensor:
    """The gradient of dense rows ``y`` (T, d), T >= 1, of that of n."""
    T, d = y.shape
    dy = torch.empty_like(y)
    norm_backward_kernel[(T,)](dn, y, rstd, weight, dy, d=d, PDL=pdl, **_blocks(d), **early_launch(pdl))
    return dy


def _blocks(d: int) -> dict[str, int]:
    size = min(triton.next_power_of_2(d), 4096)
    return {"BD": size, "num_warps": 8 if size > 1024 else 4}
