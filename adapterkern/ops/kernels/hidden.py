"""The first of the backward's three kernels: everything of size T×r that the other two need, from one read of dy.

    dh = dy·W_up      dz = dh ⊙ act'(z)      c1 = dz·rowsum(A)/d      c2 = Σᵣ(dz ⊙ (z − c))/d      h = act(z)
    s = Σₜ dz         folded: ρ·dz in place of dz, −ρ·c2 in place of c2, q = Σₜ ρ·μ·dz, and the largest (ρ·μ)²

With dropout, h and act' are times m/(1 − p). With a gate, h is stored times g, dz is made of g·dh, and the gate's
gradient is ⟨dh, h⟩ + ⟨dy, b_up⟩ of a row, of dh and h without g.

Without LayerNorm there is no c1 and no c2. A program owns a row tile and stores the sums over its rows for the next
kernel. Where row tiles are too few to fill the device, an extra launch before it shares each tile's columns among
programs, as the forward's does, and stores partial products in fp32. backward.py explains ``folded``.
"""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import Dropout, kept
from .primitives import activate, activate_grad, dot, end_of, follow, narrow, partial_stages, settled
from .rows import Routing, rows_of
from .tiles import Tiles, column_split, early_launch
from .weights import Prepared


@triton.jit
def _product(p_rows, p_w, p_bias, m_t, lo, hi, d: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
             PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dy·W_up of a row tile over columns lo … hi, and dy·b_up, which is 0 without p_bias."""
    RUN: tl.constexpr = 8  # consecutive columns, loaded by one thread: sums stay in it to the end
    o_r = tl.arange(0, BR)
    dh = tl.zeros((BT, BR), tl.float32)
    total = tl.zeros((BT, BD // RUN), tl.float32)
    for o in tl.range(lo, hi, BD, num_stages=STAGES):
        o_d = o + tl.arange(0, BD)
        b_dy = tl.load(p_rows + o_d[None, :], mask=m_t[:, None] & (o_d < d)[None, :], other=0)
        b_w = tl.load(p_w + o_d[:, None] * BR + o_r[None, :])
        dh = dot(narrow(b_dy.to(tl.float32), b_w.dtype), b_w, dh, PRECISION)
        if p_bias is not None:
            dh = settled(dh)
            by_bias = b_dy.to(tl.float32) * tl.load(p_bias + o_d)[None, :]
            total += tl.sum(tl.reshape(by_bias, (BT, BD // RUN, RUN)), 2)
    return dh, tl.sum(total, 1)


@triton.jit(
    do_not_specialize=["tile0", "rows", "S", "width"],
    do_not_specialize_on_alignment=["p_index", "p_bounds"],
)
def hidden_partial_kernel(
    p_dy,  # (T, d) contiguous
    p_index,  # (T/S,) adapter of each sequence, or None; with p_bounds (T,) rows sorted by adapter: see rows.py
    p_bounds,  # (n + 1,) where each adapter's begin in p_index, or None
    p_w,  # (n, D, R)
    p_bias,  # (n, D), or None with the last: no gradient of the gate
    p_dh,  # (splits, rows, R) fp32
    p_by_bias,  # (splits, rows) fp32
    tile0,
    rows,
    S,
    width,
    d: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    follow(PDL)
    e, i_t, m_t = rows_of(tile0 + tl.program_id(0), p_index, p_bounds, S, BT)
    if e >= 0:
        lo = tl.program_id(1) * width * BD
        hi = tl.minimum(lo + width * BD, d)
        if p_bias is not None:
            p_bias += e * D
        p_rows = p_dy + i_t[:, None] * d
        dh, by_bias = _product(p_rows, p_w + e * BR * D, p_bias, m_t, lo, hi, d, BT, BR, BD, PRECISION, STAGES)
        row = tl.program_id(1).to(tl.int64) * rows + i_t - tile0 * BT
        o_tr = row[:, None] * BR + tl.arange(0, BR)[None, :]
        tl.store(p_dh + o_tr, dh, mask=m_t[:, None])
        if p_bias is not None:
            tl.store(p_by_bias + row, by_bias, mask=m_t)


@triton.jit(
    do_not_specialize=["tile0", "rows", "S", "splits", "threshold", "factor"],
    do_not_specialize_on_alignment=["p_index", "p_bounds", "p_gate", "p_seed"],
)
def hidden_kernel(
    p_dy,  # (T, d) contiguous
    p_index,  # (T/S,) adapter of each sequence, or None; with p_bounds (T,) rows sorted by adapter
    p_bounds,  # (n + 1,) or None
    p_gate,  # (T,) fp32, or None: 1
    p_seed,  # (1,) int64, or None with threshold and factor: no dropout
    p_z,  # (T, r)
    p_mean,  # (T,), or None with the next two, p_c1 and p_c2: no LayerNorm
    p_rstd,  # (T,)
    p_asum,  # (n, R)
    p_c,  # (n, R)
    p_w,  # (n, D, R)
    p_bias,  # (n, D), or None with p_dgate
    p_dh,  # (splits, rows, R) fp32, or None with the next: this kernel makes the product
    p_by_bias,  # (splits, rows) fp32, or None with p_dgate
    p_dz,  # (T, R), or None with the next two
    p_c1,  # (T,)
    p_c2,  # (T,)
    p_h,  # (T, R), or None
    p_s,  # (tiles, R) fp32, or None
    p_q,  # (tiles, R) fp32, or None
    p_worst,  # (tiles,) fp32, or None: not folded
    p_dgate,  # (T,) fp32, or None
    p_dx,  # (T, d), or None; rows without an adapter copy dy to it, or with a residual 0
    tile0,
    rows,
    S,
    splits,
    threshold,
    factor,
    d: tl.constexpr,
    r: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    follow(PDL)
    tile = tl.cast(tile0 + tl.program_id(0), tl.int64)
    e, i_t, m_t = rows_of(tile0 + tl.program_id(0), p_index, p_bounds, S, BT)
    p_rows = p_dy + i_t[:, None] * d
    o_r = tl.arange(0, BR)
    if e < 0:
        if p_dgate is not None:
            tl.store(p_dgate + i_t, tl.zeros((BT,), tl.float32), mask=m_t)
        if p_dx is not None:
            columns = end_of(d, BR < 512)
            if p_bounds is not None:
                columns *= tl.max(m_t.to(tl.int32), 0)  # a tile may have no rows
            for o in tl.range(0, columns, BD, num_stages=STAGES):
                o_d = o + tl.arange(0, BD)
                m = m_t[:, None] & (o_d < d)[None, :]
                p_out = p_dx + i_t[:, None] * d + o_d[None, :]
                if RESIDUAL:
                    tl.store(p_out, tl.zeros((BT, BD), p_dx.dtype.element_ty), mask=m)
                else:
                    tl.store(p_out, tl.load(p_rows + o_d[None, :], mask=m), mask=m)
    else:
        m = m_t[:, None] & (o_r < r)[None, :]
        o_tr = i_t[:, None] * BR + o_r[None, :]
        if p_dz is not None or p_dgate is not None:
            if p_dh is not None:
                dh = tl.zeros((BT, BR), tl.float32)
                by_bias = tl.zeros((BT,), tl.float32)
                o_part = (i_t - tile0 * BT)[:, None] * BR + o_r[None, :]
                for k in tl.range(0, splits, num_stages=partial_stages(STAGES, BT, BR)):
                    dh += tl.load(p_dh + tl.cast(k, tl.int64) * rows * BR + o_part, mask=m_t[:, None], other=0)
                    if p_dgate is not None:
                        p_part = p_by_bias + tl.cast(k, tl.int64) * rows + i_t - tile0 * BT
                        by_bias += tl.load(p_part, mask=m_t, other=0)
            else:
                if p_bias is not None:
                    p_bias += e * D
                dh, by_bias = _product(
                    p_rows, p_w + e * BR * D, p_bias, m_t, 0, end_of(d, BR < 512), d, BT, BR, BD, PRECISION, STAGES
                )
        z = tl.load(p_z + i_t[:, None] * r + o_r[None, :], mask=m, other=0).to(tl.float32)
        if p_seed is not None:
            keep = kept(p_seed, threshold, i_t, BT, BR)
        if p_gate is not None:
            gate = tl.load(p_gate + i_t, mask=m_t, other=0)
        if p_h is not None or p_dgate is not None:
            h = activate(z, ACT)
            if p_seed is not None:
                h = tl.where(keep, h * factor, 0.0)
            if p_dgate is not None:
                tl.store(p_dgate + i_t, tl.sum(tl.where(m, dh * h, 0.0), 1) + by_bias, mask=m_t)
            if p_gate is not None:
                h *= gate[:, None]
            if p_h is not None:
                tl.store(p_h + o_tr, narrow(h, p_h.dtype.element_ty), mask=m_t[:, None])
        if p_dz is not None:
            dz = dh * activate_grad(z, ACT)
            if p_seed is not None:
                dz = tl.where(keep, dz * factor, 0.0)
            if p_gate is not None:
                dz *= gate[:, None]
            dz = tl.where(m, dz, 0.0)
            if p_s is not None:
                tl.store(p_s + tile * BR + o_r, tl.sum(dz, 0))
            if p_mean is not None:
                mean = tl.load(p_mean + i_t, mask=m_t, other=0)
                rstd = tl.load(p_rstd + i_t, mask=m_t, other=0)
            if p_worst is not None:
                dz *= rstd[:, None]
            b_dz = narrow(dz, p_dz.dtype.element_ty)
            dz = b_dz.to(tl.float32)
            if p_mean is not None:
                c1 = tl.sum(dz * tl.load(p_asum + e * BR + o_r)[None, :], 1) / d
                c2 = tl.sum(dz * (z - tl.load(p_c + e * BR + o_r)[None, :]), 1) / d
            if p_worst is not None:
                c2 = -rstd * c2
                in_deviations = mean * rstd
                tl.store(p_worst + tile, tl.max(in_deviations * in_deviations, 0))
            if p_q is not None:
                tl.store(p_q + tile * BR + o_r, tl.sum(dz * mean[:, None], 0))
            tl.store(p_dz + o_tr, b_dz, mask=m_t[:, None])
            if p_mean is not None:
                tl.store(p_c1 + i_t, c1, mask=m_t)
                tl.store(p_c2 + i_t, c2, mask=m_t)


class Hidden(NamedTuple):
    """What kernel (1) of backward.py stores for (2); None for what is not needed."""

    dz: Tensor | None  # (T, R), times ρ if folded
    c1: Tensor | None  # (T,) fp32; None, as c2, without LayerNorm
    c2: Tensor | None  # (T,) fp32, times −ρ if folded
    h: Tensor | None  # (T, R)
    s: Tensor | None  # (tiles, R) fp32
    q: Tensor | None  # (tiles, R) fp32
    worst: Tensor | None  # (tiles,) fp32, the largest (ρ·μ)² of a tile; None if not folded
    dgate: Tensor | None  # (T,) fp32, final


def hidden(
    dy: Tensor,
    of: Routing,
    z: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    prepared: Prepared,
    out: Hidden,
    dx: Tensor | None,
    *,
    tile0: int,
    n_tiles: int,
    activation: str,
    precision: str,
    tiles: Tiles,
    sms: int,
    pdl: bool,
    residual: bool,
    gate: Tensor | None,
    drop: Dropout,
) -> None:
    """Fill ``out`` for ``n_tiles`` row tiles of ``dy`` (T, d), starting with tile ``tile0``."""
    T, d = dy.shape
    p = prepared
    R = p.A.shape[1]
    rows = min(n_tiles * tiles.BT, T - tile0 * tiles.BT) if of.S == T else T
    splits, width = column_split(n_tiles, min(of.S, tiles.BT), d, R, tiles.BD, sms, reads=1)
    shape = {"d": d, "D": p.A.shape[2], "BR": R, "PRECISION": precision, "PDL": pdl, **tiles.blocks}
    how = tiles.options
    # Of R = 256 it takes 100 registers; left to ptxas 80, so that three programs share an SM, and 16 bytes of stack.
    partly = replace(tiles, registers=255).options if R == 256 else how
    bias = None if out.dgate is None else p.b_up
    dh = by_bias = None
    if (out.dz is not None or bias is not None) and splits > 1:
        dh = dy.new_empty((splits, rows, R), dtype=torch.float32)
        by_bias = None if bias is None else dy.new_empty((splits, rows), dtype=torch.float32)
        hidden_partial_kernel[(n_tiles, splits)](
            dy, of.index, of.bounds, p.w_up, bias, dh, by_bias, tile0, rows, of.S, width, **shape, **partly
        )
    hidden_kernel[(n_tiles,)](
        dy, of.index, of.bounds, gate, drop.seed, z, mean, rstd, p.row_sums, p.c, p.w_up, bias, dh, by_bias, *out, dx,
        tile0, rows, of.S, splits, drop.threshold, drop.factor,
        r=z.shape[1], ACT=activation, RESIDUAL=residual, **shape, **how, **early_launch(pdl and dh is not None),
    )  # fmt: skip
