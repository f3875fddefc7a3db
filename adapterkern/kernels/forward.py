"""The adapter's forward: statistics, down projection, activation, up projection and residual.

    μ, σ² = mean, variance of a row       ρ = 1/√(σ² + eps)
    z = ρ((x − s)·Aᵀ − (μ − s)·rowsum(A)) + c        h = act(z)        y = x + h·W_upᵀ + b_up

A, rowsum(A) and c fold LayerNorm into the projection (see weights.py). Statistics go block by block with Chan's
update: each column block's mean and squared deviations are merged into the row's, so neither a large mean nor a large
channel cancels.

s is a constant of the row: 0, or, where the first block's mean outweighs its deviation, that mean rounded to x's
dtype. Without it a row of σ ≈ 0 loses everything (ρ reaches 1/√eps = 316, and 316·μ·2⁻²⁴·√d is what fp32 accumulation
leaves), and an fp32 row that is rounded to bf16 for the product loses σ/μ. With it such rows are exact: numbers of
one binade differ by one that their own dtype holds.

A program owns a row tile and goes over d twice: up, and then down again, since the columns read last are those most
likely still in L2. Loads: x twice, A and W_up once per row tile. Stores: y, and for the backward z (T×r, rounded to
the compute dtype; h is act of the rounded z) and two fp32 row constants.

Where row tiles are too few to fill the device (decoding), two launches share each tile's columns: the first leaves
partial products and statistics of its columns in fp32, the second adds them up, in order, and emits its columns of y.
"""

# mypy: allow-untyped-defs
# A Triton function's types are its callers'.
import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import activate, dot, narrow, tile_rows
from .tiles import Tiles, ceil_div, column_split, multiprocessors
from .weights import Prepared


@triton.jit
def _merge(count, mean, m2, n, mean_n, m2_n):
    """Chan's update: a row's count, mean and squared deviations with those of n more elements."""
    total = count + n
    delta = mean_n - mean
    return total, mean + delta * (n / total), m2 + m2_n + delta * delta * (count * n / total)


@triton.jit
def _block_moments(x, m_d, n):
    mean = tl.sum(x, 1) / n
    dev = tl.where(m_d[None, :], x - mean[:, None], 0.0)
    return mean, tl.sum(dev * dev, 1)


@triton.jit
def _shift(mean, m2, n, X: tl.constexpr):
    return narrow(tl.where(mean * mean * n > 16 * m2, mean, 0.0), X).to(tl.float32)


@triton.jit
def _project(p_rows, p_a, m_t, shift, lo, hi, d: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
             BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Moments and (x − s)·Aᵀ of a row tile over columns lo … hi; the block at column 0 sets s."""
    o_r = tl.arange(0, BR)
    acc = tl.zeros((BT, BR), tl.float32)
    mean = tl.zeros((BT,), tl.float32)
    m2 = tl.zeros((BT,), tl.float32)
    count = 0.0
    for o in range(lo, hi, BD):
        o_d = o + tl.arange(0, BD)
        m_d = o_d < d
        b_x = tl.load(p_rows + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0)
        b_a = tl.load(p_a + o_r[None, :] * D + o_d[:, None], eviction_policy="evict_last")
        x = b_x.to(tl.float32)
        n = tl.minimum(d - o, BD).to(tl.float32)
        mean_n, m2_n = _block_moments(x, m_d, n)
        shift = tl.where(o == 0, _shift(mean_n, m2_n, n, b_x.dtype), shift)
        count, mean, m2 = _merge(count, mean, m2, n, mean_n, m2_n)
        acc = dot(narrow(x - shift[:, None], b_a.dtype), b_a, acc, PRECISION)
    return acc, shift, mean, m2


@triton.jit
def _emit(p_rows, p_out, p_w, p_bias, h, m_t, lo, blocks, d: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """y = x + h·W_upᵀ + b_up over BD·blocks columns from lo, last column first."""
    o_r = tl.arange(0, BR)
    for i in range(0, blocks):
        o_d = lo + (blocks - 1 - i) * BD + tl.arange(0, BD)
        m_d = o_d < d
        m = m_t[:, None] & m_d[None, :]
        b_x = tl.load(p_rows + o_d[None, :], mask=m, other=0, eviction_policy="evict_first")
        b_w = tl.load(p_w + o_d[None, :] * BR + o_r[:, None], eviction_policy="evict_last")
        bias = tl.load(p_bias + o_d)
        y = b_x.to(tl.float32) + bias[None, :]
        y = dot(h, b_w, y, PRECISION)
        tl.store(p_out + o_d[None, :], narrow(y, b_x.dtype), mask=m, eviction_policy="evict_first")


@triton.jit
def _hidden(acc, shift, mean, m2, p_asum, p_c, eps, d: tl.constexpr, BR: tl.constexpr, COMPUTE: tl.constexpr):
    o_r = tl.arange(0, BR)
    rstd = 1 / tl.sqrt(m2 / d + eps)
    z = rstd[:, None] * (acc - (mean - shift)[:, None] * tl.load(p_asum + o_r)[None, :]) + tl.load(p_c + o_r)[None, :]
    return narrow(z, COMPUTE), rstd


@triton.jit
def _save(p_z, p_mean, p_rstd, z, mean, rstd, i_t, m_t, r: tl.constexpr, BR: tl.constexpr):
    o_r = tl.arange(0, BR)
    tl.store(p_z + i_t[:, None] * r + o_r[None, :], z, mask=m_t[:, None] & (o_r < r)[None, :])
    tl.store(p_mean + i_t, mean, mask=m_t)
    tl.store(p_rstd + i_t, rstd, mask=m_t)


@triton.jit
def _copy(p_from, p_to, m_t, lo, blocks, d: tl.constexpr, BD: tl.constexpr):
    for i in range(0, blocks):
        o_d = lo + i * BD + tl.arange(0, BD)
        m = m_t[:, None] & (o_d < d)[None, :]
        tl.store(p_to + o_d[None, :], tl.load(p_from + o_d[None, :], mask=m), mask=m)


@triton.jit(do_not_specialize=["S", "stride", "eps"], do_not_specialize_on_alignment=["p_index"])
def forward_kernel(
    p_x,  # (T, d), rows `stride`·VEC apart
    p_index,  # (T/S,) adapter of each sequence, or None
    p_a,  # (n, R, D)
    p_asum,  # (n, R)
    p_c,  # (n, R)
    p_w,  # (n, D, R)
    p_bias,  # (n, D)
    p_y,  # (T, d)
    p_z,  # (T, r), or None with the next two
    p_mean,  # (T,)
    p_rstd,  # (T,)
    S,
    stride,
    eps,
    d: tl.constexpr,
    r: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    sequence, i_t, m_t = tile_rows(tl.program_id(0), S, BT)
    p_rows = p_x + i_t[:, None] * stride * VEC
    p_out = p_y + i_t[:, None] * d
    blocks: tl.constexpr = (d + BD - 1) // BD
    zero = tl.zeros((BT,), tl.float32)
    e = tl.full((), 0, tl.int64)
    if p_index is not None:
        e = tl.load(p_index + sequence).to(tl.int64)
    if e < 0:
        _copy(p_rows, p_out, m_t, 0, blocks, d, BD)
        if p_z is not None:
            _save(p_z, p_mean, p_rstd, tl.zeros((BT, BR), p_z.dtype.element_ty), zero, zero, i_t, m_t, r, BR)
    else:
        p_a += e * BR * D
        p_w += e * BR * D
        acc, shift, mean, m2 = _project(p_rows, p_a, m_t, zero, 0, d, d, D, BT, BR, BD, PRECISION)
        z, rstd = _hidden(acc, shift, mean, m2, p_asum + e * BR, p_c + e * BR, eps, d, BR, p_a.dtype.element_ty)
        if p_z is not None:
            _save(p_z, p_mean, p_rstd, z, mean, rstd, i_t, m_t, r, BR)
        h = narrow(activate(z.to(tl.float32), ACT), z.dtype)
        _emit(p_rows, p_out, p_w, p_bias + e * D, h, m_t, 0, blocks, d, BR, BD, PRECISION)


@triton.jit(do_not_specialize=["T", "S", "stride", "width"], do_not_specialize_on_alignment=["p_index"])
def forward_partial_kernel(
    p_x,  # (T, d), rows `stride`·VEC apart
    p_index,  # (T/S,) or None
    p_a,  # (n, R, D)
    p_acc,  # (splits, T, R) fp32
    p_moments,  # (splits, 3, T) fp32: s, mean, squared deviations
    T,
    S,
    stride,
    width,
    d: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    # One of `splits` programs of a row tile: columns lo … lo + width·BD.
    sequence, i_t, m_t = tile_rows(tl.program_id(0), S, BT)
    split = tl.program_id(1).to(tl.int64)
    p_rows = p_x + i_t[:, None] * stride * VEC
    e = tl.full((), 0, tl.int64)
    if p_index is not None:
        e = tl.load(p_index + sequence).to(tl.int64)
    if e >= 0:
        o_d = tl.arange(0, BD)
        m_d = o_d < d
        b_x = tl.load(p_rows + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0)
        n: tl.constexpr = min(BD, d) * 1.0
        mean, m2 = _block_moments(b_x.to(tl.float32), m_d, n)
        shift = _shift(mean, m2, n, b_x.dtype)
        lo = tl.program_id(1) * width * BD
        hi = tl.minimum(lo + width * BD, d)
        acc, shift, mean, m2 = _project(p_rows, p_a + e * BR * D, m_t, shift, lo, hi, d, D, BT, BR, BD, PRECISION)
        o_r = tl.arange(0, BR)
        tl.store(p_acc + ((split * T + i_t) * BR)[:, None] + o_r[None, :], acc, mask=m_t[:, None])
        p_m = p_moments + split * 3 * T + i_t
        tl.store(p_m, shift, mask=m_t)
        tl.store(p_m + T, mean, mask=m_t)
        tl.store(p_m + 2 * T, m2, mask=m_t)


@triton.jit(
    do_not_specialize=["T", "S", "stride", "eps", "splits", "width"], do_not_specialize_on_alignment=["p_index"]
)
def forward_finish_kernel(
    p_x,  # (T, d), rows `stride`·VEC apart
    p_index,  # (T/S,) or None
    p_acc,  # (splits, T, R) fp32
    p_moments,  # (splits, 3, T) fp32
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
    d: tl.constexpr,
    r: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    sequence, i_t, m_t = tile_rows(tl.program_id(0), S, BT)
    split = tl.program_id(1)
    lo = split * width * BD
    blocks = tl.cdiv(tl.minimum(lo + width * BD, d) - lo, BD)
    p_rows = p_x + i_t[:, None] * stride * VEC
    p_out = p_y + i_t[:, None] * d
    o_r = tl.arange(0, BR)
    zero = tl.zeros((BT,), tl.float32)
    e = tl.full((), 0, tl.int64)
    if p_index is not None:
        e = tl.load(p_index + sequence).to(tl.int64)
    if e < 0:
        _copy(p_rows, p_out, m_t, lo, blocks, d, BD)
        if p_z is not None:  # noqa: SIM102 - joined by `and`, None would no longer be seen at compile time
            if split == 0:
                _save(p_z, p_mean, p_rstd, tl.zeros((BT, BR), p_z.dtype.element_ty), zero, zero, i_t, m_t, r, BR)
    else:
        acc = tl.zeros((BT, BR), tl.float32)
        mean, m2, shift = zero, zero, zero
        count = 0.0
        for k in range(0, splits):
            row = tl.cast(k, tl.int64) * T + i_t
            acc += tl.load(p_acc + (row * BR)[:, None] + o_r[None, :], mask=m_t[:, None], other=0)
            p_m = p_moments + tl.cast(k, tl.int64) * 3 * T + i_t
            shift = tl.load(p_m, mask=m_t, other=0)  # the same in each
            n = tl.minimum(d - k * width * BD, width * BD).to(tl.float32)
            count, mean, m2 = _merge(
                count, mean, m2, n, tl.load(p_m + T, mask=m_t, other=0), tl.load(p_m + 2 * T, mask=m_t, other=0)
            )
        z, rstd = _hidden(acc, shift, mean, m2, p_asum + e * BR, p_c + e * BR, eps, d, BR, p_w.dtype.element_ty)
        if p_z is not None:  # noqa: SIM102 - joined by `and`, None would no longer be seen at compile time
            if split == 0:
                _save(p_z, p_mean, p_rstd, z, mean, rstd, i_t, m_t, r, BR)
        h = narrow(activate(z.to(tl.float32), ACT), z.dtype)
        _emit(p_rows, p_out, p_w + e * BR * D, p_bias + e * D, h, m_t, lo, blocks, d, BR, BD, PRECISION)


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
    sms: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the forward on rows ``x`` (T, d), T ≥ 1: y, z, mean, rstd, the last three None unless ``save``."""
    T, d = x.shape
    sequences = 1 if index is None else index.numel()
    S = T // sequences
    n_tiles = sequences * ceil_div(S, tiles.BT)
    sms = multiprocessors(x.device) if sms is None else sms
    splits, width = column_split(n_tiles, min(S, tiles.BT), d, prepared.A.shape[1], tiles.BD, sms)

    y = x.new_empty((T, d))
    compute = prepared.A.dtype
    z = x.new_empty((T, r), dtype=compute) if save else None
    mean = x.new_empty(T, dtype=torch.float32) if save else None
    rstd = torch.empty_like(mean) if mean is not None else None
    p = prepared
    D, R = p.A.shape[2], p.A.shape[1]
    shape = {"d": d, "D": D, "BR": R, "VEC": vec, "PRECISION": precision, "BT": tiles.BT, "BD": tiles.BD}
    how = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    stride = x.stride(0) // vec
    if splits == 1:
        forward_kernel[(n_tiles,)](
            x, index, p.A, p.a_sum, p.c, p.w_up, p.b_up, y, z, mean, rstd, S, stride, eps,
            r=r, ACT=activation, **shape, **how,
        )  # fmt: skip
        return y, z, mean, rstd
    acc = x.new_empty((splits, T, R), dtype=torch.float32)
    moments = x.new_empty((splits, 3, T), dtype=torch.float32)
    grid = (n_tiles, splits)
    forward_partial_kernel[grid](x, index, p.A, acc, moments, T, S, stride, width, **shape, **how)
    forward_finish_kernel[grid](
        x, index, acc, moments, p.a_sum, p.c, p.w_up, p.b_up, y, z, mean, rstd, T, S, stride, eps, splits, width,
        r=r, ACT=activation, **shape, **how,
    )  # fmt: skip
    return y, z, mean, rstd
