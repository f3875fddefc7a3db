"""The forward by clusters of thread blocks, in CUDA (csrc/adapter_cluster_kernel.h): what it computes, and its launch.

It is for bf16, for an adapter with LayerNorm and of at most 128 dimensions, whose residual is x. Anything else, and
every backward, is the Triton kernels'. ``choice.clusters`` says whether it is to run at all.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from adapterkern import extension

from .rows import Routing
from .tiles import ceil_div
from .weights import Prepared

_C, _MISSING = extension.load()

# In the order of csrc/adapter_cluster.h.
_ACTIVATIONS = "identity", "silu", "gelu", "relu", "tanh"
_MOST_BLOCKS = 16
_ROWS = 32  # of a tile
_ALIGNMENT = 16  # columns of a product, and of a block


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
def capacity(R: int, d: int, device: torch.device) -> tuple[int, str]:
    """How many clusters the device runs at once for adapters of padded dimension ``R``, and why if that is none."""
    if _C is None:
        return 0, _MISSING
    of = shape(d, _C.cluster_columns(R))
    if of is None:
        return 0, f"no kernel holds {d} columns and {R} adapter dimensions"
    found, why = _C.cluster_capacity(R, of.blocks, _index(device))
    return found, why or ("" if found else f"no cluster of {of.blocks} blocks fits")


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def fit(x: Tensor, prepared: Prepared, of: Routing, *others: object) -> bool:
    """Whether the kernel computes this call: ``others`` are what a plain call has not."""
    return (
        x.dtype == prepared.A.dtype == torch.bfloat16
        and prepared.row_sums is not None
        and all(other is None for other in others)
        and of.bounds is None
        and (of.index is None or (of.S >= _ROWS and of.index.dtype == torch.int64))
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        and capacity(prepared.A.shape[1], x.shape[1], x.device)[0] > 0
    )


def forward(
    x: Tensor, of: Routing, prepared: Prepared, *, r: int, eps: float, activation: str, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One launch on rows ``x`` (T, d), T >= 1, for which ``fit`` holds: the same as ``forward.forward``."""
    T, d = x.shape
    p, R = prepared, prepared.A.shape[1]
    y = x.new_empty((T, d))
    z = x.new_empty((T, r)) if save else None
    mean, rstd = (x.new_empty(T, dtype=torch.float32) if save else None for _ in range(2))
    how = shape(d, _C.cluster_columns(R))
    assert how is not None
    clusters = min(capacity(R, d, x.device)[0], ceil_div(T, _ROWS))
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    _C.cluster_forward(
        *(0 if t is None else t.data_ptr() for t in (x, of.index, p.A, p.c, p.w_up, p.b_up, y, z, mean, rstd)),
        x.stride(0), T, of.S, d, p.A.shape[2], r, how.columns, eps, _ACTIVATIONS.index(activation), R, how.blocks,
        clusters, _index(x.device), stream,
    )  # fmt: skip
    return y, z, mean, rstd
