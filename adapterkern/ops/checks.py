"""What an input of the operator may be."""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from adapterkern.checks import choice, integer, number
from adapterkern.ops.index import vouched
from adapterkern.ops.reference import ACTIVATIONS, Weights

MAX_ADAPTER_DIM = 512
LOW = (torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float32, torch.float64)


def check_inputs(
    x: Tensor,
    weights: Weights,
    eps: float,
    activation: str,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> None:
    """Raise a ``TypeError`` or ``ValueError`` that names the first argument that does not fit.

    With ``index`` (one adapter per sequence, −1 for none), ``weights`` are stacked, ``(n, ...)`` each.
    """
    no_norm = weights.norm_weight is None and weights.norm_bias is None
    given = (("x", x), *weights._asdict().items())
    for name, t in (given[0], *given[3:]) if no_norm else given:
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
        if t is not None and t.shape != shape:
            raise ValueError(f"{name}: expected shape {shape} for x of shape {tuple(x.shape)}, got {tuple(t.shape)}")
    choice("activation", activation, tuple(ACTIVATIONS))
    if not (isinstance(eps, float) and eps >= 0):  # `number` costs 0.8 µs, and this runs in every call
        number("eps", eps, "[0, inf]")
    if residual is not None:
        _check_residual(residual, x)
    if type(scale) is not float or not -math.inf < scale < math.inf:
        _check_scale(scale, x, None if index is None else n[0])
    if index is None:
        return
    check_index_dtype(index)
    if index.device != x.device:
        raise ValueError(f"index: expected device {x.device} like x, got {index.device}")
    if index.dim() >= x.dim() or index.shape != x.shape[: index.dim()]:
        raise ValueError(f"index: expected leading dimensions of x, {tuple(x.shape[:-1])}, got {tuple(index.shape)}")
    check_index_values(index, n[0])


def _check_residual(residual: object, x: Tensor, name: str = "residual") -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(residual).__name__}")
    if residual.layout != torch.strided or residual.dtype != x.dtype:
        raise TypeError(
            f"{name}: expected a dense tensor of x's dtype {x.dtype}, got {residual.dtype}, {residual.layout}"
        )
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"{name}: expected shape {tuple(x.shape)} on {x.device} like x, "
            f"got {tuple(residual.shape)} on {residual.device}"
        )


def _check_scale(scale: object, x: Tensor, n: int | None) -> None:
    if not isinstance(scale, Tensor):
        number("scale", scale, "(-inf, inf)")
        return
    if scale.layout != torch.strided or scale.dtype not in DTYPES:
        raise TypeError(f"scale: expected dtype bfloat16, float16, float32 or float64, got {scale.dtype}")
    if scale.device != x.device:
        raise ValueError(f"scale: expected device {x.device} like x, got {scale.device}")
    if scale.numel() != 1 if n is None else scale.shape != (n,):
        expected = "one element" if n is None else f"shape ({n},)"
        raise ValueError(f"scale: expected a number or a tensor of {expected}, got shape {tuple(scale.shape)}")


def check_norm(x: Tensor, weight: object, eps: object, added: object) -> None:
    """Raise the error of an RMSNorm behind an adapter of x, or of what is ``added`` to x before it."""
    if not isinstance(weight, Tensor) or weight.layout != torch.strided or weight.dtype not in DTYPES:
        got = f"{weight.dtype}, {weight.layout}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"next_weight: expected a dense torch.Tensor of a floating dtype, got {got}")
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"next_weight: expected shape {(x.shape[-1],)} on {x.device} for x of shape {tuple(x.shape)}, "
            f"got {tuple(weight.shape)} on {weight.device}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("next_weight: expected one that requires no gradient, got one that does")
    number("next_eps", eps, "[0, inf]")
    if added is not None:
        _check_residual(added, x, "added")


def check_gate(gate: object, x: Tensor, index: Tensor | None = None) -> None:
    """Raise the error of a ``gate`` that is not of x's rows; with ``index`` of k adapters per row, not of its shape."""
    if not isinstance(gate, Tensor) or gate.layout != torch.strided or gate.dtype not in DTYPES:
        got = f"{gate.dtype}, {gate.layout}" if isinstance(gate, Tensor) else type(gate).__name__
        raise TypeError(f"gate: expected a dense torch.Tensor of a floating dtype, got {got}")
    if gate.device != x.device:
        raise ValueError(f"gate: expected device {x.device} like x, got {gate.device}")
    if index is not None and gate.shape != index.shape:
        raise ValueError(f"gate: expected shape {tuple(index.shape)} like index, got {tuple(gate.shape)}")
    if index is None and (gate.dim() >= x.dim() or gate.shape != x.shape[: gate.dim()]):
        raise ValueError(f"gate: expected leading dimensions of x, {tuple(x.shape[:-1])}, got {tuple(gate.shape)}")


def check_dropout(dropout: object, seed: object, x: Tensor) -> None:
    """Raise the error of a rate that is no probability below 1, or of a seed that is no int64 on x's device."""
    number("dropout", dropout, "[0, 1)")
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected a torch.Tensor of dtype int64, got {seed.dtype}")
        if seed.numel() != 1 or seed.device != x.device:
            raise ValueError(
                f"seed: expected one element on {x.device} like x, got shape {tuple(seed.shape)} on {seed.device}"
            )
    else:
        integer("seed", seed, -(2**63), 2**63 - 1)


def check_index_dtype(index: object) -> None:
    """Raise the ``TypeError`` for anything but a tensor of integers."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: expected a torch.Tensor of dtype int64 or int32, got {got}")


def check_index_values(index: Tensor, n: int) -> None:
    """Raise the ``ValueError`` for a value outside −1 to n − 1; a GPU reports it itself, asynchronously."""
    if not torch.compiler.is_compiling() and vouched(index, n) is not None:
        return
    if torch._C._functorch.is_batchedtensor(index):
        raise ValueError("index: expected one for all calls that vmap makes at once, got one that it maps over")
    within = ((index >= -1) & (index < n)).all()
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(index):
        if not within:
            raise ValueError(
                f"index: expected values from -1 to {n - 1}, got {index.min().item()} to {index.max().item()}"
            )
    else:
        torch._assert_async(within, f"adapterkern: index: expected values from -1 to {n - 1}")
