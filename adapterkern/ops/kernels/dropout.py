"""The mask of ops/dropout.py, made again wherever h is, in registers."""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adapterkern.ops.dropout import threshold


@triton.jit
def kept(p_seed, threshold, i_t, BT: tl.constexpr, BR: tl.constexpr):
    """m of the rows i_t of h, (BT, BR).

    The four words of a counter serve four neighbors, so that an element of h takes a quarter of Philox's ten rounds.
    """
    zero = tl.zeros((BT, BR // 4), tl.int32)
    low = i_t.to(tl.int32)[:, None]
    high = (i_t >> 32).to(tl.int32)[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), zero + tl.arange(0, BR // 4)[None, :], zero + low, zero + high, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BT, BR))
    return words >= threshold.to(tl.uint32, bitcast=True)


class Dropout(NamedTuple):
    """What the kernels take of dropout; all None: none."""

    seed: Tensor | None = None  # (1,) int64, read by the kernels: each replay of a CUDA graph has a mask of its own
    threshold: int | None = None  # with the sign of its bit 31: an int32 whatever p is, which is one variant
    factor: float | None = None  # 1/(1 − p)


NO_DROPOUT = Dropout()


def dropout(rate: float, seed: Tensor | None) -> Dropout:
    """``rate`` is p; without a ``seed`` nothing is dropped."""
    if seed is None:
        return NO_DROPOUT
    unsigned = threshold(rate)
    return Dropout(seed, unsigned - (unsigned >> 31 << 32), 1 / (1 - rate))
