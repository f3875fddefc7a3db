"""Dropout on h: a mask that every implementation makes again from a seed, so that nothing keeps it.

The mask of unit j of row t is a word of Philox4x32-10, a function of a key, the seed, and of a counter, the position
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): word j mod 4 at the counter
(⌊j/4⌋, t mod 2³², ⌊t/2³²⌋, 0), dropped below ``threshold(rate)``. The kernels have the same, to the bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


class Drop(NamedTuple):
    """What one call drops."""

    rate: float  # p, 0 <= p < 1
    seed: Tensor  # int64, one element
    rows: Tensor | None = None  # (T,) int64: the number t of each row; None is 0 … T − 1

    def mask(self, T: int, r: int, dtype: torch.dtype) -> Tensor:
        """(T, r): 0 where h is dropped and 1/(1 − p) where it is kept."""
        t = torch.arange(T, device=self.seed.device) if self.rows is None else self.rows
        quad = torch.arange((r + 3) // 4, device=self.seed.device)
        place = quad, (t & _LOW)[:, None], (t >> 32 & _LOW)[:, None], torch.zeros_like(quad)
        words = torch.stack(philox(self.seed, *place), dim=2)
        kept = words.flatten(1)[:, :r] >= threshold(self.rate)
        return kept.to(dtype) * keep_scale(self.rate)


def threshold(rate: float) -> int:
    """The words below it are dropped; from 0 to 2³² − 1. Raises ``ValueError`` for a rate that is none."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: expected a number in [0, 1), got {rate}")
    return min(round(rate * 2**32), _LOW)


def keep_scale(rate: float) -> float:
    """1/(1 − p), the factor of what is kept, as an fp32 number."""
    return torch.tensor(1 / (1 - rate), dtype=torch.float32).item()


def philox(seed: Tensor, *counters: Tensor) -> tuple[Tensor, ...]:
    """The four words at four counters, which are broadcast: numbers from 0 to 2³² − 1 in int64."""
    k0, k1 = seed.reshape(()) & _LOW, seed.reshape(()) >> 32 & _LOW
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters)
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = (_product(m, c) for m, c in zip(_MULTIPLIERS, (c0, c2), strict=True))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a·b, of which int64 holds all 64, if not the sign."""
    product = a * b
    return product >> 32 & _LOW, product & _LOW
