"""The rows of a row tile, and their adapter.

By sequences. A tile never crosses a sequence, because with stacked adapters each sequence has its own adapter; a plain
call is one sequence of T rows. Rows beyond the end of the sequence are masked.

Sorted. Where sequences are shorter than a tile (one row each, if every token has its own adapter), a tile takes BT rows
of one adapter, wherever they lie. The rows are sorted by adapter, those with none first: group j, of adapter j − 1, has
the places bⱼ … bⱼ₊₁ of that order, and its tiles are numbered from ⌊bⱼ/BT⌋ + j on. These numbers suffice, because
⌈(bⱼ₊₁ − bⱼ)/BT⌉ <= ⌊bⱼ₊₁/BT⌋ − ⌊bⱼ/BT⌋ + 1. So a program finds its tile by one comparison with each bound, no table is
made, and the host knows the number of tiles, ⌊T/BT⌋ + n + 1, without the bounds. At most n + 1 tiles have no rows:
their programs return at once.

Row offsets are int64: T·d exceeds 2³¹ at T = 524,288 for d = 4096.
"""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .cache import sorted_by_adapter
from .tiles import ceil_div

# Launches that sorting takes: torch's sort, the search for the bounds, and their ranges of numbers.
SORTING = 4


@triton.jit
def tile_rows(tile, S, BT: tl.constexpr):
    """The sequence of a row tile, its rows (int64) and which of them exist. S is the number of rows per sequence."""
    per_sequence = tl.cdiv(S, BT)
    sequence = tile // per_sequence
    i_t = (tile - sequence * per_sequence) * BT + tl.arange(0, BT)
    return sequence, sequence.to(tl.int64) * S + i_t, i_t < S


@triton.jit
def first_tile(begin, group, BT: tl.constexpr):
    """The number of the first tile of a group whose rows begin at the place ``begin``."""
    return begin // BT + group


@triton.jit
def rows_at(p_order, places, end):
    """The rows (int64) at these places, and which of them exist."""
    m_t = places < end
    return tl.load(p_order + places, mask=m_t, other=0), m_t


@triton.jit
def rows_of(tile, p_index, p_bounds, S, BT: tl.constexpr):
    """The adapter of a row tile (−1: none), its rows and which of them exist.

    Sorted if ``p_bounds`` is given: then ``p_index`` is the order, and S is T.
    """
    if p_bounds is not None:
        n = tl.num_programs(0) - S // BT - 1
        group = 0
        for o in range(0, n, 128):
            j = o + tl.arange(0, 128)
            begin = tl.load(p_bounds + j, mask=j < n, other=0).to(tl.int32)
            group += tl.sum(((j < n) & (first_tile(begin, j + 1, BT) <= tile)).to(tl.int32), 0)
        begin = tl.load(p_bounds + group - 1, mask=group > 0, other=0).to(tl.int32)
        end = tl.load(p_bounds + group).to(tl.int32)
        first = begin + (tile - first_tile(begin, group, BT)) * BT
        i_t, m_t = rows_at(p_index, first + tl.arange(0, BT), end)
        return tl.where(first < end, group - 1, -1).to(tl.int64), i_t, m_t
    else:
        sequence, i_t, m_t = tile_rows(tile, S, BT)
        e = tl.full((), 0, tl.int64)
        if p_index is not None:
            e = tl.load(p_index + sequence).to(tl.int64)
        return e, i_t, m_t


@dataclass(slots=True)  # frozen, each plain call would take half a microsecond more
class Routing:
    """The adapters of a call's rows, as the kernels take them."""

    T: int
    S: int  # rows per sequence; T if they are sorted
    index: Tensor | None  # (T/S,) adapter of each sequence, or None; (T,) the rows sorted by adapter
    bounds: Tensor | None = None  # (n + 1,) where each adapter's begin in that order; None: by sequences

    def tiles(self, BT: int) -> int:
        """How many row tiles there are, those without rows included."""
        if self.bounds is not None:
            return self.T // BT + self.bounds.numel()
        return self.T // self.S * ceil_div(self.S, BT)


def routing(index: Tensor | None, T: int, A: Tensor, BT: int, sms: int) -> Routing:
    """Sorted if the weights that then are not read, once for each tile less, take longer than sorting does.

    ``A`` (n, R, D) are the prepared weights; ``BT`` is the rows of the kernels' tiles. A sequence of BT rows or more is
    never sorted. At d = 4096 and R = 64 in 16 bits, a tile reads 1 MB, and 132 SMs could load 45 tiles meanwhile: rows
    are sorted from T = 55 on for 8 adapters, and a few tokens that are decoded together are not.
    """
    if index is None:
        return Routing(T, T, None)
    n, R, D = A.shape
    S = T // index.numel()
    fewer = index.numel() - (T // BT + n + 1)
    if S >= BT or fewer * 2 * R * D * A.element_size() <= SORTING * tiles.LAUNCH_BYTES * sms:
        return Routing(T, S, index)
    order, bounds = sorted_by_adapter(index, n)
    if S > 1:
        order, bounds = (order[:, None] * S + torch.arange(S, device=order.device)).view(-1), bounds * S
    return Routing(T, T, order, bounds)
