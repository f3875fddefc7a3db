"""The CPU kernels on a few odd shapes, as small as they can be: run with sanitizers by test_native_builds.py.

Rows on both sides of a block (32) and a chunk (128), columns of a panel (32), a slice (256) and what is packed at once
(128 or 256), r of 32; the last rows and columns of every tensor end where its memory ends.
"""

import pytest
import torch

from adapterkern.ops import native, native_normed
from adapterkern.ops.call import Call
from tests.ops.test_native import ROUTES, check, isa, routed, run
from tests.support.numerics import make_weights

__all__ = ["isa"]  # the fixture: each test runs with each instruction set

SHAPES = [(1, 1, 1, "silu"), (33, 70, 5, "gelu"), (131, 33, 33, "relu"), (3, 289, 70, "tanh"), (0, 40, 3, "identity")]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape: tuple[int, int, int, str], dtype: torch.dtype, compute: torch.dtype) -> None:
    T, d, r, activation = shape
    check(torch.randn(T, d).to(dtype), make_weights(d, r), torch.randn(T, d).to(dtype), compute, activation)


def test_rows_of_a_view_and_two_threads() -> None:
    x, dy, w, before = torch.randn(70, 80)[::2, 5:], torch.randn(35, 1).expand(35, 75), make_weights(75, 5), 1
    alone = run(x, w, dy, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        native.clear()
        both = run(x, w, dy, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_rows_of_several_adapters(route: tuple[int, int, int, int, str]) -> None:
    for dtype, compute in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        routed(native, *route, dtype, compute, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sum_before_and_a_norm_behind(shape: tuple[int, int, int, str], dtype: torch.dtype) -> None:
    T, d, r, activation = shape
    x, added, dy, dn = torch.randn(4, T, d).to(dtype)
    w, weight = make_weights(d, r), torch.randn(d)
    call = Call(1e-5, activation, torch.float32 if dtype == torch.float16 else dtype)
    y, n, s, z, mean, rstd, rho = native_normed.forward(x, added, w, weight, 1e-6, call, True)
    assert n.isfinite().all()
    dy = dy + native_normed.norm_backward(dn, y, rho, weight)
    grads = native.backward(dy, s, z, mean, rstd, w, call, [True] * 7)
    assert all(g is not None and g.isfinite().all() for g in grads)
