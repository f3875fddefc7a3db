"""The hand-derived backward is autograd's, and the equations are those of the stock modules, in fp64."""

import pytest
import torch
from torch import Tensor, nn

from adapterkern.ops.dropout import Drop
from adapterkern.ops.reference import (
    ACTIVATIONS,
    Weights,
    adapter_backward,
    adapter_eager,
    adapter_forward,
    gate_gradient,
    scale_gradient,
)
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error
from tests.support.variants import SEED, VARIANTS, eager, evaluate, make_case

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


@pytest.mark.parametrize("distribution", ["normal", "mean 100 sigma", "constant rows"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_residual_a_scale_and_no_norm(variant: str, distribution: str) -> None:
    case = make_case(variant, T, D, R, torch.float64, distribution).to(torch.float64)
    _, with_residual, _, learned, gated = VARIANTS[variant]
    expected = evaluate(eager, case)
    x, w, residual, scale, dy, gate, rate = case
    mask = Drop(rate, torch.tensor(SEED)).mask(T, R, torch.float64) if rate else None
    forward = adapter_forward(x, w, residual=residual, scale=scale, gate=gate, mask=mask)
    back = adapter_backward(dy, x, forward, w, residual=with_residual, scale=scale, gate=gate, mask=mask)
    got = {"y": forward.y, **back._asdict()}
    got |= {"residual": dy} if with_residual else {}
    got |= {"scale": scale_gradient(dy, forward, w, gate=gate, mask=mask)[None]} if learned else {}
    got |= {"gate": gate_gradient(dy, forward, w, scale=scale, mask=mask)} if gated else {}
    assert {name for name, g in got.items() if g is not None} == expected.keys()
    for name, e in expected.items():
        assert relative_error(got[name], e) < 1e-11, name


def test_all_of_them_pass_gradcheck() -> None:
    leaves = make_case("all", 3, 5, 2, torch.float64).to(torch.float64).leaves()
    mask = Drop(0.3, torch.tensor(SEED)).mask(3, 2, torch.float64)

    def forward(x: Tensor, *rest: Tensor) -> Tensor:
        *weights, residual, scale, gate = rest
        more = {"residual": residual, "scale": scale, "gate": gate, "mask": mask}
        return adapter_forward(x, Weights(None, None, *weights), **more).y

    assert torch.autograd.gradcheck(forward, tuple(leaves.named().values()))


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
