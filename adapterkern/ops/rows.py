"""From tensors of any shape, and of several adapters, to rows of one adapter: for implementations that know no more.

``weights`` are the six parameters, those of LayerNorm None where there is none, and a seventh, the scale, if that is a
tensor; ``factor`` is the scale if it is a number. They are stacked ``(n, ...)`` each if ``index`` (one adapter per
sequence, −1 for none) is given; then each adapter runs on its own rows, one adapter after another.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern.ops.closed_form import scaled, stats_dtype
from adapterkern.ops.reference import ACTIVATIONS, Weights


class Rows(Protocol):
    """An implementation over rows (T, d) of one adapter: closed_form.py, native.py."""

    def forward(
        self,
        rows: Tensor,
        w: Weights,
        eps: float,
        activation: str,
        compute: torch.dtype,
        save: bool,
        residual: Tensor | None,
        scale: Tensor | float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def backward(
        self,
        dy: Tensor,
        rows: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        w: Weights,
        eps: float,
        activation: str,
        needed: Sequence[bool],
        residual: bool,
        scale: Tensor | float,
    ) -> list[Tensor | None]: ...


def adapter_forward(
    on: Rows,
    x: Tensor,
    weights: Sequence[Any],
    eps: float,
    activation: str,
    compute: torch.dtype,
    save: bool,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (..., d), z (T, r) in ``compute``, mean and rstd (T,); the last three are empty unless ``save``.

    Without LayerNorm mean and rstd are always empty.
    """
    rows = x.reshape(-1, x.shape[-1])
    base = None if residual is None else residual.reshape(rows.shape)
    if index is None:
        one, scale = _one(weights, factor)
        y, *saved = on.forward(rows, one, eps, activation, compute, save, base, scale)
    else:
        y = (rows if base is None else base).clone(memory_format=torch.contiguous_format)
        stats = x.new_zeros(0 if weights[0] is None else rows.shape[0], dtype=stats_dtype(x.dtype))
        saved = [x.new_zeros((rows.shape[0], weights[2].shape[-2]), dtype=compute), stats, stats.clone()]
        for _, one, scale, chosen in _by_adapter(index, weights, factor, rows.shape[0]):
            own = None if base is None else base[chosen]
            made = on.forward(rows[chosen], one, eps, activation, compute, True, own, scale)
            for out, of_one in zip((y, *saved), made, strict=True):
                if len(out):
                    out[chosen] = of_one
    z, mean, rstd = saved if save else (x.new_empty(0) for _ in range(3))
    # Not y.view: autograd forbids in-place writes to a view that a Function returns.
    return torch.ops.aten._unsafe_view(y, x.shape), z, mean, rstd


def adapter_backward(
    on: Rows,
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weights: Sequence[Any],
    eps: float,
    activation: str,
    needed: Sequence[bool],
    x_free: bool = False,
    index: Tensor | None = None,
    residual: bool = False,
    factor: float = 1.0,
) -> list[Tensor | None]:
    """The gradients of x and ``weights`` in ``needed`` (None for the others), each with its tensor's dtype.

    ``x`` is y if ``x_free``. ``residual``: the forward had one, and dx lacks dy.
    """
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])

    def grads(chosen: Tensor | slice, one: Weights, scale: Tensor | float) -> list[Tensor | None]:
        some = rows[chosen]
        if x_free:
            h = ACTIVATIONS[activation].fn(z[chosen])
            up, bias = (scaled(t, scale).to(h.dtype) for t in (one.up_weight, one.up_bias))
            some = (some - F.linear(h, up, bias)).to(x.dtype)
        mu, rho = (mean, rstd) if one.norm_weight is None else (mean[chosen], rstd[chosen])
        how = one, eps, activation, needed, residual, scale
        return on.backward(dy_rows[chosen], some, z[chosen], mu, rho, *how)

    if index is None:
        dx, *rest = grads(slice(None), *_one(weights, factor))
        if len(rest) > 6 and (of_scale := rest[6]) is not None:
            rest[6] = of_scale.view(weights[6].shape)
    else:
        without = torch.zeros_like if residual else torch.clone  # dx of rows without an adapter
        dx = without(dy_rows, memory_format=torch.contiguous_format) if needed[0] else None
        rest = [w.new_zeros(w.shape) if wanted else None for w, wanted in zip(weights, needed[1:], strict=True)]
        for e, one, scale, chosen in _by_adapter(index, weights, factor, rows.shape[0]):
            dx_of_one, *rest_of_one = grads(chosen, one, scale)
            if dx is not None and dx_of_one is not None:
                dx[chosen] = dx_of_one
            for out, of_one in zip(rest, rest_of_one, strict=True):
                if out is not None and of_one is not None:
                    out[e] = of_one
    return [None if dx is None else dx.view(x.shape), *rest]


def _one(weights: Sequence[Any], factor: float) -> tuple[Weights, Tensor | float]:
    """One adapter's parameters, and its scale."""
    return Weights(*weights[:6]), weights[6].reshape(()) if len(weights) > 6 else factor


def _by_adapter(
    index: Tensor, weights: Sequence[Any], factor: float, rows: int
) -> Iterator[tuple[int, Weights, Tensor | float, Tensor]]:
    """The number, the parameters, the scale and the numbers of the rows of each adapter that has rows."""
    of_row = index.reshape(-1).repeat_interleave(rows // max(1, index.numel()))
    for e in range(len(weights[2])):
        chosen = (of_row == e).nonzero().squeeze(1)
        if chosen.numel():
            yield e, *_one([None if w is None else w[e] for w in weights], factor), chosen
