"""What an input of the operator may be."""

import torch
from torch import Tensor

from adapterkern.ops.index import check_index
from adapterkern.ops.reference import ACTIVATIONS, Weights

MAX_ADAPTER_DIM = 512
LOW = (torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float32, torch.float64)


def check_inputs(x: Tensor, weights: Weights, eps: float, activation: str, index: Tensor | None = None) -> None:
    """Raise the ``TypeError`` or ``ValueError`` that names the first argument that does not fit."""
    for name, t in (("x", x), *weights._asdict().items()):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {t.layout}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name}: expected dtype bfloat16, float16, float32 or float64, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {t.device}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (..., d) with d >= 1, got {tuple(x.shape)}")
    d = x.shape[-1]
    stack = "" if index is None else "n, "
    if weights.down_weight.dim() != (2 if index is None else 3) or 0 in weights.down_weight.shape[:-2]:
        raise ValueError(f"down_weight: expected shape ({stack}r, {d}), got {tuple(weights.down_weight.shape)}")
    *n, r, _ = weights.down_weight.shape
    if not 1 <= r <= MAX_ADAPTER_DIM:
        raise ValueError(f"down_weight: expected 1 <= r <= {MAX_ADAPTER_DIM} rows, got {r}")
    for name, t, size in zip(Weights._fields, weights, ((d,), (d,), (r, d), (r,), (d, r), (d,)), strict=True):
        shape = (*n, *size)
        if t.shape != shape:
            raise ValueError(f"{name}: expected shape {shape} for x of shape {tuple(x.shape)}, got {tuple(t.shape)}")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {eps!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    if index is not None:
        check_index(index, x, n[0])
