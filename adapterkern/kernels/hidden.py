"""The first of the backward's three kernels: everything of size T×r that the other two need, from one read of dy.

    dh = dy·W_up      dz = dh ⊙ act'(z)      c1 = dz·rowsum(A)/d      c2 = Σᵣ(dz ⊙ (z − c))/d      h = act(z)

A program owns a row tile. Where row tiles are too few to fill the device, a launch before it shares each tile's
columns among programs, as the forward's does, and leaves partial products in fp32.
"""

# mypy: allow-untyped-defs
# A Triton function's types are its callers'.

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import activate, activate_grad, dot, narrow, tile_rows
from .tiles import Tiles, ceil_div, column_split
from .weights import Prepared


@triton.jit
def _product(p_rows, p_w, m_t, lo, hi, d: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """dy·W_up of a row tile over columns lo … hi."""
    o_r = tl.arange(0, BR)
    dh = tl.zeros((BT, BR), tl.float32)
    for o in range(lo, hi, BD):
        o_d = o + tl.arange(0, BD)
        b_dy = tl.load(p_rows + o_d[None, :], mask=m_t[:, None] & (o_d < d)[None, :], other=0)
        b_w = tl.load(p_w + o_d[:, None] * BR + o_r[None, :], eviction_policy="evict_last")
        dh = dot(narrow(b_dy.to(tl.float32), b_w.dtype), b_w, dh, PRECISION)
    return dh


@triton.jit(do_not_specialize=["T", "S", "width"], do_not_specialize_on_alignment=["p_index"])
def hidden_partial_kernel(
    p_dy,  # (T, d) contiguous
    p_index,  # (T/S,) adapter of each sequence, or None
    p_w,  # (n, D, R)
    p_dh,  # (splits, T, R) fp32
    T,
    S,
    width,
    d: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    sequence, i_t, m_t = tile_rows(tl.program_id(0), S, BT)
    e = tl.full((), 0, tl.int64)
    if p_index is not None:
        e = tl.load(p_index + sequence).to(tl.int64)
    if e >= 0:
        lo = tl.program_id(1) * width * BD
        hi = tl.minimum(lo + width * BD, d)
        dh = _product(p_dy + i_t[:, None] * d, p_w + e * BR * D, m_t, lo, hi, d, BT, BR, BD, PRECISION)
        o_tr = (tl.program_id(1).to(tl.int64) * T + i_t)[:, None] * BR + tl.arange(0, BR)[None, :]
        tl.store(p_dh + o_tr, dh, mask=m_t[:, None])


@triton.jit(do_not_specialize=["tile0", "T", "S", "splits"], do_not_specialize_on_alignment=["p_index"])
def hidden_kernel(
    p_dy,  # (T, d) contiguous
    p_index,  # (T/S,) adapter of each sequence, or None
    p_z,  # (T, r)
    p_asum,  # (n, R)
    p_c,  # (n, R)
    p_w,  # (n, D, R)
    p_dh,  # (splits, T, R) fp32, or None: the product is made here
    p_dz,  # (T, R), or None with the next two
    p_c1,  # (T,)
    p_c2,  # (T,)
    p_h,  # (T, R), or None
    p_dx,  # (T, d), or None: rows without an adapter pass dy on here
    tile0,
    T,
    S,
    splits,
    d: tl.constexpr,
    r: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    sequence, i_t, m_t = tile_rows(tile0 + tl.program_id(0), S, BT)
    p_rows = p_dy + i_t[:, None] * d
    o_r = tl.arange(0, BR)
    e = tl.full((), 0, tl.int64)
    if p_index is not None:
        e = tl.load(p_index + sequence).to(tl.int64)
    if e < 0:
        if p_dx is not None:
            for o in range(0, d, BD):
                o_d = o + tl.arange(0, BD)
                m = m_t[:, None] & (o_d < d)[None, :]
                tl.store(p_dx + i_t[:, None] * d + o_d[None, :], tl.load(p_rows + o_d[None, :], mask=m), mask=m)
    else:
        m = m_t[:, None] & (o_r < r)[None, :]
        z = tl.load(p_z + i_t[:, None] * r + o_r[None, :], mask=m, other=0).to(tl.float32)
        o_tr = i_t[:, None] * BR + o_r[None, :]
        if p_h is not None:
            tl.store(p_h + o_tr, narrow(activate(z, ACT), p_h.dtype.element_ty), mask=m_t[:, None])
        if p_dz is not None:
            if p_dh is not None:
                dh = tl.zeros((BT, BR), tl.float32)
                for k in range(0, splits):
                    dh += tl.load(p_dh + tl.cast(k, tl.int64) * T * BR + o_tr, mask=m_t[:, None], other=0)
            else:
                dh = _product(p_rows, p_w + e * BR * D, m_t, 0, d, d, BT, BR, BD, PRECISION)
            b_dz = narrow(tl.where(m, dh * activate_grad(z, ACT), 0.0), p_dz.dtype.element_ty)
            dz = b_dz.to(tl.float32)
            c1 = tl.sum(dz * tl.load(p_asum + e * BR + o_r)[None, :], 1) / d
            c2 = tl.sum(dz * (z - tl.load(p_c + e * BR + o_r)[None, :]), 1) / d
            tl.store(p_dz + o_tr, b_dz, mask=m_t[:, None])
            tl.store(p_c1 + i_t, c1, mask=m_t)
            tl.store(p_c2 + i_t, c2, mask=m_t)


def hidden(
    dy: Tensor,
    index: Tensor | None,
    z: Tensor,
    prepared: Prepared,
    dz: Tensor | None,
    c1: Tensor | None,
    c2: Tensor | None,
    h: Tensor | None,
    dx: Tensor | None,
    *,
    row0: int,
    rows: int,
    activation: str,
    precision: str,
    tiles: Tiles,
    sms: int,
) -> None:
    """Fill dz, c1, c2 and h, each if given, for ``rows`` rows of ``dy`` (T, d) from ``row0``."""
    T, d = dy.shape
    p = prepared
    R = p.A.shape[1]
    S = T if index is None else T // index.numel()
    n_tiles = ceil_div(rows, tiles.BT) if index is None else index.numel() * ceil_div(S, tiles.BT)
    splits, width = column_split(n_tiles, min(S, tiles.BT), d, R, tiles.BD, sms)
    shape = {"d": d, "D": p.A.shape[2], "BR": R, "PRECISION": precision, "BT": tiles.BT, "BD": tiles.BD}
    how = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    dh = None
    # Only for a call's one and only chunk: the last of many has the others' company on the device.
    if dz is not None and splits > 1 and rows == T:
        dh = dy.new_empty((splits, T, R), dtype=torch.float32)
        hidden_partial_kernel[(n_tiles, splits)](dy, index, p.w_up, dh, T, S, width, **shape, **how)
    hidden_kernel[(n_tiles,)](
        dy, index, z, p.a_sum, p.c, p.w_up, dh, dz, c1, c2, h, dx, row0 // tiles.BT, T, S, splits,
        r=z.shape[1], ACT=activation, **shape, **how,
    )  # fmt: skip
