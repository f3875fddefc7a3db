"""The traffic meter: bytes that kernels load and store, counted exactly, in units of T·d·(bytes per element).

Our kernels run in Triton's interpreter, where every load and store passes through two functions; each is counted
without its masked lanes, under the argument that it points into. Eager PyTorch is counted per operation: inputs and
outputs of every operation that is not a view. L2 hits are counted like everything else: the fused forward's second read
of x is one of its three units.

``activations`` are x, y and their gradients; ``weights`` the prepared weights, which are read from L2; ``rows``
everything of size T×r; ``fixed`` what does not grow with T (weight preparation, partial sums, parameter gradients), in
units of the parameters' bytes.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from adapterkern.ops.kernels import cache, launch
from adapterkern.ops.reference import Weights, adapter_eager
from bench.report import traffic_table

_KIND = {
    **dict.fromkeys(("p_x", "p_residual", "p_y", "p_n", "p_dy", "p_dn", "p_dx"), "activations"),
    **dict.fromkeys(("p_a", "p_asum", "p_c", "p_w", "p_bias", "p_weight"), "weights"),
    **dict.fromkeys(("p_z", "p_mean", "p_rstd", "p_dz", "p_h", "p_c1", "p_c2", "p_dh", "p_acc", "p_moments"), "rows"),
    **dict.fromkeys(("p_index", "p_order", "p_bounds", "p_s_tiles", "p_q_tiles", "p_worst"), "rows"),
    **dict.fromkeys(("p_gate", "p_dgate", "p_by_bias", "p_seed"), "rows"),
}
_FIXED_KERNELS = ("_prepare_kernel", "reduce_kernel")


@dataclass
class Traffic:
    """Bytes per kind, and launches."""

    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def total(self, kind: str) -> int:
        """Bytes of one kind, loaded or stored."""
        return self.loads[kind] + self.stores[kind]


def _end(t: Tensor) -> int:
    """The address after the last element."""
    return t.data_ptr() + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


@contextmanager
def metered() -> Iterator[Traffic]:
    """Inside the block, count what interpreted kernels load and store."""
    traffic = Traffic()
    spans: list[tuple[int, int, str]] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def count(counter: Counter[str], ptrs: Any, mask: Any) -> None:
        active = ptrs.data[mask.data.astype(bool)]
        if active.size:
            address = int(active.flat[0])
            kind = next(kind for lo, hi, kind in spans if lo <= address < hi)
            counter[kind] += active.size * ptrs.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        count(traffic.loads, ptrs, mask)
        return load(self, ptrs, mask, *args)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        count(traffic.stores, ptrs, mask)
        return store(self, ptrs, value, mask, *args)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        traffic.launches[name] += 1
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        spans[:] = [
            (t.data_ptr(), _end(t), "fixed" if name in _FIXED_KERNELS else _KIND.get(arg, "fixed"))
            for arg, t in given.items()
            if isinstance(t, Tensor)
        ]
        call(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(executor, "__call__", counted_call),
    ):
        yield traffic


class _Operations(TorchDispatchMode):
    """Adds up the inputs and outputs of every operation that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.count = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.nbytes for t in tensors)
            self.count += 1
        return out


@dataclass(frozen=True)
class Row:
    """One line of the table, in units of T·d·(bytes per element); ``fixed`` in units of the parameters' bytes."""

    name: str
    activations: float
    weights: float
    rows: float
    fixed: float
    launches: int


def make_case(T: int, d: int, r: int, device: str = "cpu") -> tuple[Tensor, Tensor, Weights]:
    """x and dy in bf16, and fp32 parameters."""
    x, dy = (torch.randn(T, d, device=device).bfloat16() for _ in range(2))
    shapes = ((d,), (d,), (r, d), (r,), (d, r), (d,))
    return x, dy, Weights(*(torch.randn(s, device=device) / s[-1] ** 0.5 for s in shapes))


def ours(T: int, d: int, r: int, *, x_free: bool = False) -> list[Row]:
    """Weight preparation, forward and backward through the kernels, with every gradient."""
    dtype = torch.bfloat16
    x, dy, weights = make_case(T, d, r)
    unit, parameters = x.nbytes, sum(w.nbytes for w in weights)

    def row(name: str, t: Traffic) -> Row:
        activations, weights, rows = (t.total(kind) / unit for kind in ("activations", "weights", "rows"))
        return Row(name, activations, weights, rows, t.total("fixed") / parameters, sum(t.launches.values()))

    cache.clear()
    with metered() as preparation:
        cache.prepared_weights(weights, dtype)
    with metered() as forward:
        y, z, mean, rstd = launch.adapter_forward(
            x, weights, None, eps=1e-5, activation="silu", compute=dtype, save=True
        )
    with metered() as backward:
        launch.adapter_backward(
            dy, y if x_free else x, z, mean, rstd, weights, None, activation="silu", needed=[True] * 7, x_free=x_free
        )
    mark = " x-free" if x_free else ""
    return [
        row("weights, once a step", preparation),
        row("ours forward", forward),
        row(f"ours backward{mark}", backward),
    ]


def _under_cuda_autocast(x: Tensor, w: Weights) -> Tensor:
    """The casts of torch.autocast("cuda", torch.bfloat16), written out: LayerNorm in fp32, products in bf16."""
    normed = F.layer_norm(x.float(), x.shape[-1:], w.norm_weight, w.norm_bias)
    low = torch.bfloat16
    h = F.silu(F.linear(normed.to(low), w.down_weight.to(low), w.down_bias.to(low)))
    return x + F.linear(h, w.up_weight.to(low), w.up_bias.to(low))


def eager(T: int, d: int, r: int) -> list[Row]:
    """PyTorch's own operations, in pure bf16 and with CUDA autocast's casts; everything counts as activations.

    They run on meta tensors, so T may be as large as in practice.
    """
    rows = []
    for name, function, dtype in (
        ("eager bf16", adapter_eager, torch.bfloat16),
        ("eager autocast", _under_cuda_autocast, torch.float32),
    ):
        x, dy, weights = make_case(T, d, r, "meta")
        leaves = [t.requires_grad_() for t in (x, *(w.to(dtype) for w in weights))]
        rows += _eager_rows(name, function, leaves, dy)
    return rows


def _eager_rows(name: str, function: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> list[Row]:
    unit = dy.nbytes
    with _Operations() as forward:
        y = function(leaves[0], Weights(*leaves[1:]))
    with _Operations() as backward:
        torch.autograd.grad(y, leaves, dy)
    return [
        Row(f"{name} {p}", o.bytes / unit, 0, 0, 0, o.count) for p, o in (("forward", forward), ("backward", backward))
    ]


def main(argv: list[str]) -> None:
    """``python -m bench traffic``: print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench traffic", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("-T", "--rows", type=int, default=128, help="rows of our kernels; eager has 8192")
    parser.add_argument("-d", "--hidden-size", type=int, default=4096)
    parser.add_argument("-r", "--adapter-dim", type=int, default=64)
    args = parser.parse_args(argv)
    shape = (args.rows, args.hidden_size, args.adapter_dim)
    floors = [Row("floor forward", 2, 0, 0, 0, 1), Row("floor backward", 3, 0, 0, 0, 1)]
    rows = [*eager(8192, *shape[1:]), *ours(*shape), ours(*shape, x_free=True)[2], *floors]

    print("Units of T·d·2 bytes; `fixed` in units of the parameters' bytes")
    counted = {"T": shape[0], "d": shape[1], "r": shape[2], "rows": [vars(row) for row in rows]}
    print(traffic_table(counted, fixed=True))
    by_name = {row.name: row for row in rows}
    for name in ("eager bf16", "eager autocast"):
        ratios = [
            by_name[f"{name} {p}"].activations / by_name[f"ours {p}"].activations for p in ("forward", "backward")
        ]
        print(f"{name} moves {ratios[0]:.1f} times ours forward and {ratios[1]:.1f} times backward")
    if args.json:
        args.json.write_text(json.dumps(counted, indent=1))
