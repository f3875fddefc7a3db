"""The operator on a CPU in the extension's kernels (csrc/adapter_cpu.h): tensors in, raw pointers on.

The kernels read x and dy in rows whose elements lie side by side, and fp32 parameters; what is not so is copied. What
they make of the parameters is kept until these change (kept.py).

``ADAPTERKERN_CPU_ISA`` forces an instruction set, for tests: avx2, avx512, avx512_bf16 or amx; none forces
closed_form.py.
"""

import importlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkern.ops.closed_form import scaled
from adapterkern.ops.dropout import Drop
from adapterkern.ops.kept import Kept
from adapterkern.ops.reference import Weights

try:
    _C: Any = importlib.import_module("adapterkern._C")
except ImportError as error:  # no error: closed_form.py runs
    _C = None
    MISSING = f"the extension adapterkern._C cannot be imported ({error})"
else:
    MISSING = ""
    if getattr(_C, "ADAPTER_VERSION", 0) < 2:
        _C = None
        MISSING = "the extension adapterkern._C is older than this package: install adapterkern again"

# The instruction sets that have kernels (csrc/adapter_cpu.h), and what /proc/cpuinfo calls what each needs beyond the
# one before.
_NEEDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
}
_CPUINFO = Path("/proc/cpuinfo")

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def instruction_set() -> tuple[str | None, str]:
    """The instruction set whose kernels run here, and why; None if there are no kernels.

    Raises:
        ValueError: ``ADAPTERKERN_CPU_ISA`` names one that this machine or this build does not have.
    """
    found = _C.instruction_sets() if _C is not None else []
    why_none = MISSING or "no instruction set with kernels is in both this machine and this build"
    if asked := os.environ.get("ADAPTERKERN_CPU_ISA"):
        if asked not in (*found, "none"):
            but = "" if found else f" ({why_none})"
            raise ValueError(
                f"ADAPTERKERN_CPU_ISA: expected one of {', '.join((*found, 'none'))}{but}, got {asked!r:.80}"
                + (f": {why}" if (why := missing().get(asked)) else "")
            )
        return None if asked == "none" else asked, f"ADAPTERKERN_CPU_ISA={asked} is set"
    return (found[-1], f"the best of {', '.join(found)}") if found else (None, why_none)


def left_out() -> tuple[list[str], str]:
    """The instruction sets whose kernels this build of the extension lacks, and why; none without an extension."""
    if _C is None:
        return [], ""
    return _C.left_out(), _C.LEFT_OUT_BECAUSE


def missing() -> dict[str, str]:
    """The instruction sets that have kernels and not here, each with why: CPU, build or operating system."""
    if _C is None:
        return {}
    built, because = left_out()
    flags = set(cpuinfo("flags").split())  # none on a machine of another kind
    found: dict[str, str] = {}
    lacking: set[str] = set()
    for isa, needs in _NEEDS.items():
        lacking |= needs - flags
        if isa in _C.instruction_sets():
            continue
        if flags and lacking:
            found[isa] = "this CPU has no such instructions"
        elif isa in built:
            found[isa] = because
        else:
            found[isa] = "the operating system does not let this process use them"
    return found


def cpuinfo(field: str) -> str:
    """What /proc/cpuinfo says of the first core; "" without that field or file."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    values = (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == field)
    return next(values, "")


class Prepared:
    """One adapter's parameters as the kernels of an instruction set read them, for products in one dtype.

    ``weights`` are six, those of LayerNorm None where there is none, and the scale if that is a tensor; ``factor`` if
    it is a number. What the kernels have for W_up and b_up is their product with the scale.
    """

    def __init__(self, weights: Sequence[Any], compute: torch.dtype, isa: str, factor: float = 1.0) -> None:
        r, d = weights[2].shape
        if not r * d:  # the kernels divide by both
            raise ValueError(f"down_weight: expected shape (r, d) with r >= 1 and d >= 1, got {(r, d)}")
        scale: Tensor | float = factor if len(weights) == 6 else weights[6].detach()
        shapes = (d,), (d,), (r, d), (r,), (d, r), (d,)
        read: list[Tensor | None] = []
        for name, w, shape in zip(Weights._fields, weights[:6], shapes, strict=True):
            if w is not None:
                _expect(name, w, shape)
                w = scaled(w.detach(), scale) if name.startswith("up") else w.detach()
                w = _aligned(w.to(torch.float32).contiguous())
            read.append(w)
        # The kernels read these, too. A parameter that they read as it is is not held: it would never expire.
        given = {w.data_ptr() for w in weights[:6] if w is not None}
        self._copies = [t for t in read if t is not None and t.data_ptr() not in given]
        kind = _C.DTYPES[_DTYPES[compute]]
        self._memory = torch.empty(_C.packed_bytes(isa, kind, d, r), dtype=torch.uint8, device="cpu")
        pointers = [0 if w is None else w.data_ptr() for w in read]
        threads = torch.get_num_threads()
        self.kernels = _C.PreparedAdapter(isa, kind, d, r, pointers, self._memory.data_ptr(), threads)


_kept: Kept[Prepared] = Kept(Prepared)
clear = _kept.clear


def _prepared(weights: Sequence[Any], compute: torch.dtype, scale: Tensor | float = 1.0) -> Prepared:
    isa = instruction_set()[0]
    assert isa is not None
    if isinstance(scale, Tensor):
        return _kept.get((*weights, scale), compute, isa)
    return _kept.get(weights, compute, isa, scale)


def forward(
    rows: Tensor,
    w: Sequence[Any],
    eps: float,
    activation: str,
    compute: torch.dtype,
    save: bool = True,
    residual: Tensor | None = None,
    scale: Tensor | float = 1.0,
    gate: Tensor | None = None,
    drop: Drop | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, d), z (T, r) in ``compute``, mean and rstd (T,) of ``rows`` (T, d); only y without ``save``.

    Without LayerNorm mean and rstd are empty. A Tensor ``scale`` has no dimensions.
    """
    assert gate is drop is None
    d = w[2].shape[1]
    _expect("x", rows, (count := len(rows), d))
    rows = base = _side_by_side(rows)
    if residual is not None:
        _expect("residual", residual, (count, d))
        base = _side_by_side(residual.to(rows.dtype))
    prepared = _prepared(w, compute, scale)
    y = torch.empty((count, d), dtype=rows.dtype, device="cpu")  # whatever the default device is
    kept = count if save else 0
    z = torch.empty((kept, len(w[3])), dtype=compute, device="cpu")
    of_norm = 0 if w[0] is None else kept
    mean, rstd = (torch.empty(of_norm, dtype=torch.float32, device="cpu") for _ in range(2))
    prepared.kernels.forward(
        *(_C.DTYPES[_DTYPES[rows.dtype]], count, rows.stride(0), base.stride(0)),
        *(rows.data_ptr(), base.data_ptr(), y.data_ptr()),
        [t.data_ptr() if size else 0 for t, size in ((z, kept), (mean, of_norm), (rstd, of_norm))],
        *(eps, _C.ACTIVATIONS[activation], torch.get_num_threads()),
    )
    return y, z, mean, rstd


def backward(
    dy: Tensor,
    rows: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Sequence[Any],
    eps: float,
    activation: str,
    needed: Sequence[bool],
    residual: bool = False,
    scale: Tensor | float = 1.0,
    gate: Tensor | None = None,
    drop: Drop | None = None,
) -> list[Tensor | None]:
    """The gradients of x and the parameters that are ``needed`` (None for the others), each in its tensor's dtype.

    ``residual``: whether the forward had one; dx then lacks dy. An eighth ``needed`` is of a Tensor ``scale``.
    """
    assert gate is drop is None
    count, stream = len(rows), _C.DTYPES[_DTYPES[rows.dtype]]
    r, d = w[2].shape
    if w[0] is None:
        mean, rstd = (torch.full((count,), value, dtype=torch.float32, device="cpu") for value in (0.0, 1.0))
    mean, rstd = mean.to(torch.float32), rstd.to(torch.float32)
    given = {"x": (rows, (count, d)), "dy": (dy, (count, d)), "z": (z, (count, r))}
    for name, (t, shape) in (given | {"mean": (mean, (count,)), "rstd": (rstd, (count,))}).items():
        _expect(name, t, shape)
    if z.dtype not in (torch.float32, torch.bfloat16):  # a hook on saved tensors may have made it another
        raise TypeError(f"z: expected dtype float32 or bfloat16, as the forward made it, got {z.dtype}")
    inputs = _side_by_side(rows), _side_by_side(dy.to(rows.dtype)), z.contiguous(), mean.contiguous(), rstd.contiguous()
    prepared = _prepared(w, z.dtype, scale)
    down, of_scale = any(needed[1:5]), any(needed[7:])  # which the kernels make together
    norm = down and w[0] is not None
    wanted = [norm, norm, down, down, needed[5] or of_scale, needed[6] or of_scale]
    dx = torch.empty(rows.shape, dtype=rows.dtype, device="cpu") if needed[0] else None
    made = [
        torch.empty(p.shape, dtype=torch.float32, device="cpu") if want else None
        for p, want in zip(w, wanted, strict=True)
    ]
    memory = torch.empty(prepared.kernels.backward_bytes(stream, count), dtype=torch.uint8, device="cpu")
    prepared.kernels.backward(
        *(stream, count, inputs[0].stride(0), inputs[1].stride(0)),
        [t.data_ptr() for t in inputs],
        *(_C.ACTIVATIONS[activation], residual),
        [0 if t is None else t.data_ptr() for t in (dx, *made)],
        *(memory.data_ptr(), torch.get_num_threads()),
    )
    grads: list[Tensor | None] = [
        scaled(g, scale if i > 3 else 1.0).to(p.dtype) if g is not None and want else None
        for i, (g, p, want) in enumerate(zip(made, w, needed[1:7], strict=True))
    ]
    if isinstance(scale, Tensor):
        products = [(g.double() * p).sum() for g, p in zip(made[4:], w[4:6], strict=True) if g is not None]
        grads.append((products[0] + products[1]).to(scale.dtype) if of_scale else None)
    return [dx, *grads]


def _expect(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what would be read beyond its end; ``adapter`` has checked it, a direct call of the operator has not."""
    if t.device.type != "cpu" or t.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} on a CPU, got {tuple(t.shape)} on {t.device}")


def _side_by_side(rows: Tensor) -> Tensor:
    """``rows`` (T, d), copied if the elements of a row are not beside each other."""
    return _aligned(rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous())


def _aligned(t: Tensor) -> Tensor:
    """``t``, copied if it does not begin at a multiple of an element's size, as in the middle of a file."""
    return t if t.data_ptr() % t.element_size() == 0 else t.clone()
