"""From tensors of any shape, and of several adapters, to rows of one adapter: for implementations that know no more.

``weights`` are the six parameters, stacked ``(n, ...)`` each if ``index`` (one adapter per sequence, −1 for none) is
given; then each adapter runs on its own rows, one adapter after another.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern.ops.closed_form import stats_dtype
from adapterkern.ops.reference import ACTIVATIONS, Weights


class Rows(Protocol):
    """An implementation over rows (T, d) of one adapter: closed_form.py, native.py."""

    def forward(
        self, rows: Tensor, w: Weights, eps: float, activation: str, compute: torch.dtype, save: bool
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
    ) -> list[Tensor | None]: ...


def adapter_forward(
    on: Rows,
    x: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    activation: str,
    compute: torch.dtype,
    save: bool,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (..., d), z (T, r) in ``compute``, mean and rstd (T,); the last three are empty unless ``save``."""
    rows = x.reshape(-1, x.shape[-1])
    if index is None:
        y, *saved = on.forward(rows, Weights(*weights), eps, activation, compute, save)
    else:
        y = rows.clone(memory_format=torch.contiguous_format)
        stats = x.new_zeros(rows.shape[0], dtype=stats_dtype(x.dtype))
        saved = [x.new_zeros((rows.shape[0], weights[2].shape[-2]), dtype=compute), stats, stats.clone()]
        for _, one, chosen in _by_adapter(index, weights, rows.shape[0]):
            made = on.forward(rows[chosen], one, eps, activation, compute, True)
            for out, of_one in zip((y, *saved), made, strict=True):
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
    weights: Sequence[Tensor],
    eps: float,
    activation: str,
    needed: Sequence[bool],
    x_free: bool = False,
    index: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients in ``needed`` (None for the others), each with its tensor's dtype; ``x`` is y if ``x_free``."""
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])

    def grads(chosen: Tensor | slice, one: Weights) -> list[Tensor | None]:
        some = rows[chosen]
        if x_free:
            h = ACTIVATIONS[activation].fn(z[chosen])
            some = (some - F.linear(h, one.up_weight.to(h.dtype), one.up_bias.to(h.dtype))).to(x.dtype)
        return on.backward(dy_rows[chosen], some, z[chosen], mean[chosen], rstd[chosen], one, eps, activation, needed)

    if index is None:
        dx, *rest = grads(slice(None), Weights(*weights))
    else:
        dx = dy_rows.clone(memory_format=torch.contiguous_format) if needed[0] else None
        rest = [w.new_zeros(w.shape) if wanted else None for w, wanted in zip(weights, needed[1:], strict=True)]
        for e, one, chosen in _by_adapter(index, weights, rows.shape[0]):
            dx_of_one, *rest_of_one = grads(chosen, one)
            if dx is not None and dx_of_one is not None:
                dx[chosen] = dx_of_one
            for out, of_one in zip(rest, rest_of_one, strict=True):
                if out is not None and of_one is not None:
                    out[e] = of_one
    return [None if dx is None else dx.view(x.shape), *rest]


def _by_adapter(index: Tensor, weights: Sequence[Tensor], rows: int) -> Iterator[tuple[int, Weights, Tensor]]:
    """The number, the parameters and the numbers of the rows of each adapter that has rows."""
    of_row = index.reshape(-1).repeat_interleave(rows // max(1, index.numel()))
    for e in range(len(weights[2])):
        chosen = (of_row == e).nonzero().squeeze(1)
        if chosen.numel():
            yield e, Weights(*(w[e] for w in weights)), chosen
