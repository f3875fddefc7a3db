"""From tensors of any shape and stride to launches: rows, prepared weights, block sizes, the current device.

Triton compiles one variant per alignment of a pointer and divisibility of an integer. So every T×d tensor is brought to
rows that start at 16-byte boundaries, as far as d allows: the row stride is passed in units of VEC elements, the most
that divides d, and rows that do not fit are copied. A kernel then has one variant, with wide loads, whatever the
strides are.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import backward as _backward
from . import forward as _forward
from .cache import prepare_to_carry, prepared_weights
from .dropout import NO_DROPOUT
from .dropout import dropout as of_dropout
from .norm import Following
from .norm import norm_backward as _norm_backward
from .tiles import forward_tiles, has_early_launches, has_wide_products, hidden_tiles, slice_tiles
from .weights import Prepared, scale_of


def _vector(x: Tensor) -> int:
    """The largest number of elements that divides a row and takes at most 16 bytes."""
    return math.gcd(16 // x.element_size(), x.shape[-1])


def _rows(x: Tensor, *, dense: bool) -> Tensor:
    """``x`` (..., d) as rows (T, d), copied if they cannot be read in place; ``dense`` rows have no gaps between."""
    d = x.shape[-1]
    rows = x.reshape(-1, d)
    strides = rows.stride()
    fits = strides[0] == d if dense else strides[0] % _vector(x) == 0
    if (strides[1] == 1 or d == 1) and (fits or rows.shape[0] == 1) and rows.data_ptr() % 16 == 0:
        return rows.as_strided(rows.shape, (d, 1)) if rows.shape[0] == 1 else rows
    return rows.clone(memory_format=torch.contiguous_format)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` current: Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


class _Fitting:
    """The error of a kernel that takes more than the device has, which Triton asks when it loads one, names r."""

    def __init__(self, r: int, compute: torch.dtype) -> None:
        self.r, self.compute = r, compute

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OutOfResources):
            raise ValueError(
                f"down_weight: expected an r whose kernels fit into this GPU's {error.limit} bytes of {error.name}, "
                f"got r = {self.r} in {self.compute}, which takes {error.required}"
            ) from error


def _precision(compute: torch.dtype) -> str:
    # fp32_precision also follows allow_tf32 and set_float32_matmul_precision. allow_tf32 raises once it has been set.
    return "tf32" if compute == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _needed(needed: Sequence[bool], gate: Tensor | None) -> _backward.Needed:
    """``needed`` by name: of the gate, if there is one, it is the last."""
    return _backward.Needed(*needed) if gate is None else _backward.Needed(*needed[:-1])._replace(gate=needed[-1])


def prepare_weights(weights: Sequence[Any], dtype: torch.dtype, factor: float = 1.0) -> Prepared:
    """What the other two functions take as ``carried``. ``weights`` and ``factor`` as everywhere here: see prepare."""
    with _on(weights[2].device):
        return prepare_to_carry(weights, dtype, factor)


def adapter_forward(
    x: Tensor,
    weights: Sequence[Any],
    index: Tensor | None,
    *,
    eps: float,
    activation: str,
    compute: torch.dtype,
    save: bool,
    carried: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    factor: float = 1.0,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    by_clusters: bool = False,
    following: Following | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in x's shape, z (T, r) in ``compute``, mean and rstd (T,) in fp32; the last three are empty unless ``save``.

    Without LayerNorm mean and rstd are always empty. ``carried``: the fields of a ``Prepared``; without it the weights
    are prepared, or found in the cache. ``gate`` is (T,), fp32; without a ``seed`` there is no dropout.
    ``by_clusters`` and ``following`` as ``forward.forward`` takes them.
    """
    r, d = weights[2].shape[-2:]
    rows = x.numel() // d
    kept = (rows, r) if save else (0,)
    if rows == 0:
        stats = x.new_empty(0, dtype=torch.float32)
        return x.new_empty(x.shape), x.new_empty(kept, dtype=compute), stats, torch.empty_like(stats)
    with _on(x.device), _Fitting(r, compute):
        prepared = Prepared(*carried) if carried else prepared_weights(weights, compute, factor)
        y, *saved = _forward.forward(
            _rows(x, dense=False),
            None if index is None else index.contiguous().view(-1),
            prepared,
            r=r,
            eps=eps,
            activation=activation,
            precision=_precision(compute),
            save=save,
            tiles=forward_tiles(compute.itemsize, prepared.A.shape[1], has_wide_products(x.device)),
            vec=_vector(x),
            pdl=has_early_launches(x.device),
            residual=None if residual is None else _rows(residual, dense=False),
            gate=None if gate is None else gate.contiguous(),
            drop=NO_DROPOUT if seed is None else of_dropout(dropout, seed),
            by_clusters=by_clusters,
            following=following,
        )
    none = torch.float32 if save else x.dtype
    z, mean, rstd = (x.new_empty(0, dtype=none) if t is None else t for t in saved)
    # Not y.view: autograd forbids in-place writes to a view that a Function returns.
    return torch.ops.aten._unsafe_view(y, x.shape), z, mean, rstd


def adapter_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weights: Sequence[Any],
    index: Tensor | None,
    *,
    activation: str,
    needed: Sequence[bool],
    x_free: bool,
    carried: Sequence[Tensor] | None = None,
    residual: bool = False,
    factor: float = 1.0,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    by_clusters: bool = False,
) -> list[Tensor | None]:
    """The gradients of x, ``weights`` and ``gate`` in ``needed`` (None for the others); ``x`` is y if ``x_free``.

    ``residual``: the forward had one, and dx lacks dy; ``carried`` and ``by_clusters`` as in the forward.
    """
    if x.numel() == 0:
        tensors = (x, *weights) if gate is None else (x, *weights, gate)
        return [t.new_zeros(t.shape) if wanted else None for t, wanted in zip(tensors, needed, strict=True)]
    with _on(x.device), _Fitting(weights[2].shape[-2], z.dtype):
        prepared = Prepared(*carried) if carried else prepared_weights(weights, z.dtype, factor)
        wide = has_wide_products(x.device)
        R = prepared.A.shape[1]
        dx, *grads = _backward.backward(
            _rows(dy, dense=True),
            _rows(x, dense=False),
            None if index is None else index.contiguous().view(-1),
            z.contiguous(),
            mean,
            rstd,
            prepared,
            weights,
            activation=activation,
            precision=_precision(z.dtype),
            needed=_needed(needed, gate),
            x_free=x_free,
            residual=residual,
            scale=scale_of(weights, factor),
            gate=None if gate is None else gate.contiguous(),
            drop=NO_DROPOUT if seed is None else of_dropout(dropout, seed),
            row_tiles=hidden_tiles(z.element_size(), R, wide),
            tiles=slice_tiles(z.element_size(), R, wide),
            vec=_vector(x),
            pdl=has_early_launches(x.device),
            by_clusters=by_clusters,
        )
    return [dx if dx is None else dx.view(x.shape), *grads]


def norm_backward(dn: Tensor, y: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The gradient, in y's shape, of the y that an RMSNorm of ``weight`` in fp32 reads, whose gradient is ``dn``.

    ``rstd`` is (T,), in fp32.
    """
    if y.numel() == 0:
        return torch.empty_like(y)
    with _on(y.device):
        of_n, rows = (_rows(t.to(y.dtype), dense=True) for t in (dn, y))
        made = _norm_backward(of_n, rows, rstd.float().contiguous(), weight, pdl=has_early_launches(y.device))
    return made.view(y.shape)
