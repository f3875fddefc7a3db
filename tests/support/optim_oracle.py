"""AdamW with global-norm clipping in float64, straight from the formula: what the optimizer's tests measure against."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

TILE = 4096  # of csrc/clipped_adamw.h; tests/optim/test_clipped_adamw.py checks it


class Oracle:
    """Keeps its own float64 parameters and moments; never reads the optimizer under test."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_norm: float = 1.0,
        sign: int = 1,
    ) -> None:
        self.params = [p.detach().double().clone() for p in params]
        self.exp_avg = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        self.lr, self.betas, self.eps, self.weight_decay, self.max_norm = lr, betas, eps, weight_decay, max_norm
        self.sign = sign
        self.t = 0

    def step(self, grads: Sequence[Tensor]) -> float:
        """One step; returns the norm before clipping. Gradients are upcast, never rounded."""
        grads = [self.sign * g.double() for g in grads]
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        clip = min(1.0, self.max_norm / (norm + 1e-6))
        beta1, beta2 = self.betas
        self.t += 1
        for p, m, v, g in zip(self.params, self.exp_avg, self.exp_avg_sq, grads, strict=True):
            m.lerp_(g * clip, 1 - beta1)
            v.mul_(beta2).add_((g * clip).square(), alpha=1 - beta2)
            denominator = (v / (1 - beta2**self.t)).sqrt() + self.eps
            p -= self.lr * (self.weight_decay * p + m / (1 - beta1**self.t) / denominator)
        return norm


def parameters(
    sizes: Sequence[int], dtype: torch.dtype = torch.float32, misaligned: bool = False, seed: int = 0
) -> list[nn.Parameter]:
    """One parameter per size; `misaligned` ones start one element into their memory, off every vector boundary."""
    generator = torch.Generator().manual_seed(seed)
    offset = int(misaligned)
    return [nn.Parameter(torch.randn(n + offset, generator=generator).to(dtype)[offset:]) for n in sizes]


def set_grads(params: Sequence[nn.Parameter], step: int, scale: float = 1.0) -> list[Tensor]:
    """Fresh gradients that depend on the step alone; returns them."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)
    return [p.grad for p in params]  # type: ignore[misc]  # set above


def hostile_gradients() -> dict[str, Tensor]:
    """Gradients that a sum of squares in fp32 gets wrong or cannot hold, by what is hard about them."""
    generator = torch.Generator().manual_seed(7)
    count = 2 * TILE + 77

    def of_exponents(low: int, high: int) -> Tensor:
        mantissa = 1 + torch.rand(count, generator=generator, dtype=torch.float64)
        exponent = torch.randint(low, high + 1, (count,), generator=generator)
        return torch.ldexp(mantissa, exponent).float()

    ordinary = of_exponents(-60, 50)
    top = 2.0 - 2.0**-23  # its square has the most bits that one term cannot hold
    tiles = [1e25, 1.0, 1e-45, 0.0, 1e-25, 1e36, 1e-12]
    return {
        "ordinary exponents": ordinary,
        "ascending": ordinary.sort().values,
        "descending": ordinary.sort(descending=True).values,
        "every exponent": of_exponents(-149, 110),
        "subnormals": of_exponents(-149, -127),
        "one large": torch.cat([torch.ones(1), torch.full((count,), 2.0**-25)]),
        "one large, squares that underflow": torch.cat([torch.ones(1), torch.full((count,), 1e-30)]),
        "large with each small": torch.tensor([top, top * 2.0**-13]).repeat(count),
        "all equal": torch.full((count,), top),
        "sums just held": torch.full((TILE,), top * 2.0**56),
        "sums just not held": torch.full((TILE,), 2.0**58),
        "sums large enough": torch.full((TILE,), 2.0**-51),
        "sums too small": torch.full((TILE,), top * 2.0**-52),
        "a tile of each": torch.cat([torch.full((TILE,), value) for value in tiles]),
        "an element of each": torch.tensor(tiles).repeat(count),
    }


def worst(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest error over all elements, relative to the largest expected value."""
    top = max((e.abs().max().item() for e in expected if e.numel()), default=0.0)
    gap = max(
        ((a.double() - e).abs().max().item() for a, e in zip(actual, expected, strict=True) if e.numel()), default=0.0
    )
    return gap / top if top else gap
