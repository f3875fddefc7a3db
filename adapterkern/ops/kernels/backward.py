"""The adapter's backward in the closed form, from z (T×r), two row constants, and x or y.

    dh = dy·W_up      dz = dh ⊙ act'(z)      c1 = dz·rowsum(A)/d      c2 = Σᵣ(dz ⊙ (z − c))/d          (1)
    dx = dy + ρ(dz·A − c1 − x̂·c2)           Gᵀ = x̂ᵀ·dz               U  = dyᵀ·h                        (2)
    dW_down = G·diag(γ) + s·βᵀ   db_down = s = Σₜ dz   dγ = Σᵣ G ⊙ W_down   dβ = s·W_down               (3)
    dW_up = U                    db_up = Σₜ dy

One kernel per number. (1), in hidden.py: a program owns row tiles, reads dy once and stores dz and h, T×r each. (2), in
slice.py: a program owns a slice of d and a fixed share of the rows. It keeps its slice of A while x and dy stream
through, each once, and the fp32 sums of G and U stay in its registers until the end. (3) adds up the shares in their
order and turns them into gradients. LayerNorm's two row means are c1 and c2, so nothing of size T×d is read for them:
four units of T×d traffic in total (dy; dy, x, dx), where three is the floor.

Folded. In bf16, (1) stores the rounded ζ = ρ·dz instead of dz, and makes c1 and c2 from ζ (c2 times −ρ). With
x̂ = ρ(x − μ),

    dx = dy + ζ·A + (−c1 − μ·c2) + x·c2           Gᵀ = xᵀ·ζ − qᵀ        q = Σₜ μ·ζ                      (2')

so x and dy go from shared memory into the products without passing through registers: 20 instructions per element
instead of 52. This cancels where |μ| ≫ σ. So (1) stores each tile's largest (ρμ)², and if a row of an adapter's chunk
exceeds 16², the whole chunk uses the rounded x − μ in place of x (and no q), as it always does where x is recovered
from y. Not folded are fp16, whose range is too small for ρ·dz, and rows of another dtype than the products'.

dy's second read should hit L2. So (1) and (2) alternate over equal chunks of rows, at most one wave of row tiles each,
and (2) walks its rows backwards, the last written first. A share's sums carry over from chunk to chunk through its own
partial buffer, so the order of every addition is fixed and two runs agree to the bit.

A residual's gradient is dy, so that dx lacks it. A scale α is in W_up and b_up of (1), and in (3) dW_up = α·U,
db_up = α·Σₜ dy and dα = ⟨U, W_up⟩ + ⟨Σₜ dy, b_up⟩. Without LayerNorm, dz and x are what (2) and (3) have for ζ, A's
fold and x̂: no c1, no c2, no q.

Dropout and a gate are in (1) alone: h and dz are made with m/(1 − p), h is stored times g, so that U has g, and dz is
made of g·dh. In (2) g multiplies only b_up, if x is recovered, and dy in Σₜ g·dy. The gate's gradient is ⟨dh, h⟩, of
T×r numbers that (1) has, and ⟨dy, b_up⟩, which it sums while it reads dy.

x-free: given y in place of x, (2) recovers its slice of x as y − h·W_upᵀ − b_up. This takes one more product and no
more traffic.

Only requested results are computed: (1) does not run if nothing uses what it stores, and each output of (2) is a
compile-time switch.
"""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import clusters
from .cache import sorted_by_adapter
from .dropout import NO_DROPOUT, Dropout
from .hidden import Hidden, hidden
from .primitives import follow, narrow
from .rows import routing
from .slice import slice_kernel
from .tiles import Tiles, ceil_div, early_launch, multiprocessors, row_shares
from .weights import Prepared

# For R >= this, G and U are summed in two launches of (2), with one accumulator each. The registers saved make slices
# twice as wide, so dz and h are read half as often (2R·slices numbers per row: 8 units at R = 256 and 32 columns), for
# one more read of dy.
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
    scale: bool = False
    gate: bool = False

    # The sums that the gradients of the parameters are made of

    @property
    def g(self) -> bool:
        return self.norm_weight or self.down_weight

    def s(self, norm: bool) -> bool:
        return self.norm_bias or (self.down_weight and norm) or self.down_bias

    @property
    def u(self) -> bool:
        return self.up_weight or self.scale

    @property
    def dbias(self) -> bool:
        return self.up_bias or self.scale


@triton.jit(
    do_not_specialize=["shares"],
    do_not_specialize_on_alignment=["p_gamma", "p_beta", "p_wd", "p_wu", "p_bu", "p_scale"],
)
def reduce_kernel(
    p_g,  # (shares, n, R, D) fp32, or None
    p_s,  # (shares, n, R) fp32, or None
    p_q,  # (shares, n, R) fp32, or None
    p_u,  # (shares, n, R, D) fp32, or None
    p_dbias,  # (shares, n, D) fp32, or None
    p_gamma,  # (n, d), or None with the next: no LayerNorm
    p_beta,  # (n, d)
    p_wd,  # (n, r, d)
    p_wu,  # (n, d, r), or None with the next: no gradient of the scale
    p_bu,  # (n, d)
    p_scale,  # (n,), or None: 1
    p_dgamma,  # (n, d), or None, like each below
    p_dbeta,  # (n, d)
    p_dwd,  # (n, r, d)
    p_dbd,  # (n, r)
    p_dwu,  # (n, d, r)
    p_dbu,  # (n, d)
    p_dscale,  # (programs, n) fp32
    shares,
    d: tl.constexpr,
    r: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    PDL: tl.constexpr,
    RB: tl.constexpr,
    BD: tl.constexpr,
):
    follow(PDL)
    # A program owns BD columns of one adapter and goes over r in steps of RB. All that it needs is in those columns.
    n = tl.num_programs(1)
    e = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < d
    if p_gamma is not None:
        gamma = tl.load(p_gamma + e * d + o_d, mask=m_d, other=0).to(tl.float32)
        beta = tl.load(p_beta + e * d + o_d, mask=m_d, other=0).to(tl.float32)
    if p_scale is not None:
        scale = tl.load(p_scale + e).to(tl.float32)
    dscale = tl.zeros((BD,), tl.float32)
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
        q = tl.zeros((RB,), tl.float32)
        for k in range(0, shares):
            partial = k * n + e
            if p_g is not None:
                g += tl.load(p_g + partial * BR * D + o_rd, mask=m, other=0)
            if p_u is not None:
                u += tl.load(p_u + partial * BR * D + o_rd, mask=m, other=0)
            if p_s is not None:
                s += tl.load(p_s + partial * BR + o_r)
            if p_q is not None:
                q += tl.load(p_q + partial * BR + o_r)
        g -= q[:, None]
        if p_dgamma is not None or p_dbeta is not None:
            wd = tl.load(p_wd + o_wd, mask=m, other=0).to(tl.float32)
            dgamma += tl.sum(g * wd, 0)
            dbeta += tl.sum(s[:, None] * wd, 0)
        if p_dwd is not None:
            dwd = g
            if p_gamma is not None:
                dwd = g * gamma[None, :] + s[:, None] * beta[None, :]
            tl.store(p_dwd + o_wd, narrow(dwd, p_dwd.dtype.element_ty), mask=m)
        if p_dbd is not None:  # noqa: SIM102
            if tl.program_id(0) == 0:
                tl.store(p_dbd + e * r + o_r, narrow(s, p_dbd.dtype.element_ty), mask=m_r)
        o_wu = (e * d + o_d[:, None]) * r + o_r[None, :]
        m_wu = m_d[:, None] & m_r[None, :]
        if p_dscale is not None:
            dscale += tl.sum(tl.trans(u) * tl.load(p_wu + o_wu, mask=m_wu, other=0).to(tl.float32), 1)
        if p_scale is not None:
            u *= scale
        if p_dwu is not None:
            tl.store(p_dwu + o_wu, narrow(tl.trans(u), p_dwu.dtype.element_ty), mask=m_wu)
    if p_dgamma is not None:
        tl.store(p_dgamma + e * d + o_d, narrow(dgamma, p_dgamma.dtype.element_ty), mask=m_d)
    if p_dbeta is not None:
        tl.store(p_dbeta + e * d + o_d, narrow(dbeta, p_dbeta.dtype.element_ty), mask=m_d)
    if p_dbias is not None:
        dbu = tl.zeros((BD,), tl.float32)
        for k in range(0, shares):
            dbu += tl.load(p_dbias + (k * n + e) * D + o_d, mask=m_d, other=0)
        if p_dscale is not None:
            dscale += dbu * tl.load(p_bu + e * d + o_d, mask=m_d, other=0).to(tl.float32)
            tl.store(p_dscale + tl.program_id(0) * n + e, tl.sum(dscale, 0))
        if p_scale is not None:
            dbu *= scale
        if p_dbu is not None:
            tl.store(p_dbu + e * d + o_d, narrow(dbu, p_dbu.dtype.element_ty), mask=m_d)


def backward(
    dy: Tensor,
    x: Tensor,
    index: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    prepared: Prepared,
    weights: Sequence[Any],
    *,
    activation: str,
    precision: str,
    needed: Needed,
    x_free: bool,
    row_tiles: Tiles,
    tiles: Tiles,
    vec: int,
    pdl: bool,
    sms: int | None = None,
    residual: bool = False,
    scale: Tensor | None = None,
    gate: Tensor | None = None,
    drop: Dropout = NO_DROPOUT,
    by_clusters: bool = False,
) -> list[Tensor | None]:
    """Launch the backward for the gradients in ``needed``, of x, of each of ``weights`` and of a ``gate``.

    ``dy`` (T, d) is dense; ``x`` (T, d) is y if ``x_free``; ``residual``: the forward had one; ``scale`` is (n,), the
    gate (T,). ``by_clusters``: as clusters.py does, where it can.
    """
    T, d = dy.shape
    n, R, D = prepared.A.shape
    r = weights[2].shape[-2]
    plain = index is None and not (x_free or residual)
    if by_clusters and plain and clusters.fit_backward(dy, x, z, prepared, gate, drop.seed):
        dx = torch.empty_like(dy) if needed.x else None
        wanted = needed.g, needed.s(True), needed.g, needed.u, needed.dbias
        sums = clusters.backward(dy, x, z, mean, rstd, prepared, dx, wanted, r=r, activation=activation)
        return [dx, *_gradients(sums, weights, needed, D=D, R=R, scale=scale, pdl=pdl)]
    sms = multiprocessors(dy.device) if sms is None else sms
    p = prepared
    row_tiles = row_tiles.reading(x, vec, z.dtype, few=16 if R == 512 else 32)
    if R >= 128 and x.dtype != z.dtype:
        row_tiles = replace(row_tiles, registers=255)
    if index is not None:
        row_tiles = row_tiles.of_mixed_rows(R, z.dtype)
    tiles = tiles.reading(x, vec, z.dtype, few=16)

    norm = p.row_sums is not None
    mu, rho = (mean, rstd) if norm else (None, None)
    with_g, with_s, with_u = needed.g, needed.s(norm), needed.u
    with_dz = needed.x or with_g or with_s
    with_h = with_u or (x_free and (needed.x or with_g))
    folded = with_dz and norm and x.dtype == z.dtype == torch.bfloat16
    direct = folded and not x_free
    tiles = tiles.of_slices(
        R, x, z.dtype, norm=norm, x_free=x_free, folded=folded, reads_x=needed.x or with_g, mixed_rows=index is not None
    )

    of = routing(index, T, p.A, row_tiles.BT, sms)
    n_tiles, n_row_tiles = of.tiles(tiles.BT), of.tiles(row_tiles.BT)
    slices = ceil_div(d, tiles.BD)
    shares = row_shares(slices * n, n_tiles, sms)

    def empty(wanted: bool, *size: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return dy.new_empty(size, dtype=dtype) if wanted else None

    dx = torch.empty_like(dy) if needed.x else None
    # One allocation each: a slice of a shared one would be aligned only for some T, which compiles another variant.
    rows = Hidden(
        dz=empty(with_dz, T, R, dtype=z.dtype), c1=empty(with_dz and norm, T), c2=empty(with_dz and norm, T),
        h=empty(with_h, T, R, dtype=z.dtype), s=empty(with_s, n_row_tiles, R),
        q=empty(direct and with_g, n_row_tiles, R), worst=empty(folded, n_row_tiles),
        dgate=empty(needed.gate, T),
    )  # fmt: skip
    g, u = empty(with_g, shares, n, R, D), empty(with_u, shares, n, R, D)
    s, q = empty(with_s, shares, n, R), empty(direct and with_g, shares, n, R)
    dbias = empty(needed.dbias, shares, n, D)
    order, bounds = of.index, of.bounds
    if order is not None and bounds is None:
        order, bounds = sorted_by_adapter(order, n)
    shape = {"d": d, "D": D, "BR": R, "PRECISION": precision, "PDL": pdl}

    passes = [(dx, g, s, q, u, dbias)]
    if R >= SEPARATE_UP and (needed.x or with_g) and with_u:
        passes = [(dx, g, s, q, None, None), (None, None, None, None, u, dbias)]
    elif needed.gate and not any(needed[:-1]):
        passes = []

    for row0, chunk in _chunks(T, max(row_tiles.BT, tiles.BT), row_tiles.BT, sms) if index is None else [(0, T)]:
        hidden0, tile0 = row0 // row_tiles.BT, row0 // tiles.BT
        of_chunk = ceil_div(chunk, row_tiles.BT) if index is None else n_row_tiles
        if with_dz or with_h or needed.gate:
            hidden(
                dy, of, z, mu, rho, p, rows, dx, tile0=hidden0, n_tiles=of_chunk, residual=residual, gate=gate,
                drop=drop, activation=activation, precision=precision, tiles=row_tiles, sms=sms, pdl=pdl,
            )  # fmt: skip
        for i, outputs in enumerate(passes):
            after_ours = i > 0 or with_dz or with_h
            slice_kernel[(slices, shares, n)](
                dy, x, order, bounds, gate, rows.dz, rows.h, mu, rho, rows.c1, rows.c2, rows.s, rows.q, rows.worst,
                p.A, p.w_up, p.b_up, *outputs, tile0, ceil_div(chunk, tiles.BT), hidden0, of_chunk, of.S,
                x.stride(0) // vec, HIDDEN_BT=row_tiles.BT, VEC=vec, X_FREE=x_free, RESIDUAL=residual,
                SORTED=of.bounds is not None, **shape, **tiles.blocks, **tiles.options,
                **early_launch(pdl and after_ours),
            )  # fmt: skip

    grads = _gradients((g, s, q, u, dbias), weights, needed, D=D, R=R, scale=scale, pdl=pdl)
    return [dx, *grads] if gate is None else [dx, *grads, rows.dgate]


def _gradients(
    sums: Sequence[Tensor | None], weights: Sequence[Any], needed: Needed, *, D: int, R: int, scale: Tensor | None,
    pdl: bool,
) -> list[Tensor | None]:  # fmt: skip
    """(3), of the shares' ``sums``: g, s, q, u and dbias, as ``reduce_kernel`` takes them."""
    r, d = weights[2].shape[-2:]
    n = 1 if weights[2].dim() == 2 else len(weights[2])
    grads = [
        torch.empty(w.shape, dtype=w.dtype, device=w.device) if k else None
        for w, k in zip(weights[:6], needed[1:7], strict=True)
    ]
    block = 32
    blocks = ceil_div(d, block)
    dscale = weights[2].new_empty((blocks, n), dtype=torch.float32) if needed.scale else None
    if any(needed[1:-1]):
        shares = next(len(t) for t in sums if t is not None)
        read = (*weights[:3], *(weights[4:6] if needed.scale else (None, None)))
        reduce_kernel[(blocks, n)](
            *sums, *(w if w is None else w.contiguous() for w in read), scale, *grads, dscale, shares,
            d=d, r=r, D=D, BR=R, PDL=pdl, RB=min(R, 128), BD=block,
            num_warps=min(8, R // 8), maxnreg=255, **early_launch(pdl),
        )  # fmt: skip
    if len(weights) > 6:
        grads.append(None if dscale is None else dscale.sum(0).to(weights[6].dtype).view(weights[6].shape))
    return grads


def _chunks(T: int, unit: int, row_tile: int, sms: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of equal chunks in multiples of ``unit``, of at most one wave of row tiles each."""
    count = ceil_div(T, sms * row_tile)
    size = ceil_div(ceil_div(T, unit), count) * unit
    return ((row0, min(size, T - row0)) for row0 in range(0, T, size))
