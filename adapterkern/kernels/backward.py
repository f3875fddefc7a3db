"""The adapter's backward in the closed form, from z (T×r), two row constants, and x or y.

    dh = dy·W_up      dz = dh ⊙ act'(z)      c1 = dz·rowsum(A)/d      c2 = Σᵣ(dz ⊙ (z − c))/d          (1)
    dx = dy + ρ(dz·A − c1 − x̂·c2)           G  = dzᵀ·x̂               Uᵀ = hᵀ·dy                        (2)
    dW_down = G·diag(γ) + s·βᵀ   db_down = s = Σₜ dz   dγ = Σᵣ G ⊙ W_down   dβ = s·W_down               (3)
    dW_up = U                    db_up = Σₜ dy

Three kernels, one a line. (1), in hidden.py, owns row tiles, reads dy once and leaves dz and h, T×r each. (2) owns a
slice of d and a fixed share of the rows: its slice of A stays with it while x and dy stream through, each once, and
the fp32 sums of G and U never leave its registers until the end. (3) adds up the shares in their order and turns them
into gradients. LayerNorm's two row means are c1 and c2, so nothing of size T×d is read for them: four units of T×d
traffic in all (dy; dy, x, dx), where three is the floor.

dy's second read is meant for L2. (1) and (2) therefore alternate over chunks of rows, one wave of row tiles each, and
(2) walks its rows backwards, the last written first. A share's sums carry over from chunk to chunk through its own
partial buffer, so the order of every addition is fixed and two runs agree to the bit.

x-free: given y in place of x, (2) recovers its slice of x as y − h·W_upᵀ − b_up, for one more product and no more
traffic.

Only what is asked for is computed: without dz's users (1) does not run, and each of (2)'s outputs is a compile-time
switch.
"""

# mypy: allow-untyped-defs
# A Triton function's types are its callers'.
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hidden import hidden
from .primitives import dot, narrow, tile_rows
from .tiles import Tiles, ceil_div, multiprocessors, row_shares
from .weights import Prepared

# From this R on, G and U are summed in two launches of (2), one accumulator each. Half the registers an accumulator
# takes buy slices twice as wide, and so half the reads of dz and h (2R·slices numbers a row: 8 units at R = 256 and
# 32 columns), for one more read of dy.
SEPARATE_UP = 256


class Needed(NamedTuple):
    """Which gradients to compute, in the order of the forward's arguments."""

    x: bool
    norm_weight: bool
    norm_bias: bool
    down_weight: bool
    down_bias: bool
    up_weight: bool
    up_bias: bool


@triton.jit(
    do_not_specialize=["tile0", "tiles", "S", "stride"],
    do_not_specialize_on_alignment=["p_order", "p_bounds"],
)
def slice_kernel(
    p_dy,  # (T, d) contiguous
    p_x,  # (T, d), rows `stride`·VEC apart; y if X_FREE
    p_order,  # (T/S,) sequences sorted by adapter, or None
    p_bounds,  # (n + 1,) where each adapter's sequences begin in it
    p_dz,  # (T, R)
    p_h,  # (T, R)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_c1,  # (T,)
    p_c2,  # (T,)
    p_a,  # (n, R, D)
    p_w,  # (n, D, R)
    p_bias,  # (n, D)
    p_dx,  # (T, d), or None
    p_g,  # (shares, n, R, D) fp32, or None
    p_s,  # (shares, n, R) fp32, or None
    p_u,  # (shares, n, R, D) fp32, or None
    p_dbias,  # (shares, n, D) fp32, or None
    tile0,
    tiles,
    S,
    stride,
    d: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    VEC: tl.constexpr,
    X_FREE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    DX: tl.constexpr = p_dx is not None
    G: tl.constexpr = p_g is not None
    U: tl.constexpr = p_u is not None
    share = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    m_d = o_d < d
    o_rd = o_r[:, None] * D + o_d[None, :]
    partial = share * tl.num_programs(2) + e
    if DX:
        b_a = tl.load(p_a + e * BR * D + o_rd)
    if X_FREE and (DX or G):
        b_w = tl.load(p_w + e * BR * D + o_d[None, :] * BR + o_r[:, None])
        bias = tl.load(p_bias + e * D + o_d)

    # Sums begin at zero in the first chunk and where the last chunk left them after that.
    later = tile0 > 0
    if G:
        g = tl.load(p_g + partial * BR * D + o_rd, mask=tl.broadcast_to(later, o_rd.shape), other=0)
    if U:
        u = tl.load(p_u + partial * BR * D + o_rd, mask=tl.broadcast_to(later, o_rd.shape), other=0)
    if p_s is not None:
        s = tl.load(p_s + partial * BR + o_r, mask=tl.broadcast_to(later, o_r.shape), other=0)
    if p_dbias is not None:
        dbias = tl.load(p_dbias + partial * D + o_d, mask=tl.broadcast_to(later, o_d.shape), other=0)

    first = tile0
    last = tile0 + tiles
    if p_order is not None:
        first = tl.load(p_bounds + e).to(tl.int32) * tl.cdiv(S, BT)
        last = tl.load(p_bounds + e + 1).to(tl.int32) * tl.cdiv(S, BT)
    shares = tl.num_programs(1)
    for i in range(0, tl.cdiv(last - first - share, shares)):
        position, i_t, m_t = tile_rows(last - 1 - share - i * shares, S, BT)
        if p_order is not None:
            i_t += (tl.load(p_order + position).to(tl.int64) - position) * S
        m = m_t[:, None] & m_d[None, :]
        o_tr = i_t[:, None] * BR + o_r[None, :]
        if DX or U or p_dbias is not None:
            b_dy = tl.load(p_dy + i_t[:, None] * d + o_d[None, :], mask=m, other=0, eviction_policy="evict_first")
            dy = b_dy.to(tl.float32)
        if DX or G or p_s is not None:
            b_dz = tl.load(p_dz + o_tr, mask=m_t[:, None], other=0)
        if U or (X_FREE and (DX or G)):
            b_h = tl.load(p_h + o_tr, mask=m_t[:, None], other=0)
        if DX or G:
            b_x = tl.load(
                p_x + i_t[:, None] * stride * VEC + o_d[None, :], mask=m, other=0, eviction_policy="evict_first"
            )
            x = b_x.to(tl.float32)
            if X_FREE:
                x -= bias[None, :]
                x -= dot(b_h, b_w, tl.zeros((BT, BD), tl.float32), PRECISION)
                x = narrow(x, b_x.dtype).to(tl.float32)
            mean = tl.load(p_mean + i_t, mask=m_t, other=0)
            rstd = tl.load(p_rstd + i_t, mask=m_t, other=0)
            xhat = (x - mean[:, None]) * rstd[:, None]
        if DX:
            c1 = tl.load(p_c1 + i_t, mask=m_t, other=0)
            c2 = tl.load(p_c2 + i_t, mask=m_t, other=0)
            t = dot(b_dz, b_a, tl.zeros((BT, BD), tl.float32), PRECISION)
            dx = dy + rstd[:, None] * (t - c1[:, None] - xhat * c2[:, None])
            tl.store(
                p_dx + i_t[:, None] * d + o_d[None, :], narrow(dx, b_dy.dtype), mask=m, eviction_policy="evict_first"
            )
        if G:
            g = dot(tl.trans(b_dz), narrow(xhat, b_dz.dtype), g, PRECISION)
        if U:
            u = dot(tl.trans(b_h), narrow(dy, b_h.dtype), u, PRECISION)
        if p_s is not None:
            s += tl.sum(b_dz.to(tl.float32), 0)
        if p_dbias is not None:
            dbias += tl.sum(dy, 0)

    if G:
        tl.store(p_g + partial * BR * D + o_rd, g)
    if U:
        tl.store(p_u + partial * BR * D + o_rd, u)
    if p_s is not None:  # noqa: SIM102 - joined by `and`, None would no longer be seen at compile time
        if tl.program_id(0) == 0:
            tl.store(p_s + partial * BR + o_r, s)
    if p_dbias is not None:
        tl.store(p_dbias + partial * D + o_d, dbias)


@triton.jit(
    do_not_specialize=["shares"],
    do_not_specialize_on_alignment=["p_gamma", "p_beta", "p_wd"],
)
def reduce_kernel(
    p_g,  # (shares, n, R, D) fp32, or None
    p_s,  # (shares, n, R) fp32, or None
    p_u,  # (shares, n, R, D) fp32, or None
    p_dbias,  # (shares, n, D) fp32, or None
    p_gamma,  # (n, d)
    p_beta,  # (n, d)
    p_wd,  # (n, r, d)
    p_dgamma,  # (n, d), or None, like each below
    p_dbeta,  # (n, d)
    p_dwd,  # (n, r, d)
    p_dbd,  # (n, r)
    p_dwu,  # (n, d, r)
    p_dbu,  # (n, d)
    shares,
    d: tl.constexpr,
    r: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    RB: tl.constexpr,
    BD: tl.constexpr,
):
    # A program owns BD columns of one adapter and goes over r in steps of RB; everything it needs is in those columns.
    n = tl.num_programs(1)
    e = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < d
    gamma = tl.load(p_gamma + e * d + o_d, mask=m_d, other=0).to(tl.float32)
    beta = tl.load(p_beta + e * d + o_d, mask=m_d, other=0).to(tl.float32)
    dgamma = tl.zeros((BD,), tl.float32)
    dbeta = tl.zeros((BD,), tl.float32)
    for o in range(0, BR, RB):
        o_r = o + tl.arange(0, RB)
        m_r = o_r < r
        m = m_r[:, None] & m_d[None, :]
        o_rd = o_r[:, None] * D + o_d[None, :]
        o_wd = (e * r + o_r[:, None]) * d + o_d[None, :]
        g = tl.zeros((RB, BD), tl.float32)
        u = tl.zeros((RB, BD), tl.float32)
        s = tl.zeros((RB,), tl.float32)
        for k in range(0, shares):
            partial = k * n + e
            if p_g is not None:
                g += tl.load(p_g + partial * BR * D + o_rd, mask=m, other=0)
            if p_u is not None:
                u += tl.load(p_u + partial * BR * D + o_rd, mask=m, other=0)
            if p_s is not None:
                s += tl.load(p_s + partial * BR + o_r)
        if p_dgamma is not None or p_dbeta is not None:
            wd = tl.load(p_wd + o_wd, mask=m, other=0).to(tl.float32)
            dgamma += tl.sum(g * wd, 0)
            dbeta += tl.sum(s[:, None] * wd, 0)
        if p_dwd is not None:
            dwd = g * gamma[None, :] + s[:, None] * beta[None, :]
            tl.store(p_dwd + o_wd, narrow(dwd, p_dwd.dtype.element_ty), mask=m)
        if p_dbd is not None:  # noqa: SIM102
            if tl.program_id(0) == 0:
                tl.store(p_dbd + e * r + o_r, narrow(s, p_dbd.dtype.element_ty), mask=m_r)
        if p_dwu is not None:
            p_u_out = p_dwu + (e * d + o_d[:, None]) * r + o_r[None, :]
            tl.store(p_u_out, narrow(tl.trans(u), p_dwu.dtype.element_ty), mask=m_d[:, None] & m_r[None, :])
    if p_dgamma is not None:
        tl.store(p_dgamma + e * d + o_d, narrow(dgamma, p_dgamma.dtype.element_ty), mask=m_d)
    if p_dbeta is not None:
        tl.store(p_dbeta + e * d + o_d, narrow(dbeta, p_dbeta.dtype.element_ty), mask=m_d)
    if p_dbu is not None:
        dbu = tl.zeros((BD,), tl.float32)
        for k in range(0, shares):
            dbu += tl.load(p_dbias + (k * n + e) * D + o_d)
        tl.store(p_dbu + e * d + o_d, narrow(dbu, p_dbu.dtype.element_ty), mask=m_d)


def backward(
    dy: Tensor,
    x: Tensor,
    index: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    prepared: Prepared,
    weights: Sequence[Tensor],
    *,
    activation: str,
    precision: str,
    needed: Needed,
    x_free: bool,
    row_tiles: Tiles,
    tiles: Tiles,
    vec: int,
    sms: int | None = None,
) -> list[Tensor | None]:
    """Launch the backward for the gradients in ``needed``. ``dy`` (T, d) is dense; ``x`` (T, d) is y if ``x_free``."""
    T, d = dy.shape
    n, R, D = prepared.A.shape
    r = weights[2].shape[-2]
    sms = multiprocessors(dy.device) if sms is None else sms
    p = prepared

    with_g = needed.norm_weight or needed.down_weight
    with_s = needed.norm_bias or needed.down_weight or needed.down_bias
    with_dz = needed.x or with_g or with_s
    with_h = needed.up_weight or (x_free and (needed.x or with_g))
    dx = torch.empty_like(dy) if needed.x else None
    dz = dy.new_empty((T, R), dtype=z.dtype) if with_dz else None
    h = dy.new_empty((T, R), dtype=z.dtype) if with_h else None
    # One allocation each: a slice of a shared one would be aligned for some T only, which is another compiled variant.
    c1, c2 = (dy.new_empty(T, dtype=torch.float32) if with_dz else None for _ in range(2))

    order, bounds = sorted_by_adapter(index, n) if index is not None else (None, None)
    sequences = 1 if index is None else index.numel()
    S = T // sequences
    shape = {"d": d, "D": D, "BR": R, "PRECISION": precision}

    slices = ceil_div(d, tiles.BD)
    n_tiles = sequences * ceil_div(S, tiles.BT)
    shares = row_shares(slices * n, n_tiles, sms)

    def partial(wanted: bool, *size: int) -> Tensor | None:
        return dy.new_empty((shares, n, *size), dtype=torch.float32) if wanted else None

    g, u = partial(with_g, R, D), partial(needed.up_weight, R, D)
    s, dbias = partial(with_s, R), partial(needed.up_bias, D)

    passes = [(dx, g, s, u, dbias)]
    if R >= SEPARATE_UP and (needed.x or with_g) and needed.up_weight:
        passes = [(dx, g, s, None, None), (None, None, None, u, dbias)]

    # A chunk is a wave of (1)'s row tiles. Stacked adapters are walked in one: their rows lie in the order of `index`.
    ratio = max(row_tiles.BT, tiles.BT) // row_tiles.BT
    wave = ceil_div(sms, ratio) if index is None else n_tiles
    per_chunk = wave * max(row_tiles.BT, tiles.BT)
    for row0 in range(0, T, T if index is not None else per_chunk):
        rows = T - row0 if index is not None else min(per_chunk, T - row0)
        if with_dz or with_h:
            hidden(
                dy, index, z, p, dz, c1, c2, h, dx, row0=row0, rows=rows,
                activation=activation, precision=precision, tiles=row_tiles, sms=sms,
            )  # fmt: skip
        for outputs in passes:
            slice_kernel[(slices, shares, n)](
                dy, x, order, bounds, dz, h, mean, rstd, c1, c2, p.A, p.w_up, p.b_up, *outputs,
                row0 // tiles.BT, ceil_div(rows, tiles.BT), S, x.stride(0) // vec,
                VEC=vec, X_FREE=x_free, BT=tiles.BT, BD=tiles.BD,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages, **shape,
            )  # fmt: skip

    grads = [
        torch.empty(w.shape, dtype=w.dtype, device=w.device) if k else None
        for w, k in zip(weights, needed[1:], strict=True)
    ]
    if any(needed[1:]):
        block = 32
        reduce_kernel[(ceil_div(d, block), n)](
            g, s, u, dbias, *(w.contiguous() for w in weights[:3]), *grads, shares,
            d=d, r=r, D=D, BR=R, RB=16, BD=block, num_warps=2,
        )  # fmt: skip
    return [dx, *grads]


def sorted_by_adapter(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The sequences in order of their adapter (B,), those with none first, and where each adapter's begin (n + 1,)."""
    values, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(values, torch.arange(n + 1, device=index.device, dtype=index.dtype))
