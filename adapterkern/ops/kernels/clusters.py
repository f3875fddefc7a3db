"""The kernels by clusters of thread blocks, in CUDA (csrc/adapter_cluster_*.h): what they compute, and their launches.

They are for bf16 and for an adapter with LayerNorm whose residual is x: the forward with at most 128 dimensions, the
backward with at most 64 and of one adapter for all rows. Anything else is the Triton kernels'. ``choice.clusters`` says
whether they are to run at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adapterkern import extension

from .norm import Following
from .rows import Routing
from .tiles import ceil_div, has_early_launches
from .weights import Prepared

_C, _MISSING = extension.load()

# In the order of csrc/adapter_cluster.h.
_ACTIVATIONS = "identity", "silu", "gelu", "relu", "tanh"
_MOST_BLOCKS = 16
_ROWS = 32  # of a tile
_ALIGNMENT = 16  # columns of a product, and of a block


class Pass(IntEnum):
    """Which of the two kernels, as in csrc/adapter_cluster.h."""

    FORWARD = 0
    BACKWARD = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """How a row's columns are shared: ``blocks`` of a cluster with ``columns`` each, the last with the rest."""

    blocks: int
    columns: int


def shape(d: int, most_columns: int) -> Shape | None:
    """The fewest blocks, a power of two, whose columns have room for ``d``; None if one would have none, or none fits.

    Of 512 columns each block has some, whatever ``d``; of 256, with 16 blocks, not at each d (2064 is the first).
    """
    blocks = 1
    while blocks <= _MOST_BLOCKS and most_columns and d % _ALIGNMENT == 0:
        columns = ceil_div(d, blocks * _ALIGNMENT) * _ALIGNMENT
        if columns <= most_columns:
            return Shape(blocks, columns) if (blocks - 1) * columns < d else None
        blocks *= 2
    return None


@cache
def capacity(kernel: Pass, R: int, d: int, device: torch.device) -> tuple[int, str]:
    """How many clusters the device runs at once for adapters of padded dimension ``R``, and why if that is none."""
    if _C is None:
        return 0, _MISSING
    of = shape(d, _C.cluster_columns(kernel, R))
    if of is None:
        return 0, f"no kernel holds {d} columns and {R} adapter dimensions"
    found, why = _C.cluster_capacity(kernel, R, of.blocks, _index(device))
    return found, why or ("" if found else f"no cluster of {of.blocks} blocks fits")


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _fits(kernel: Pass, x: Tensor, prepared: Prepared, others: Sequence[object]) -> bool:
    return (
        x.dtype == prepared.A.dtype == torch.bfloat16
        and prepared.row_sums is not None
        and all(other is None for other in others)
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        and capacity(kernel, prepared.A.shape[1], x.shape[1], x.device)[0] > 0
    )


def fit(x: Tensor, prepared: Prepared, of: Routing, *others: object) -> bool:
    """Whether the forward computes this call: ``others`` are what a plain call has not."""
    grouped = of.index is None or (of.S >= _ROWS and of.index.dtype == torch.int64)
    return of.bounds is None and grouped and _fits(Pass.FORWARD, x, prepared, others)


def fit_backward(dy: Tensor, x: Tensor, z: Tensor, prepared: Prepared, *others: object) -> bool:
    """Whether the backward computes this call, of dense ``dy`` and ``z``: ``others`` are what a plain call has not."""
    same = dy.dtype == x.dtype == z.dtype and len(prepared.A) == 1
    return same and dy.data_ptr() % 16 == 0 and _fits(Pass.BACKWARD, x, prepared, others)


def _launch(kernel: Pass, x: Tensor, of: Routing, prepared: Prepared, r: int, activation: str) -> Any:
    """Of rows ``x`` (T, d), T >= 1: how many clusters the launch has, and what both kernels are told of it."""
    (T, d), (_, R, D) = x.shape, prepared.A.shape
    how = shape(d, _C.cluster_columns(kernel, R))
    assert how is not None
    clusters = min(capacity(kernel, R, d, x.device)[0], ceil_div(T, _ROWS))
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return clusters, _C.ClusterLaunch(
        index=_address(of.index), rows=T, sequence=of.S, d=d, padded_d=D, r=r, columns=how.columns,
        activation=_ACTIVATIONS.index(activation), R=R, blocks=how.blocks, clusters=clusters, device=_index(x.device),
        stream=stream, early=has_early_launches(x.device),
    )  # fmt: skip


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(
    x: Tensor, of: Routing, prepared: Prepared, *, r: int, eps: float, activation: str, save: bool,
    following: Following | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """One launch on rows ``x`` (T, d), T >= 1, for which ``fit`` holds: the same as ``forward.forward``.

    With a norm that is ``following``, for which rows have one adapter, it is made, too.
    """
    T, d = x.shape
    p = prepared
    y = x.new_empty((T, d))
    z = x.new_empty((T, r)) if save else None
    mean, rstd = (x.new_empty(T, dtype=torch.float32) if save else None for _ in range(2))
    _, how = _launch(Pass.FORWARD, x, of, p, r, activation)
    tensors = x, p.A, p.c, p.w_up, p.b_up, y, z, mean, rstd
    norm = (0, 0, 0, 0.0) if following is None else (*map(_address, following[:3]), following.eps)
    _C.cluster_forward(how, *map(_address, tensors), x.stride(0), eps, *norm)
    return y, z, mean, rstd


def backward(
    dy: Tensor, x: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, prepared: Prepared, dx: Tensor | None,
    wanted: Sequence[bool], *, r: int, activation: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """One launch on rows (T, d), T >= 1, for which ``fit_backward`` holds: writes ``dx``, returns the clusters' sums.

    Those that are ``wanted``, as backward.py's last kernel reads them: g, s, q, u and dbias, in fp32.
    """
    p, (_, R, D) = prepared, prepared.A.shape
    clusters, how = _launch(Pass.BACKWARD, x, Routing(len(x), len(x), None), p, r, activation)
    shapes = (R, D), (R,), (R,), (R, D), (D,)
    sums = tuple(
        dy.new_empty((clusters, 1, *shape), dtype=torch.float32) if needed else None
        for shape, needed in zip(shapes, wanted, strict=True)
    )
    g, s, q, u, dbias = sums
    tensors = dy, x, z, mean, rstd, p.A, p.a_sum, p.c, p.w_up, dx, g, u, s, q, dbias
    _C.cluster_backward(how, *map(_address, tensors), x.stride(0))
    return sums
