"""From tensors of any shape, and of several adapters, to rows of one adapter: for implementations that know no more.

``weights`` are the six parameters, those of LayerNorm None where there is none, and a seventh, the scale, if that is a
tensor; ``call.scale`` is the scale if it is a number. They are stacked ``(n, ...)`` each if ``index`` (one adapter per
sequence or row, −1 for none) is given; then each adapter runs on its own rows, one adapter after another, unless the
implementation takes them all at once. ``gate`` is (T,).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern.ops.call import Call
from adapterkern.ops.closed_form import gated, hidden, mask_of, scaled, stats_dtype
from adapterkern.ops.reference import Weights


class Rows(Protocol):
    """An implementation over rows (T, d) of one adapter: closed_form.py, native.py."""

    def forward(
        self,
        rows: Tensor,
        w: Weights,
        call: Call,
        save: bool,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def backward(
        self,
        dy: Tensor,
        rows: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        w: Weights,
        call: Call,
        needed: Sequence[bool],
        residual: bool,
    ) -> list[Tensor | None]: ...


class Several(Rows, Protocol):
    """An implementation that takes several adapters at once where their rows lie: native.py."""

    def forward_several(
        self,
        rows: Tensor,
        weights: Sequence[Any],
        index: Tensor,
        call: Call,
        save: bool,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def backward_several(
        self,
        dy: Tensor,
        rows: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weights: Sequence[Any],
        index: Tensor,
        call: Call,
        needed: Sequence[bool],
        residual: bool,
    ) -> list[Tensor | None]: ...


def adapter_forward(
    on: Rows | Several,
    x: Tensor,
    weights: Sequence[Any],
    call: Call,
    save: bool,
    index: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (..., d), z (T, r) in ``call.compute``, mean and rstd (T,); the last three are empty unless ``save``.

    Without LayerNorm mean and rstd are always empty.
    """
    rows = x.reshape(-1, x.shape[-1])
    base = None if residual is None else residual.reshape(rows.shape)
    if index is None:
        y, *saved = on.forward(rows, *_one(weights, call), save, base)
    elif (several := getattr(on, "forward_several", None)) is not None:
        y, *saved = several(rows, weights, index, call, save, base)
    else:
        y = (rows if base is None else base).clone(memory_format=torch.contiguous_format)
        stats = x.new_zeros(0 if weights[0] is None else rows.shape[0], dtype=stats_dtype(x.dtype))
        saved = [x.new_zeros((rows.shape[0], weights[2].shape[-2]), dtype=call.compute), stats, stats.clone()]
        for _, chosen, one, own in _by_adapter(index, weights, call, rows.shape[0]):
            made = on.forward(rows[chosen], one, own, True, None if base is None else base[chosen])
            for out, of_one in zip((y, *saved), made, strict=True):
                if len(out):
                    out[chosen] = of_one
    z, mean, rstd = saved if save else (x.new_empty(0) for _ in range(3))
    # Not y.view: autograd forbids in-place writes to a view that a Function returns.
    return torch.ops.aten._unsafe_view(y, x.shape), z, mean, rstd


def adapter_backward(
    on: Rows | Several,
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weights: Sequence[Any],
    call: Call,
    needed: Sequence[bool],
    x_free: bool = False,
    index: Tensor | None = None,
    residual: bool = False,
) -> list[Tensor | None]:
    """The gradients of x and ``weights`` in ``needed`` (None for the others), each with its tensor's dtype.

    ``x`` is y if ``x_free``. ``residual``: the forward had one, and dx lacks dy.
    """
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])

    def x_of(chosen: Tensor | slice, one: Weights, own: Call) -> Tensor:
        some = rows[chosen]
        if not x_free:
            return some
        h = hidden(z[chosen], own.activation, own.gate, mask_of(own.drop, z[chosen]))
        up, bias = (scaled(t, own.scale, h.dtype).to(h.dtype) for t in (one.up_weight, one.up_bias))
        return (some - F.linear(*gated(h, up, bias, own.gate))).to(x.dtype)

    def grads(chosen: Tensor | slice, one: Weights, own: Call) -> list[Tensor | None]:
        mu, rho = (mean, rstd) if one.norm_weight is None else (mean[chosen], rstd[chosen])
        own_x = x_of(chosen, one, own)
        return on.backward(dy_rows[chosen], own_x, z[chosen], mu, rho, one, own, needed, residual)

    if index is None:
        dx, *rest = grads(slice(None), *_one(weights, call))
        if len(weights) > 6 and (of_scale := rest[6]) is not None:
            rest[6] = of_scale.view(weights[6].shape)
    elif (several := getattr(on, "backward_several", None)) is not None:
        if x_free:
            recovered = rows.clone(memory_format=torch.contiguous_format)
            for _, chosen, one, own in _by_adapter(index, weights, call, rows.shape[0]):
                recovered[chosen] = x_of(chosen, one, own)
            rows = recovered
        dx, *rest = several(dy_rows, rows, z, mean, rstd, weights, index, call, needed, residual)
    else:
        without = torch.zeros_like if residual else torch.clone  # dx of rows without an adapter
        dx = without(dy_rows, memory_format=torch.contiguous_format) if needed[0] else None
        of_whole = [*weights, *([] if call.gate is None else [call.gate])]
        rest = [w.new_zeros(w.shape) if wanted else None for w, wanted in zip(of_whole, needed[1:], strict=True)]
        for e, chosen, one, own in _by_adapter(index, weights, call, rows.shape[0]):
            dx_of_one, *rest_of_one = grads(chosen, one, own)
            if dx is not None and dx_of_one is not None:
                dx[chosen] = dx_of_one
            for i, (out, of_one) in enumerate(zip(rest, rest_of_one, strict=True)):
                if out is not None and of_one is not None:
                    out[e if i < len(weights) else chosen] = of_one
    return [None if dx is None else dx.view(x.shape), *rest]


def _one(weights: Sequence[Any], call: Call) -> tuple[Weights, Call]:
    """One adapter's parameters, and the call with its scale."""
    return Weights(*weights[:6]), call._replace(scale=weights[6].reshape(())) if len(weights) > 6 else call


def _by_adapter(
    index: Tensor, weights: Sequence[Any], call: Call, rows: int
) -> Iterator[tuple[int, Tensor, Weights, Call]]:
    """Of each adapter that has rows its number, theirs, its parameters, and the call on these rows."""
    of_row = index.reshape(-1).repeat_interleave(rows // max(1, index.numel()))
    for e in range(len(weights[2])):
        chosen = (of_row == e).nonzero().squeeze(1)
        if chosen.numel():
            gate = None if call.gate is None else call.gate[chosen]
            drop = None if call.drop is None else call.drop._replace(rows=chosen)
            one = [None if w is None else w[e] for w in weights]
            yield e, chosen, *_one(one, call._replace(gate=gate, drop=drop))
