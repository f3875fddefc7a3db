"""The operator's inputs and results on a GPU, against fp64 and in CUDA graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops import adapter_and_norm
from adapterkern.ops.reference import Weights
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error

NAMES = ["y", "x", *Weights._fields]


def draw(T: int, d: int, r: int, dtype: torch.dtype, distribution: str = "normal") -> tuple[Tensor, Weights, Tensor]:
    x = DISTRIBUTIONS[distribution](torch.randn(T, d, dtype=torch.float64)).to("cuda", dtype)
    return x, Weights(*(w.cuda() for w in make_weights(d, r))), torch.randn(T, d).to("cuda", dtype)


def value_and_grads(x: Tensor, weights: Weights, dy: Tensor, **kwargs) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    y = ak.adapter(*leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def check(x: Tensor, weights: Weights, dy: Tensor, **kwargs) -> None:  # type: ignore[no-untyped-def]
    stock = {k: v for k, v in kwargs.items() if k != "x_free"} | {"fused": False}
    true = value_and_grads(x.double(), Weights(*(w.double() for w in weights)), dy.double(), **stock)
    ours, theirs = value_and_grads(x, weights, dy, **kwargs), value_and_grads(x, weights, dy, **stock)
    for name, o, t, e in zip(NAMES, ours, theirs, true, strict=True):
        assert relative_error(o, e) <= 2 * relative_error(t, e) + 4 * torch.finfo(x.dtype).eps, name


def check_normed(x: Tensor, weights: Weights, dy: Tensor) -> None:
    """The same with an RMSNorm that follows, whose output has a gradient as y has."""
    weight, dn = torch.randn(x.shape[-1], device="cuda", dtype=x.dtype), torch.randn_like(dy)

    def run(dtype: torch.dtype | None, fused: bool) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, *weights)]
        call: Any = adapter_and_norm
        outputs = call(*leaves, weight.to(dtype or weight.dtype), fused=fused)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(outputs[0].dtype) for g in (dy, dn)])]

    ours, theirs, true = run(None, True), run(None, False), run(torch.float64, False)
    for name, o, t, e in zip(["y", "n", *NAMES[1:]], ours, theirs, true, strict=True):
        assert relative_error(o, e) <= 2 * relative_error(t, e) + 4 * torch.finfo(x.dtype).eps, name


def record(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of ``run``, which has run once before, and what it computes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


def assert_equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)
