"""The hand-derived backward is autograd's, and the equations are those of the stock modules, in fp64."""

import pytest
import torch
from torch import nn

from adapterkern.ops.reference import ACTIVATIONS, Weights, adapter_backward, adapter_eager, adapter_forward
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error

T, D, R = 6, 10, 4


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_closed_form_equals_autograd(activation: str, distribution: str) -> None:
    x = DISTRIBUTIONS[distribution](torch.randn(T, D, dtype=torch.float64)).requires_grad_()
    weights = Weights(*(w.requires_grad_() for w in make_weights(D, R, torch.float64)))
    dy = torch.randn(T, D, dtype=torch.float64)

    y = adapter_eager(x, weights, activation=activation)
    expected = torch.autograd.grad(y, (x, *weights), dy)
    with torch.no_grad():
        forward = adapter_forward(x, weights, activation=activation)
        got = adapter_backward(dy, x, forward, weights, activation=activation)

    assert relative_error(forward.y, y) < 1e-14
    for name, g, e in zip(got._fields, got, expected, strict=True):
        assert relative_error(g, e) < 1e-11, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_derivative_passes_gradcheck(activation: str) -> None:
    # Away from relu's kink, where finite differences have no meaning.
    z = torch.linspace(-6, 6, 40, dtype=torch.float64).requires_grad_()
    act = ACTIVATIONS[activation]
    assert torch.autograd.gradcheck(act.fn, z)
    (expected,) = torch.autograd.grad(act.fn(z).sum(), z)
    torch.testing.assert_close(act.derivative(z.detach()), expected, rtol=1e-12, atol=1e-14)


def test_forward_passes_gradcheck() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights = [w.requires_grad_() for w in make_weights(5, 2, torch.float64)]
    assert torch.autograd.gradcheck(lambda x, *w: adapter_forward(x, Weights(*w)).y, (x, *weights))


def test_equals_the_stock_modules() -> None:
    norm, down, up = nn.LayerNorm(D), nn.Linear(D, R), nn.Linear(R, D)
    weights = Weights(norm.weight, norm.bias, down.weight, down.bias, up.weight, up.bias)
    x = torch.randn(2, 3, D)
    expected = x + up(nn.functional.silu(down(norm(x))))
    torch.testing.assert_close(adapter_eager(x, weights), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_keeps_its_dtype(dtype: torch.dtype) -> None:
    weights = make_weights(D, R, dtype)
    x, dy = torch.randn(2, T, D).to(dtype)
    forward = adapter_forward(x, weights)
    assert {t.dtype for t in (*forward, *adapter_backward(dy, x, forward, weights))} == {dtype}
