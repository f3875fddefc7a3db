"""The second of the backward's three kernels: dx and the sums G and U, from one read of x and dy. See backward.py.

A program owns BD columns and every shares-th row tile. There are three walks over its rows: folded and direct, where x
and dy go from shared memory into the products; folded but centered, where a row's mean exceeds 16 deviations or x is
recovered from y; and the plain equations, for fp16, fp32 and mixed dtypes. Without LayerNorm, dx = dy + dz·A and
G = dzᵀ·x, and a walk is direct where x has the products' dtype. With a residual dx lacks dy.
"""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
import triton
import triton.language as tl

from .primitives import dot, follow, narrow, settled
from .rows import first_tile, rows_at, tile_rows


@triton.jit
def _outer(h, x, acc, PRECISION: tl.constexpr):
    """acc + hᵀ·x, (R, BD), or its transpose where acc has that shape."""
    if acc.shape[0] == h.shape[1]:
        return dot(tl.trans(h), x, acc, PRECISION)
    else:
        return dot(tl.trans(x), h, acc, PRECISION)


@triton.jit
def _walk(
    p_dy, p_x, p_order, p_gate, p_dz, p_h, p_mean, p_rstd, p_c1, p_c2, p_dx,
    b_a, b_w, bias, g, u, dbias, o_d, begin, end, first, last, S, stride,
    d: tl.constexpr, BR: tl.constexpr, VEC: tl.constexpr, X_FREE: tl.constexpr, PRECISION: tl.constexpr,
    G: tl.constexpr, U: tl.constexpr, DBIAS: tl.constexpr, FOLDED: tl.constexpr, DIRECT: tl.constexpr,
    RESIDUAL: tl.constexpr, SORTED: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk a share of the row tiles first … last, backwards: store dx, and add to g (G), u (Uᵀ) and dbias (Σₜ g·dy).

    SORTED: they are tiles of the rows at the places begin … end of p_order.
    """
    DX: tl.constexpr = p_dx is not None
    RAW: tl.constexpr = p_mean is None
    o_r = tl.arange(0, BR)
    m_d = o_d < d
    share, shares = tl.program_id(1), tl.num_programs(1)
    if DBIAS:
        b_sum = tl.zeros((BT, BD), tl.float32)
    for i in tl.range(0, tl.cdiv(last - first - share, shares), num_stages=STAGES):
        tile = last - 1 - share - i * shares
        if SORTED:
            i_t, m_t = rows_at(p_order, begin + tile * BT + tl.arange(0, BT), end)
        else:
            position, i_t, m_t = tile_rows(tile, S, BT)
            if p_order is not None:
                i_t += (tl.load(p_order + position).to(tl.int64) - position) * S
        m = m_t[:, None] & m_d[None, :]
        o_tr = i_t[:, None] * BR + o_r[None, :]
        if U or DBIAS or (DX and not RESIDUAL):
            b_dy = tl.load(p_dy + i_t[:, None] * d + o_d[None, :], mask=m, other=0)
            dy = b_dy.to(tl.float32)
        if DX or G:
            b_dz = tl.load(p_dz + o_tr, mask=m_t[:, None], other=0)
        if G or (DX and not RAW):
            b_x = tl.load(p_x + i_t[:, None] * stride * VEC + o_d[None, :], mask=m, other=0)
        if (DX or G) and not RAW:
            mean = tl.load(p_mean + i_t, mask=m_t, other=0)
        if U or (X_FREE and (DX or G)):
            b_h = tl.load(p_h + o_tr, mask=m_t[:, None], other=0)
        if p_gate is not None and (DBIAS or (X_FREE and (DX or G))):
            gate = tl.load(p_gate + i_t, mask=m_t, other=0)
        if DX and not RAW:
            c1 = tl.load(p_c1 + i_t, mask=m_t, other=0)
            c2 = tl.load(p_c2 + i_t, mask=m_t, other=0)
        if (DX and not RAW) or (G and not DIRECT):
            x = b_x.to(tl.float32)
            if X_FREE:
                b_bias = bias[None, :]
                if p_gate is not None:
                    b_bias = gate[:, None] * b_bias
                x -= b_bias
                x -= dot(b_h, b_w, tl.zeros((BT, BD), tl.float32), PRECISION)
                x = narrow(x, b_x.dtype).to(tl.float32)
            if not (DIRECT or RAW):
                x -= mean[:, None]
            if not (FOLDED or RAW):
                rstd = tl.load(p_rstd + i_t, mask=m_t, other=0)
                x *= rstd[:, None]
        if DX:
            own = tl.zeros((BT, BD), tl.float32) if RESIDUAL else dy
            if RAW:
                dx = dot(b_dz, b_a, own, PRECISION)
            elif DIRECT:
                dx = dot(b_dz, b_a, own + (-c1 - mean * c2)[:, None] + x * c2[:, None], PRECISION)
            elif FOLDED:
                dx = dot(b_dz, b_a, own - c1[:, None] + x * c2[:, None], PRECISION)
            else:
                t = dot(b_dz, b_a, tl.zeros((BT, BD), tl.float32), PRECISION)
                dx = own + rstd[:, None] * (t - c1[:, None] - x * c2[:, None])
            tl.store(p_dx + i_t[:, None] * d + o_d[None, :], narrow(dx, p_dx.dtype.element_ty), mask=m)
        if G:
            g = _outer(b_dz, b_x if DIRECT else narrow(x, b_dz.dtype), g, PRECISION)
            if not U:
                g = settled(g)
        if U:
            u = settled(_outer(b_h, b_dy if b_dy.dtype == b_h.dtype else narrow(dy, b_h.dtype), u, PRECISION))
        if DBIAS:
            if p_gate is not None:
                dy *= gate[:, None]
            b_sum += dy
    if DBIAS:
        dbias += tl.sum(b_sum, 0)
    return g, u, dbias


@triton.jit
def _hidden_tile(i, p_order, per_sequence):
    """The number of the i-th row tile of (1), counting the sequences in p_order's order and the tiles within each."""
    tile = i.to(tl.int64)
    if p_order is not None:
        position = i // per_sequence
        tile += (tl.load(p_order + position).to(tl.int64) - position) * per_sequence
    return tile


@triton.jit
def _may_go_direct(p_worst, p_order, lo, hi, per_sequence):
    """Whether no row of (1)'s tiles lo … hi has a mean above 16 deviations, the forward's bound."""
    worst = tl.zeros((256,), tl.float32)
    for o in range(lo, hi, 256):
        i = o + tl.arange(0, 256)
        m_i = i < hi
        tile = _hidden_tile(tl.where(m_i, i, lo), p_order, per_sequence)
        value = tl.load(p_worst + tile, mask=m_i, other=0)
        worst = tl.where(value <= 256.0, worst, 1.0)  # a NaN counts as large
    return tl.max(worst, 0) == 0


@triton.jit
def _add_tiles(p_tiles, p_order, total, lo, hi, per_sequence, BR: tl.constexpr):
    """total (R,) plus this share's part of the sums that (1) stored for its tiles lo … hi, in their order."""
    BLOCK: tl.constexpr = 32
    o_r = tl.arange(0, BR)
    share, shares = tl.program_id(1), tl.num_programs(1)
    for o in range(lo + share, hi, BLOCK * shares):
        i = o + tl.arange(0, BLOCK) * shares
        m_i = i < hi
        tile = _hidden_tile(tl.where(m_i, i, lo), p_order, per_sequence)
        total += tl.sum(tl.load(p_tiles + tile[:, None] * BR + o_r[None, :], mask=m_i[:, None], other=0), 0)
    return total


@triton.jit(
    do_not_specialize=["tile0", "tiles", "hidden0", "hidden_tiles", "S", "stride"],
    do_not_specialize_on_alignment=["p_order", "p_bounds", "p_gate"],
)
def slice_kernel(
    p_dy,  # (T, d) contiguous
    p_x,  # (T, d), rows `stride`·VEC apart; y if X_FREE
    p_order,  # (T/S,) sequences sorted by adapter, (T,) rows if SORTED, or None
    p_bounds,  # (n + 1,) where each adapter's begin in p_order
    p_gate,  # (T,) fp32, or None: 1
    p_dz,  # (T, R)
    p_h,  # (T, R), times the gate
    p_mean,  # (T,), or None with the next three: no LayerNorm
    p_rstd,  # (T,)
    p_c1,  # (T,)
    p_c2,  # (T,)
    p_s_tiles,  # (hidden tiles, R) fp32, or None
    p_q_tiles,  # (hidden tiles, R) fp32, or None
    p_worst,  # (hidden tiles,) fp32, or None: not folded
    p_a,  # (n, R, D)
    p_w,  # (n, D, R)
    p_bias,  # (n, D)
    p_dx,  # (T, d), or None
    p_g,  # (shares, n, R, D) fp32, or None
    p_s,  # (shares, n, R) fp32, or None
    p_q,  # (shares, n, R) fp32, or None
    p_u,  # (shares, n, R, D) fp32, or None
    p_dbias,  # (shares, n, D) fp32, or None
    tile0,
    tiles,
    hidden0,
    hidden_tiles,
    S,
    stride,
    d: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    HIDDEN_BT: tl.constexpr,
    VEC: tl.constexpr,
    X_FREE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SORTED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    follow(PDL)
    DX: tl.constexpr = p_dx is not None
    G: tl.constexpr = p_g is not None
    U: tl.constexpr = p_u is not None
    DBIAS: tl.constexpr = p_dbias is not None
    NO_X: tl.constexpr = not (DX or G)
    FOLDED: tl.constexpr = p_worst is not None
    MAY_GO: tl.constexpr = FOLDED and not X_FREE and not NO_X
    RAW: tl.constexpr = p_mean is None and not X_FREE and p_x.dtype.element_ty == p_a.dtype.element_ty
    SAFE_BT: tl.constexpr = min(BT, 32)  # what fits in registers if x goes through them
    share = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    o_rd = o_r[:, None] * D + o_d[None, :]
    tl.static_assert(BR >= 64 or BR != BD, "the sums' shape tells how they lie")
    o_sum = o_rd
    if BR < 64:  # too few rows for a warp-group product: the sums are transposed
        o_sum = o_r[None, :] * D + o_d[:, None]
    partial = share * tl.num_programs(2) + e
    b_a, b_w, bias = 0, 0, 0
    if DX:
        b_a = tl.load(p_a + e * BR * D + o_rd)
    if X_FREE and (DX or G):
        b_w = tl.load(p_w + e * BR * D + o_d[None, :] * BR + o_r[:, None])
        bias = tl.load(p_bias + e * D + o_d)

    # Sums start from zero in the first chunk, and after it from what the previous chunk stored.
    later = tile0 > 0
    g, u, dbias = 0, 0, 0
    if G:
        g = tl.load(p_g + partial * BR * D + o_sum, mask=tl.broadcast_to(later, o_sum.shape), other=0)
    if U:
        u = tl.load(p_u + partial * BR * D + o_sum, mask=tl.broadcast_to(later, o_sum.shape), other=0)
    if DBIAS:
        dbias = tl.load(p_dbias + partial * D + o_d, mask=tl.broadcast_to(later, o_d.shape), other=0)

    first, last = tile0, tile0 + tiles
    safe_first, safe_last = first * (BT // SAFE_BT), tl.minimum(last * (BT // SAFE_BT), tl.cdiv(S, SAFE_BT))
    per_sequence = tl.cdiv(S, HIDDEN_BT)
    lo, hi = hidden0, hidden0 + hidden_tiles
    begin, end = 0, 0
    if SORTED:
        begin, end = tl.load(p_bounds + e).to(tl.int32), tl.load(p_bounds + e + 1).to(tl.int32)
        first, last = 0, tl.cdiv(end - begin, BT)
        safe_first, safe_last = 0, tl.cdiv(end - begin, SAFE_BT)
        lo = first_tile(begin, tl.program_id(2) + 1, HIDDEN_BT)
        hi = lo + tl.cdiv(end - begin, HIDDEN_BT)
    elif p_order is not None:
        begin, end = tl.load(p_bounds + e).to(tl.int32), tl.load(p_bounds + e + 1).to(tl.int32)
        first, last = begin * tl.cdiv(S, BT), end * tl.cdiv(S, BT)
        safe_first, safe_last = begin * tl.cdiv(S, SAFE_BT), end * tl.cdiv(S, SAFE_BT)
        lo, hi = begin * per_sequence, end * per_sequence
    p_tiles = None if SORTED else p_order  # what orders the tiles of (1)
    direct = NO_X or RAW  # a value of the running kernel, so that both branches below are compiled
    if MAY_GO:
        direct = _may_go_direct(p_worst, p_tiles, lo, hi, per_sequence)
    if direct:
        g, u, dbias = _walk(
            p_dy, p_x, p_order, p_gate, p_dz, p_h, p_mean, p_rstd, p_c1, p_c2, p_dx,
            b_a, b_w, bias, g, u, dbias, o_d, begin, end, first, last, S, stride,
            d, BR, VEC, X_FREE, PRECISION, G, U, DBIAS, FOLDED, MAY_GO or RAW, RESIDUAL, SORTED,
            BT, BD, STAGES,
        )  # fmt: skip
    else:
        g, u, dbias = _walk(
            p_dy, p_x, p_order, p_gate, p_dz, p_h, p_mean, p_rstd, p_c1, p_c2, p_dx,
            b_a, b_w, bias, g, u, dbias, o_d, begin, end, safe_first, safe_last, S, stride,
            d, BR, VEC, X_FREE, PRECISION, G, U, DBIAS, FOLDED, False, RESIDUAL, SORTED,
            SAFE_BT, BD, STAGES,
        )  # fmt: skip

    if G:
        tl.store(p_g + partial * BR * D + o_sum, g)
    if U:
        tl.store(p_u + partial * BR * D + o_sum, u)
    if DBIAS:
        tl.store(p_dbias + partial * D + o_d, dbias)
    if p_s is not None:  # noqa: SIM102 - joined by `and`, None is not seen at compile time
        if tl.program_id(0) == 0:
            s = tl.load(p_s + partial * BR + o_r, mask=tl.broadcast_to(later, o_r.shape), other=0)
            tl.store(p_s + partial * BR + o_r, _add_tiles(p_s_tiles, p_tiles, s, lo, hi, per_sequence, BR))
    if p_q is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            q = tl.load(p_q + partial * BR + o_r, mask=tl.broadcast_to(later, o_r.shape), other=0)
            if direct:
                q = _add_tiles(p_q_tiles, p_tiles, q, lo, hi, per_sequence, BR)
            tl.store(p_q + partial * BR + o_r, q)
