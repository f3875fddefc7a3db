"""The operator on a CPU in the extension's kernels (csrc/adapter_cpu.h): tensors in, raw pointers on.

The kernels read x and dy in rows whose elements lie side by side, and fp32 parameters; what is not so is copied. What
they make of the parameters is kept until these change (kept.py).

``ADAPTERKERN_CPU_ISA`` forces an instruction set, for tests: avx2, avx512, avx512_bf16 or amx.
"""

import importlib
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adapterkern.ops.kept import Kept

try:
    _C: Any = importlib.import_module("adapterkern._C")
except ImportError as error:  # no error: closed_form.py runs
    _C = None
    _MISSING = f"the extension adapterkern._C cannot be imported ({error})"
else:
    _MISSING = ""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def instruction_set() -> tuple[str | None, str]:
    """The instruction set whose kernels run here, and why; None if there are no kernels.

    Raises:
        ValueError: ``ADAPTERKERN_CPU_ISA`` names one that this machine or this build does not have.
    """
    if _C is None:
        return None, _MISSING
    found = _C.instruction_sets()
    if (asked := os.environ.get("ADAPTERKERN_CPU_ISA")) is not None:
        if asked not in found:
            raise ValueError(f"ADAPTERKERN_CPU_ISA: expected one of {', '.join(found) or 'none'}, got {asked!r}")
        return asked, f"ADAPTERKERN_CPU_ISA={asked} is set"
    if not found:
        return None, "neither this machine nor this build has an instruction set with kernels: avx2 and up on x86-64"
    return found[-1], "the best that this machine and this build have"


class Prepared:
    """One adapter's parameters as the kernels of an instruction set read them, for products in one dtype."""

    def __init__(self, weights: Sequence[Tensor], compute: torch.dtype, isa: str) -> None:
        self.weights = [w.detach().to(torch.float32).contiguous() for w in weights]  # which the kernels read, too
        r, d = weights[2].shape
        kind = _C.DTYPES[_DTYPES[compute]]
        self._memory = torch.empty(_C.packed_bytes(isa, kind, d, r), dtype=torch.uint8)
        pointers = [w.data_ptr() for w in self.weights]
        threads = torch.get_num_threads()
        self.kernels = _C.PreparedAdapter(isa, kind, d, r, pointers, self._memory.data_ptr(), threads)


_kept: Kept[Prepared] = Kept(Prepared)
clear = _kept.clear


def _prepared(weights: Sequence[Tensor], compute: torch.dtype) -> Prepared:
    isa = instruction_set()[0]
    assert isa is not None
    return _kept.get(weights, compute, isa)


def forward(
    rows: Tensor, w: Sequence[Tensor], eps: float, activation: str, compute: torch.dtype, save: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, d), z (T, r) in ``compute``, mean and rstd (T,) of ``rows`` (T, d); only y without ``save``."""
    rows = _side_by_side(rows)
    count, d = rows.shape
    prepared = _prepared(w, compute)
    y = torch.empty((count, d), dtype=rows.dtype)
    kept = count if save else 0
    z = torch.empty((kept, len(w[3])), dtype=compute)
    mean, rstd = (torch.empty(kept, dtype=torch.float32) for _ in range(2))
    prepared.kernels.forward(
        *(_C.DTYPES[_DTYPES[rows.dtype]], count, rows.stride(0), rows.data_ptr(), y.data_ptr()),
        [t.data_ptr() if save else 0 for t in (z, mean, rstd)],
        *(eps, _C.ACTIVATIONS[activation], torch.get_num_threads()),
    )
    return y, z, mean, rstd


def backward(
    dy: Tensor,
    rows: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Sequence[Tensor],
    eps: float,
    activation: str,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and the parameters that are ``needed`` (None for the others), each in its tensor's dtype."""
    inputs = _side_by_side(rows), _side_by_side(dy), z.contiguous(), mean.contiguous(), rstd.contiguous()
    count, stream = len(rows), _C.DTYPES[_DTYPES[rows.dtype]]
    prepared = _prepared(w, z.dtype)
    down = any(needed[1:5])  # which the kernels make together
    wanted = [down, down, down, down, *needed[5:7]]
    dx = torch.empty(rows.shape, dtype=rows.dtype) if needed[0] else None
    made = [torch.empty(p.shape, dtype=torch.float32) if want else None for p, want in zip(w, wanted, strict=True)]
    memory = torch.empty(prepared.kernels.backward_bytes(stream, count), dtype=torch.uint8)
    prepared.kernels.backward(
        *(stream, count, inputs[0].stride(0), inputs[1].stride(0)),
        [t.data_ptr() for t in inputs],
        _C.ACTIVATIONS[activation],
        [0 if t is None else t.data_ptr() for t in (dx, *made)],
        *(memory.data_ptr(), torch.get_num_threads()),
    )
    grads = (g.to(p.dtype) if g is not None and want else None for g, p, want in zip(made, w, needed[1:], strict=True))
    return [dx, *grads]


def _side_by_side(rows: Tensor) -> Tensor:
    """``rows`` (T, d), copied if the elements of a row are not beside each other."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
