"""For the tests that run in Triton's interpreter: gradients of the operator, and a recording without a GPU."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
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


def set_sms(monkeypatch: pytest.MonkeyPatch, sms: int) -> None:
    """The device has ``sms`` multiprocessors, and a second launch costs nothing: small shapes split their columns."""
    from adapterkern.ops.kernels import backward, forward, hidden, tiles  # which decides whether Triton interprets

    for module in (forward, backward):
        monkeypatch.setattr(module, "multiprocessors", lambda device: sms)
    monkeypatch.setattr(tiles, "LAUNCH_BYTES", 0)
    for module in (forward, hidden):
        monkeypatch.setattr(module, "column_split", tiles.column_split.__wrapped__)


def assert_equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
