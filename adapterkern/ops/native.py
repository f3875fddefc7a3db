"""The operator on a CPU in the extension's kernels (csrc/adapter_cpu.h): tensors in, raw pointers on.

The kernels read x and dy in rows whose elements lie side by side, and fp32 parameters; what is not so is copied. What
they make of the parameters is kept until these change (kept.py).

``ADAPTERKERN_CPU_ISA`` forces an instruction set, for tests: avx2, avx512, avx512_bf16 or amx; none forces
closed_form.py.
"""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkern import extension
from adapterkern.ops.call import Call
from adapterkern.ops.closed_form import needs_extra, scaled
from adapterkern.ops.kept import Kept
from adapterkern.ops.readable import aligned, expect, gating, inputs, side_by_side
from adapterkern.ops.reference import Weights

_C, MISSING = extension.load()  # without it closed_form.py runs

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
                expect(name, w, shape)
                w = scaled(w.detach(), scale) if name.startswith("up") else w.detach()
                w = aligned(w.to(torch.float32).contiguous())
            read.append(w)
        # The kernels read these, too. A parameter that they read as it is is not held: it would never expire.
        given = {w.data_ptr() for w in weights[:6] if w is not None}
        self._copies = [t for t in read if t is not None and t.data_ptr() not in given]
        kind = _C.DTYPES[_DTYPES[compute]]
        self._memory = torch.empty(_C.packed_bytes(isa, kind, d, r), dtype=torch.uint8, device="cpu")
        pointers = [0 if w is None else w.data_ptr() for w in read]
        threads = torch.get_num_threads()
        self.kernels = _C.PreparedAdapter(isa, kind, d, r, pointers, self._memory.data_ptr(), threads)


class Stack:
    """Several adapters' parameters, stacked, of which those that have rows are prepared."""

    def __init__(self, _: Sequence[Any], compute: torch.dtype, isa: str, factor: float = 1.0) -> None:
        self._how = compute, isa, factor
        self.made: dict[int, Prepared] = {}

    def of(self, weights: Sequence[Any], e: int) -> Prepared:
        """Adapter ``e`` of ``weights``, which are not held: they would never expire."""
        if (made := self.made.get(e)) is None:
            made = self.made[e] = Prepared([None if w is None else w[e] for w in weights], *self._how)
        return made


_kept: Kept[Prepared] = Kept(Prepared)
_stacks: Kept[Stack] = Kept(Stack)


def clear() -> None:
    """Forget all parameters."""
    _kept.clear()
    _stacks.clear()


def _prepared(weights: Sequence[Any], compute: torch.dtype, scale: Tensor | float = 1.0) -> Prepared:
    isa = instruction_set()[0]
    assert isa is not None
    if isinstance(scale, Tensor):
        return _kept.get((*weights, scale), compute, isa)
    return _kept.get(weights, compute, isa, scale)


class Shares(NamedTuple):
    """Which rows each adapter of a call has: those at the positions from begin to end of ``order``."""

    adapters: list[tuple[Prepared, int, int]]  # begin and end
    order: Tensor | None = None  # int64 (T,), the numbers of the rows; None: all rows as they are
    without: int = 0  # how many, the first ones, have no adapter
    numbers: Sequence[int] = (0,)  # which adapters these are

    def given(self) -> tuple[list[tuple[Any, int, int]], int]:
        """The adapters and the order as the kernels take them."""
        adapters = [(prepared.kernels, begin, end) for prepared, begin, end in self.adapters]
        return adapters, 0 if self.order is None else self.order.data_ptr()


def _shares(index: Tensor, weights: Sequence[Any], count: int, call: Call) -> Shares:
    """The ``count`` rows sorted by adapter, where ``index`` has one for each row or for each sequence."""
    isa, n = instruction_set()[0], len(weights[2])
    each = count // max(1, index.numel())
    if index.dtype not in (torch.int32, torch.int64) or each * index.numel() != count:
        raise ValueError(f"index: expected integers for {count} rows, got {index.numel()} of {index.dtype}")
    index = index.to(torch.int64).contiguous()
    order = torch.empty(count, dtype=torch.int64, device="cpu")
    begins = _C.sort_rows(index.data_ptr(), index.numel(), each, n, order.data_ptr())
    if not begins:
        raise ValueError(f"index: expected values from -1 to {n - 1}, got {index.min().item()} to {index.max().item()}")
    stack = _stacks.get(weights, call.compute, isa, *(() if len(weights) > 6 else (call.scale,)))
    have = [e for e in range(n) if begins[e + 1] < begins[e + 2]]
    return Shares([(stack.of(weights, e), begins[e + 1], begins[e + 2]) for e in have], order, begins[1], have)


def forward(
    rows: Tensor,
    w: Sequence[Any],
    call: Call,
    save: bool = True,
    residual: Tensor | None = None,
    around: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, d), z (T, r) in ``call.compute``, mean and rstd (T,) of ``rows`` (T, d); only y without ``save``.

    Without LayerNorm mean and rstd are empty. ``around`` is what native_normed.py has the kernels do before and behind
    the adapter.
    """
    expect("x", rows, (len(rows), w[2].shape[1]))
    shares = Shares([(_prepared(w, call.compute, call.scale), 0, len(rows))])
    return _forward(rows, shares, w, call, save, residual, around)


def forward_several(
    rows: Tensor,
    weights: Sequence[Any],
    index: Tensor,
    call: Call,
    save: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``forward``, of several adapters in one call: ``weights`` and ``index`` are those of rows.py."""
    expect("x", rows, (len(rows), weights[2].shape[2]))
    return _forward(rows, _shares(index, weights, len(rows), call), weights, call, save, residual)


def _forward(
    rows: Tensor,
    shares: Shares,
    w: Sequence[Any],
    call: Call,
    save: bool,
    residual: Tensor | None,
    around: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, d = rows.shape
    rows = base = side_by_side(rows)
    if residual is not None:
        expect("residual", residual, (count, d))
        base = side_by_side(residual.to(rows.dtype))
    how, held = gating(count, call.gate, call.drop)
    y = torch.empty((count, d), dtype=rows.dtype, device="cpu")  # whatever the default device is
    kept = count if save else 0
    z = torch.empty((kept, w[2].shape[-2]), dtype=call.compute, device="cpu")
    of_norm = 0 if w[0] is None else kept
    mean, rstd = (torch.empty(of_norm, dtype=torch.float32, device="cpu") for _ in range(2))
    adapters, order = shares.given()
    if adapters:
        _C.forward(
            *(adapters, _C.DTYPES[_DTYPES[rows.dtype]], rows.stride(0), base.stride(0)),
            *(rows.data_ptr(), base.data_ptr(), y.data_ptr()),
            [t.data_ptr() if size else 0 for t, size in ((z, kept), (mean, of_norm), (rstd, of_norm))],
            *(order, how, call.eps, _C.ACTIVATIONS[call.activation], around, torch.get_num_threads()),
        )
    if shares.without:
        _copy_rows(shares, base, y)
        for t, size in (z, kept), (mean, of_norm), (rstd, of_norm):
            if size:
                _copy_rows(shares, None, t)
    del held
    return y, z, mean, rstd


def backward(
    dy: Tensor,
    rows: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Sequence[Any],
    call: Call,
    needed: Sequence[bool],
    residual: bool = False,
) -> list[Tensor | None]:
    """The gradients of x and the parameters that are ``needed`` (None for the others), each in its tensor's dtype.

    ``residual``: whether the forward had one; dx then lacks dy. After the seven ``needed`` comes that of a learned
    scale, then that of a gate.
    """
    given = inputs(dy, rows, z, mean, rstd, w)
    shares = Shares([(_prepared(w, call.compute, call.scale), 0, len(rows))])
    return _backward(given, shares, w, call, needed, residual)


def backward_several(
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
) -> list[Tensor | None]:
    """As ``backward``, of several adapters in one call: ``weights`` and ``index`` are those of rows.py."""
    given = inputs(dy, rows, z, mean, rstd, weights)
    shares = _shares(index, weights, len(rows), call)
    scales = call if len(weights) == 6 else call._replace(scale=weights[6])
    return _backward(given, shares, weights[:6], scales, needed, residual)


def _backward(
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    shares: Shares,
    w: Sequence[Any],
    call: Call,
    needed: Sequence[bool],
    residual: bool,
) -> list[Tensor | None]:
    rows, dy, *_ = given
    scale = call.scale
    count, stream = len(rows), _C.DTYPES[_DTYPES[rows.dtype]]
    of_scale, of_gate = needs_extra(needed, call)
    down = any(needed[1:5])  # which the kernels make together
    norm = down and w[0] is not None
    wanted = [norm, norm, down, down, needed[5] or of_scale, needed[6] or of_scale]
    dx = torch.empty(rows.shape, dtype=rows.dtype, device="cpu") if needed[0] else None
    d_gate = torch.empty(count, dtype=torch.float32, device="cpu") if of_gate else None
    # Adapters that have no rows have gradients of 0.
    new = torch.empty if shares.order is None or len(shares.adapters) == len(w[2]) else torch.zeros
    made = [
        new(p.shape, dtype=torch.float32, device="cpu") if want else None for p, want in zip(w, wanted, strict=True)
    ]
    how, held = gating(count, call.gate, call.drop)
    adapters, order = shares.given()
    if adapters:
        memory = torch.empty(_C.backward_bytes(adapters, stream), dtype=torch.uint8, device="cpu")
        first = [0 if t is None else t.data_ptr() for t in made]
        grads_of = [first]
        if shares.order is not None:
            steps = [0 if t is None else 4 * t.stride(0) for t in made]
            grads_of = [[at + e * step for at, step in zip(first, steps, strict=True)] for e in shares.numbers]
        _C.backward(
            *(adapters, stream, rows.stride(0), dy.stride(0)),
            [t.data_ptr() for t in given],
            *(order, how, _C.ACTIVATIONS[call.activation], residual),
            *(0 if t is None else t.data_ptr() for t in (dx, d_gate)),
            *(grads_of, memory.data_ptr(), torch.get_num_threads()),
        )
    del held
    if shares.without:
        if dx is not None:
            _copy_rows(shares, None if residual else dy, dx)
        if d_gate is not None:
            _copy_rows(shares, None, d_gate)
    grads: list[Tensor | None] = [
        scaled(g, _like(scale, g) if i > 3 else 1.0).to(p.dtype) if g is not None and want else None
        for i, (g, p, want) in enumerate(zip(made, w, needed[1:7], strict=True))
    ]
    if isinstance(scale, Tensor):
        products = [
            (g.double() * p).flatten(scale.dim()).sum(-1)
            for g, p in zip(made[4:], w[4:6], strict=True)
            if g is not None
        ]
        grads.append((products[0] + products[1]).to(scale.dtype) if of_scale else None)
    return [dx, *grads, *([d_gate] if call.gate is not None else [])]


def _like(scale: Tensor | float, g: Tensor) -> Tensor | float:
    """A scale for each of the gradients that ``g`` has stacked."""
    return scale.view(-1, *[1] * (g.dim() - 1)) if isinstance(scale, Tensor) and scale.dim() else scale


def _copy_rows(shares: Shares, source: Tensor | None, to: Tensor) -> None:
    """To the rows without an adapter, of ``source`` or zeros."""
    assert shares.order is not None
    size, given = to.element_size(), (0, 0) if source is None else (source.data_ptr(), source.stride(0))
    row = size * (to.numel() // len(to))
    where = shares.order.data_ptr(), shares.without
    _C.copy_rows(*where, given[0], size * given[1], to.data_ptr(), row, torch.get_num_threads())
