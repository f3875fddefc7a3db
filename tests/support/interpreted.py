"""For the tests that run in Triton's interpreter: gradients of the operator, and a recording without a GPU."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops.reference import Weights

Recording = Callable[[], AbstractContextManager[None]]


def value_and_grads(x: Tensor, weights: list[Tensor] | Weights, dy: Tensor, **kwargs) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    y = ak.adapter(*leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def exact(x: Tensor, weights: list[Tensor] | Weights, dy: Tensor, **kwargs) -> list[Tensor]:  # type: ignore[no-untyped-def]
    return value_and_grads(x.double(), [w.double() for w in weights], dy.double(), fused=False, **kwargs)


def parameters(m: ak.Adapter) -> list[Tensor]:
    return [m.norm.weight, m.norm.bias, m.down.weight, m.down.bias, m.up.weight, m.up.bias]


def assert_equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
