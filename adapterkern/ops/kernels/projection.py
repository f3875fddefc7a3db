"""The forward's down projection of a row tile and the moments of its rows, by three ways: see forward.py."""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
import triton
import triton.language as tl

from .primitives import dot, narrow, settled


@triton.jit
def merge(count, mean, m2, n, mean_n, m2_n):
    """Chan's update: a row's count, mean and squared deviations, joined with those of n more elements."""
    total = count + n
    delta = mean_n - mean
    return total, mean + delta * (n / total), m2 + m2_n + delta * delta * (count * n / total)


@triton.jit
def block_moments(x, m_d, n):
    mean = tl.sum(x, 1) / n
    dev = tl.where(m_d[None, :], x - mean[:, None], 0.0)
    return mean, tl.sum(dev * dev, 1)


@triton.jit
def row_shift(mean, m2, n, X: tl.constexpr):
    return narrow(tl.where(mean * mean > 16 * (m2 / n), mean, 0.0), X).to(tl.float32)


@triton.jit
def project(p_rows, p_a, m_t, shift, lo, hi, d: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
             BD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Moments and (x − s)·Aᵀ of a row tile over columns lo … hi; the block at column 0 sets s."""
    o_r = tl.arange(0, BR)
    acc = tl.zeros((BT, BR), tl.float32)
    mean = tl.zeros((BT,), tl.float32)
    m2 = tl.zeros((BT,), tl.float32)
    count = 0.0
    for o in tl.range(lo, hi, BD, num_stages=STAGES):
        o_d = o + tl.arange(0, BD)
        m_d = o_d < d
        b_x = tl.load(p_rows + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0)
        b_a = tl.load(p_a + o_r[None, :] * D + o_d[:, None])
        x = b_x.to(tl.float32)
        n = tl.minimum(d - o, BD).to(tl.float32)
        mean_n, m2_n = block_moments(x, m_d, n)
        shift = tl.where(o == 0, row_shift(mean_n, m2_n, n, b_x.dtype), shift)
        count, mean, m2 = merge(count, mean, m2, n, mean_n, m2_n)
        acc = dot(narrow(x - shift[:, None], b_a.dtype), b_a, acc, PRECISION)
    return acc, shift, mean, m2


@triton.jit
def project_plain(p_rows, p_a, m_t, lo, hi, d: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
                   BD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """As project with s = 0: x goes into the product unchanged; Σx and Σx² stay in their threads to the end."""
    RUN: tl.constexpr = 8  # consecutive columns, loaded by one thread
    o_r = tl.arange(0, BR)
    acc = tl.zeros((BT, BR), tl.float32)
    total = tl.zeros((BT, BD // RUN), tl.float32)
    squares = tl.zeros((BT, BD // RUN), tl.float32)
    for o in tl.range(lo, hi, BD, num_stages=STAGES):
        o_d = o + tl.arange(0, BD)
        b_x = tl.load(p_rows + o_d[None, :], mask=m_t[:, None] & (o_d < d)[None, :], other=0)
        b_a = tl.load(p_a + o_r[None, :] * D + o_d[:, None])
        acc = settled(dot(b_x, b_a, acc, PRECISION))
        x = tl.reshape(b_x.to(tl.float32), (BT, BD // RUN, RUN))
        total += tl.sum(x, 2)
        squares += tl.sum(x * x, 2)
    n = tl.maximum(hi - lo, 1).to(tl.float32)
    mean = tl.sum(total, 1) / n
    m2 = tl.sum(squares, 1) - mean * mean * n
    return acc, mean, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def project_raw(p_rows, p_a, m_t, lo, hi, d: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
                 BD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """x·Aᵀ over columns lo … hi, without moments."""
    o_r = tl.arange(0, BR)
    acc = tl.zeros((BT, BR), tl.float32)
    for o in tl.range(lo, hi, BD, num_stages=STAGES):
        o_d = o + tl.arange(0, BD)
        b_x = tl.load(p_rows + o_d[None, :], mask=m_t[:, None] & (o_d < d)[None, :], other=0)
        b_a = tl.load(p_a + o_r[None, :] * D + o_d[:, None])
        acc = dot(narrow(b_x.to(tl.float32), b_a.dtype), b_a, acc, PRECISION)
    return acc
