"""The operator's inputs that break naive kernels, and how an error is counted."""

from collections.abc import Callable

import torch
from torch import Tensor

from adapterkern.ops.reference import Weights


def make_weights(d: int, r: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Random parameters of an adapter whose branch is about as large as its input, in fp64 rounded to ``dtype``."""
    shapes = Weights((d,), (d,), (r, d), (r,), (d, r), (d,))
    scales = Weights(0.2, 0.2, d**-0.5, 0.2, r**-0.5, 0.2)
    weights = [torch.randn(shape, dtype=torch.float64) * s for shape, s in zip(shapes, scales, strict=True)]
    weights[0] += 1
    return Weights(*(w.to(dtype) for w in weights))


def _outlier_channels(x: Tensor) -> Tensor:
    x[:, :: max(1, x.shape[1] // 3)] *= 1000
    return x


# The rows of the numerics table: each takes standard normal (T, d) fp64 and returns an input that has broken a kernel.
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "mean 10 sigma": lambda x: x + 10,
    "mean 100 sigma": lambda x: x + 100,
    "outlier channels": _outlier_channels,
    "constant rows": lambda x: x[:, :1].expand_as(x).clone(),
    "zero rows": lambda x: torch.zeros_like(x),
    "tiny variance": lambda x: 1e-4 * x,
    "near fp16 max": lambda x: (2e4 * x).clamp(-6e4, 6e4),
}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / max(‖expected‖, 1) in fp64; the 1 serves gradients that are 0 but for rounding."""
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1)).item()
