"""The adapter's forward: statistics, down projection, activation, up projection and residual.

    μ, σ² = mean, variance of a row       ρ = 1/√(σ² + eps)
    z = ρ((x − s)·Aᵀ − (μ − s)·rowsum(A)) + c        h = act(z)        y = x + h·W_upᵀ + b_up

A, rowsum(A) and c fold LayerNorm into the projection (see weights.py), and W_up and b_up a scale. Without LayerNorm
z = x·Aᵀ + c. A residual takes the place of x in the sum, and of its second read. Dropout multiplies h by m/(1 − p), and
a gate g multiplies h, before it is rounded, and b_up: nothing per element of x but one product for the bias.

16-bit rows go into the product unchanged, with Σx and Σx² summed beside it, in each thread separately until the end.
The variance is then right to 256·2⁻²⁴ as long as no row's mean exceeds 16 deviations. A tile with a row beyond that is
computed the shifted way, and so is every row of another dtype than the product's: block by block with Chan's update,
where neither a large mean nor a large channel cancels. This takes 510 instructions per 64×64 block instead of 230.

s is a constant of the row: 0, or the mean of the first block, rounded to x's dtype, where that mean exceeds 4
deviations. Without it a row with σ ≈ 0 loses all accuracy (ρ reaches 1/√eps = 316, and fp32 accumulation leaves an
error of 316·μ·2⁻²⁴·√d), and an fp32 row that is rounded to bf16 for the product loses σ/μ. With it such rows are exact:
numbers of one binade differ by a number that their own dtype holds.

A program owns a row tile and goes over d twice, up and then down again, since the columns read last are most likely
still in L2. Loads: x twice, A and W_up once per row tile, all asynchronous and some blocks ahead (``tl.range``
pipelines also loads that feed no product). Stores: y, and for the backward z (T×r, rounded to the compute dtype; h is
act of the rounded z) and two fp32 row constants.

Where row tiles are too few to fill the device (decoding), two launches share each tile's columns: the first stores
partial products and statistics of its columns in fp32; the second adds them up, in order, and emits its columns of y.
Programs that share a tile share its s, so they choose the way by s: where the first block needs none, no row's mean²
exceeds about d/4 times its variance.
"""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import clusters
from .dropout import NO_DROPOUT, Dropout, kept
from .norm import Following
from .norm import norm as make_norm
from .primitives import activate, dot, end_of, follow, narrow, partial_stages
from .projection import block_moments, merge, project, project_plain, project_raw, row_shift
from .rows import routing, rows_of
from .tiles import Tiles, column_split, early_launch, multiprocessors
from .weights import Prepared


@triton.jit
def _emit(p_rows, p_out, p_w, p_bias, p_gate, h, i_t, m_t, lo, blocks, d: tl.constexpr, BR: tl.constexpr,
          BD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """y = x + h·W_upᵀ + g·b_up over BD·blocks columns from lo, last column first; x or the residual is at p_rows."""
    o_r = tl.arange(0, BR)
    if p_gate is not None:
        gate = tl.load(p_gate + i_t, mask=m_t, other=0)
    for i in tl.range(0, blocks, num_stages=STAGES):
        o_d = lo + (blocks - 1 - i) * BD + tl.arange(0, BD)
        m = m_t[:, None] & (o_d < d)[None, :]
        b_x = tl.load(p_rows + o_d[None, :], mask=m, other=0)
        b_w = tl.load(p_w + o_d[None, :] * BR + o_r[:, None])
        bias = tl.load(p_bias + o_d)[None, :]
        if p_gate is not None:
            bias = gate[:, None] * bias
        y = b_x.to(tl.float32) + bias
        y = dot(h, b_w, y, PRECISION)
        tl.store(p_out + o_d[None, :], narrow(y, b_x.dtype), mask=m)


@triton.jit
def _hidden(acc, shift, mean, m2, p_asum, p_c, eps, d: tl.constexpr, BR: tl.constexpr, COMPUTE: tl.constexpr):
    o_r = tl.arange(0, BR)
    if p_asum is None:
        rstd = mean  # neither is kept
        z = acc + tl.load(p_c + o_r)[None, :]
    else:
        rstd = 1 / tl.sqrt(m2 / d + eps)
        acc = rstd[:, None] * (acc - (mean - shift)[:, None] * tl.load(p_asum + o_r)[None, :])
        z = acc + tl.load(p_c + o_r)[None, :]
    return narrow(z, COMPUTE), rstd


@triton.jit
def _branch(z, p_gate, p_seed, threshold, factor, i_t, m_t, BT: tl.constexpr, BR: tl.constexpr, ACT: tl.constexpr):
    """g·h, rounded as z is."""
    if p_seed is not None:
        keep = kept(p_seed, threshold, i_t, BT, BR)
    h = activate(z.to(tl.float32), ACT)
    if p_seed is not None:
        h = tl.where(keep, h * factor, 0.0)
    if p_gate is not None:
        h *= tl.load(p_gate + i_t, mask=m_t, other=0)[:, None]
    return narrow(h, z.dtype)


@triton.jit
def _save(p_z, p_mean, p_rstd, z, mean, rstd, i_t, m_t, r: tl.constexpr, BR: tl.constexpr):
    o_r = tl.arange(0, BR)
    tl.store(p_z + i_t[:, None] * r + o_r[None, :], z, mask=m_t[:, None] & (o_r < r)[None, :])
    if p_mean is not None:
        tl.store(p_mean + i_t, mean, mask=m_t)
        tl.store(p_rstd + i_t, rstd, mask=m_t)


@triton.jit
def _copy(p_from, p_to, m_t, p_bounds, lo, blocks, d: tl.constexpr, BD: tl.constexpr):
    if p_bounds is not None:
        blocks *= tl.max(m_t.to(tl.int32), 0)  # a tile may have no rows
    for i in range(0, blocks):
        o_d = lo + i * BD + tl.arange(0, BD)
        m = m_t[:, None] & (o_d < d)[None, :]
        tl.store(p_to + o_d[None, :], tl.load(p_from + o_d[None, :], mask=m), mask=m)


@triton.jit(
    do_not_specialize=["S", "stride", "residual_stride", "eps", "threshold", "factor"],
    do_not_specialize_on_alignment=["p_index", "p_bounds", "p_gate", "p_seed"],
)
def forward_kernel(
    p_x,  # (T, d), rows `stride`·VEC apart
    p_residual,  # (T, d), rows `residual_stride`·VEC apart, or None with that stride: x
    p_index,  # (T/S,) adapter of each sequence, or None; with p_bounds (T,) rows sorted by adapter: see rows.py
    p_bounds,  # (n + 1,) where each adapter's begin in p_index, or None
    p_gate,  # (T,) fp32, or None: 1
    p_seed,  # (1,) int64, or None, as threshold and factor are then: no dropout
    p_a,  # (n, R, D)
    p_asum,  # (n, R), or None, as p_mean and p_rstd are then: no LayerNorm
    p_c,  # (n, R)
    p_w,  # (n, D, R)
    p_bias,  # (n, D)
    p_y,  # (T, d)
    p_z,  # (T, r), or None with the next two
    p_mean,  # (T,)
    p_rstd,  # (T,)
    S,
    stride,
    residual_stride,
    eps,
    threshold,
    factor,
    d: tl.constexpr,
    r: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    follow(PDL)
    PLAIN: tl.constexpr = p_x.dtype.element_ty == p_a.dtype.element_ty and p_a.dtype.element_ty != tl.float32
    e, i_t, m_t = rows_of(tl.program_id(0), p_index, p_bounds, S, BT)
    p_rows = p_x + i_t[:, None] * stride * VEC
    p_out = p_y + i_t[:, None] * d
    p_base = p_rows
    if p_residual is not None:
        p_base = p_residual + i_t[:, None] * residual_stride * VEC
    end = end_of(d, PLAIN)
    blocks = tl.cdiv(end, BD)
    zero = tl.zeros((BT,), tl.float32)
    if e < 0:
        _copy(p_base, p_out, m_t, p_bounds, 0, blocks, d, BD)
        if p_z is not None:
            _save(p_z, p_mean, p_rstd, tl.zeros((BT, BR), p_z.dtype.element_ty), zero, zero, i_t, m_t, r, BR)
    else:
        p_a += e * BR * D
        p_w += e * BR * D
        shift = zero
        if p_asum is None:
            mean, m2 = zero, zero
            acc = project_raw(p_rows, p_a, m_t, 0, end, d, D, BT, BR, BD, PRECISION, STAGES)
        elif PLAIN:
            acc, mean, m2 = project_plain(p_rows, p_a, m_t, 0, end, d, D, BT, BR, BD, PRECISION, STAGES)
            if tl.max(tl.where(mean * mean <= 256 * (m2 / d), 0, 1), 0) > 0:  # a NaN counts
                acc, shift, mean, m2 = project(p_rows, p_a, m_t, zero, 0, end, d, D, BT, BR, BD, PRECISION, STAGES)
        else:
            acc, shift, mean, m2 = project(p_rows, p_a, m_t, zero, 0, end, d, D, BT, BR, BD, PRECISION, STAGES)
        if p_asum is not None:
            p_asum += e * BR
        z, rstd = _hidden(acc, shift, mean, m2, p_asum, p_c + e * BR, eps, d, BR, p_a.dtype.element_ty)
        if p_z is not None:
            _save(p_z, p_mean, p_rstd, z, mean, rstd, i_t, m_t, r, BR)
        h = _branch(z, p_gate, p_seed, threshold, factor, i_t, m_t, BT, BR, ACT)
        _emit(p_base, p_out, p_w, p_bias + e * D, p_gate, h, i_t, m_t, 0, blocks, d, BR, BD, PRECISION, STAGES)


@triton.jit(
    do_not_specialize=["T", "S", "stride", "width"],
    do_not_specialize_on_alignment=["p_index", "p_bounds"],
)
def forward_partial_kernel(
    p_x,  # (T, d), rows `stride`·VEC apart
    p_index,  # (T/S,) or None
    p_bounds,  # (n + 1,) or None
    p_a,  # (n, R, D)
    p_acc,  # (splits, T, R) fp32
    p_moments,  # (splits, 3, T) fp32: s, mean, squared deviations; or None: no LayerNorm
    T,
    S,
    stride,
    width,
    d: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    # One of `splits` programs of a row tile: columns lo … lo + width·BD.
    follow(PDL)
    PLAIN: tl.constexpr = p_x.dtype.element_ty == p_a.dtype.element_ty and p_a.dtype.element_ty != tl.float32
    e, i_t, m_t = rows_of(tl.program_id(0), p_index, p_bounds, S, BT)
    split = tl.program_id(1).to(tl.int64)
    p_rows = p_x + i_t[:, None] * stride * VEC
    if e >= 0:
        lo = tl.program_id(1) * width * BD
        hi = tl.minimum(lo + width * BD, d)
        p_a += e * BR * D
        if p_moments is not None:
            o_d = tl.arange(0, BD)
            m_d = o_d < d
            b_x = tl.load(p_rows + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0)
            FIRST: tl.constexpr = min(BD, d) * 1.0
            mean, m2 = block_moments(b_x.to(tl.float32), m_d, FIRST)
            shift = row_shift(mean, m2, FIRST, b_x.dtype)
        if p_moments is None:
            acc = project_raw(p_rows, p_a, m_t, lo, hi, d, D, BT, BR, BD, PRECISION, STAGES)
        elif PLAIN:
            # Every split of a tile chooses the same, because they share s. The bound keeps Σx² finite.
            if tl.max(tl.where((shift == 0) & (m2 + mean * mean * FIRST < 1e30), 0, 1), 0) == 0:
                acc, mean, m2 = project_plain(p_rows, p_a, m_t, lo, hi, d, D, BT, BR, BD, PRECISION, STAGES)
            else:
                acc, shift, mean, m2 = project(p_rows, p_a, m_t, shift, lo, hi, d, D, BT, BR, BD, PRECISION, STAGES)
        else:
            acc, shift, mean, m2 = project(p_rows, p_a, m_t, shift, lo, hi, d, D, BT, BR, BD, PRECISION, STAGES)
        o_r = tl.arange(0, BR)
        tl.store(p_acc + ((split * T + i_t) * BR)[:, None] + o_r[None, :], acc, mask=m_t[:, None])
        if p_moments is not None:
            p_m = p_moments + split * 3 * T + i_t
            tl.store(p_m, shift, mask=m_t)
            tl.store(p_m + T, mean, mask=m_t)
            tl.store(p_m + 2 * T, m2, mask=m_t)


@triton.jit(
    do_not_specialize=["T", "S", "stride", "eps", "splits", "width", "threshold", "factor"],
    do_not_specialize_on_alignment=["p_index", "p_bounds", "p_gate", "p_seed"],
)
def forward_finish_kernel(
    p_x,  # (T, d), rows `stride`·VEC apart: x, or the residual
    p_index,  # (T/S,) or None
    p_bounds,  # (n + 1,) or None
    p_gate,  # (T,) fp32, or None
    p_seed,  # (1,) int64, or None with threshold and factor
    p_acc,  # (splits, T, R) fp32
    p_moments,  # (splits, 3, T) fp32, or None, as p_asum is then
    p_asum,  # (n, R)
    p_c,  # (n, R)
    p_w,  # (n, D, R)
    p_bias,  # (n, D)
    p_y,  # (T, d)
    p_z,  # (T, r), or None with the next two
    p_mean,  # (T,)
    p_rstd,  # (T,)
    T,
    S,
    stride,
    eps,
    splits,
    width,
    threshold,
    factor,
    d: tl.constexpr,
    r: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    follow(PDL)
    e, i_t, m_t = rows_of(tl.program_id(0), p_index, p_bounds, S, BT)
    split = tl.program_id(1)
    lo = split * width * BD
    blocks = tl.cdiv(tl.minimum(lo + width * BD, d) - lo, BD)
    p_rows = p_x + i_t[:, None] * stride * VEC
    p_out = p_y + i_t[:, None] * d
    o_r = tl.arange(0, BR)
    zero = tl.zeros((BT,), tl.float32)
    if e < 0:
        _copy(p_rows, p_out, m_t, p_bounds, lo, blocks, d, BD)
        if p_z is not None:  # noqa: SIM102 - joined by `and`, None is not seen at compile time
            if split == 0:
                _save(p_z, p_mean, p_rstd, tl.zeros((BT, BR), p_z.dtype.element_ty), zero, zero, i_t, m_t, r, BR)
    else:
        acc = tl.zeros((BT, BR), tl.float32)
        mean, m2 = zero, zero
        count = 0.0
        shift = zero
        if p_moments is not None:
            shift = tl.load(p_moments + i_t, mask=m_t, other=0)  # the same in every split
        for k in tl.range(0, splits, num_stages=partial_stages(STAGES, BT, BR)):
            row = tl.cast(k, tl.int64) * T + i_t
            acc += tl.load(p_acc + (row * BR)[:, None] + o_r[None, :], mask=m_t[:, None], other=0)
            if p_moments is not None:
                p_m = p_moments + tl.cast(k, tl.int64) * 3 * T + i_t
                columns = tl.minimum(d - k * width * BD, width * BD).to(tl.float32)
                mean_n, m2_n = tl.load(p_m + T, mask=m_t, other=0), tl.load(p_m + 2 * T, mask=m_t, other=0)
                count, mean, m2 = merge(count, mean, m2, columns, mean_n, m2_n)
        if p_asum is not None:
            p_asum += e * BR
        z, rstd = _hidden(acc, shift, mean, m2, p_asum, p_c + e * BR, eps, d, BR, p_w.dtype.element_ty)
        if p_z is not None:  # noqa: SIM102 - joined by `and`, None is not seen at compile time
            if split == 0:
                _save(p_z, p_mean, p_rstd, z, mean, rstd, i_t, m_t, r, BR)
        h = _branch(z, p_gate, p_seed, threshold, factor, i_t, m_t, BT, BR, ACT)
        _emit(
            p_rows, p_out, p_w + e * BR * D, p_bias + e * D, p_gate, h, i_t, m_t, lo, blocks, d, BR, BD, PRECISION,
            STAGES,
        )  # fmt: skip


def forward(
    x: Tensor,
    index: Tensor | None,
    prepared: Prepared,
    *,
    r: int,
    eps: float,
    activation: str,
    precision: str,
    save: bool,
    tiles: Tiles,
    vec: int,
    pdl: bool,
    sms: int | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    drop: Dropout = NO_DROPOUT,
    by_clusters: bool = False,
    following: Following | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the forward on rows ``x`` (T, d), T ≥ 1: y, z, mean, rstd, the last three None unless ``save``.

    Without LayerNorm mean and rstd are always None. ``gate`` is (T,), fp32. ``by_clusters``: as clusters.py does,
    where it can. A norm that is ``following`` is made, too.
    """
    T, d = x.shape
    p, compute = prepared, prepared.A.dtype
    D, R = p.A.shape[2], p.A.shape[1]
    norm, both = p.row_sums is not None, gate is not None and drop.seed is not None
    tiles = tiles.of_forward(R, x, vec, compute, norm=norm, mixed_rows=index is not None, gate_and_dropout=both)
    sms = multiprocessors(x.device) if sms is None else sms
    of = routing(index, T, p.A, tiles.BT, sms)
    if by_clusters and clusters.fit(x, p, of, residual, gate, drop.seed):
        return clusters.forward(x, of, p, r=r, eps=eps, activation=activation, save=save, following=following)
    n_tiles = of.tiles(tiles.BT)
    splits, width = column_split(n_tiles, min(of.S, tiles.BT), d, R, tiles.BD, sms, reads=2)

    y = x.new_empty((T, d))
    z = x.new_empty((T, r), dtype=compute) if save else None
    mean = x.new_empty(T, dtype=torch.float32) if save and norm else None
    rstd = torch.empty_like(mean) if mean is not None else None
    shape = {"d": d, "D": D, "BR": R, "VEC": vec, "PRECISION": precision, "PDL": pdl, **tiles.blocks}
    how = tiles.options
    stride = x.stride(0) // vec
    base, base_stride = (x, stride) if residual is None else (residual, residual.stride(0) // vec)
    if splits == 1:
        own_stride = None if residual is None else base_stride
        forward_kernel[(n_tiles,)](
            x, residual, of.index, of.bounds, gate, drop.seed, p.A, p.row_sums, p.c, p.w_up, p.b_up, y, z, mean, rstd,
            of.S, stride, own_stride, eps, drop.threshold, drop.factor, r=r, ACT=activation, **shape, **how,
        )  # fmt: skip
        if following is not None:
            make_norm(y, following, pdl=pdl)
        return y, z, mean, rstd
    acc = x.new_empty((splits, T, R), dtype=torch.float32)
    moments = x.new_empty((splits, 3, T), dtype=torch.float32) if norm else None
    grid = (n_tiles, splits)
    # Left to ptxas 64 registers and 16 bytes of stack on sm_100, for programs that have no room in shared memory there.
    cast = R == 64 and not norm and x.dtype != compute
    partly = replace(tiles, registers=255).options if cast else how
    forward_partial_kernel[grid](x, of.index, of.bounds, p.A, acc, moments, T, of.S, stride, width, **shape, **partly)
    forward_finish_kernel[grid](
        base, of.index, of.bounds, gate, drop.seed, acc, moments, p.row_sums, p.c, p.w_up, p.b_up, y, z, mean, rstd,
        T, of.S, base_stride, eps, splits, width, drop.threshold, drop.factor,
        r=r, ACT=activation, **shape, **how, **early_launch(pdl),
    )  # fmt: skip
    if following is not None:
        make_norm(y, following, pdl=pdl)
    return y, z, mean, rstd
