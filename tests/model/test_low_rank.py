"""Low-rank adapters and stacks: what they compute with the operator, and their initialization. See test_kernels.py."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkern as ak
from adapterkern.model.low_rank import init_from_weights
from adapterkern.ops import operator
from tests.support.numerics import relative_error
from tests.support.tiny_llama import tiny


@pytest.fixture
def _operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs as small as these go through the operator all the same."""
    monkeypatch.setattr(operator, "prefers_eager", lambda *_: False)


def best(matrix: Tensor, r: int) -> Tensor:
    U, S, Vt = torch.linalg.svd(matrix.double())
    return (U[:, :r] * S[:r]) @ Vt[:r]


def product(adapter: ak.Adapter) -> Tensor:
    return adapter.up.weight.double() @ adapter.down.weight.double()


@given(d=st.integers(1, 90), data=st.data(), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_svd_init_is_the_best_map_to_fp32_s_rounding(d: int, data: st.DataObject, scale: float) -> None:
    r = data.draw(st.integers(1, d))
    matrix = scale * torch.randn(d, d, generator=torch.Generator().manual_seed(d))
    adapter = ak.Adapter(d, r, activation="identity")
    adapter.reset_parameters("svd", matrix)
    expected = best(matrix, r)
    assert (product(adapter) - expected).norm() <= 2**-23 * expected.norm()
    assert not adapter.down.bias.any()
    assert not adapter.up.bias.any()


def test_svd_init_where_singular_values_lie_close() -> None:
    """An fp32 SVD has an error of 7e-6 here: its vectors of nearly equal singular values are inaccurate."""
    matrix = torch.randn(300, 300)
    adapter = ak.Adapter(300, 40)
    adapter.reset_parameters("svd", matrix)
    assert relative_error(product(adapter), best(matrix, 40)) < 1.2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("_operator")
def test_a_low_rank_adapter_adds_its_map_of_the_normalized_input(dtype: torch.dtype) -> None:
    matrix = torch.randn(48, 48) / 7
    adapter = ak.Adapter(48, 6, activation="identity")
    adapter.reset_parameters("svd", matrix)
    x = (3 + 2 * torch.randn(5, 7, 48)).to(dtype).requires_grad_()
    y = adapter(x)
    exact = x.detach().double().requires_grad_()
    normed = (exact - exact.mean(-1, keepdim=True)) / (exact.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = exact + normed @ best(matrix, 6).T
    tolerance = 8 * torch.finfo(dtype).eps
    assert relative_error(y, expected) < tolerance
    dy = torch.randn(5, 7, 48)
    (got,) = torch.autograd.grad(y, x, dy.to(dtype))
    (wanted,) = torch.autograd.grad(expected, exact, dy.to(dtype).double())
    assert relative_error(got, wanted) < tolerance


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.usefixtures("_operator")
def test_a_stack_is_its_adapters_one_after_the_other(activation: str) -> None:
    """Through the operator against the modules one by one, in fp64: outputs, and each adapter's gradients."""
    stack = nn.Sequential(*(ak.Adapter(24, 5, activation=activation, init="xavier") for _ in range(3)))
    x, dy = torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    got = torch.autograd.grad(stack(x), list(stack.parameters()), dy)
    y = stack(x)
    stack.double()
    exact = x.double()
    adapter: Any  # an ak.Adapter; a Sequential's modules are Module to torch
    for adapter in stack:
        z = adapter.down(adapter.norm(exact))
        exact = exact + adapter.up(z if activation == "identity" else torch.nn.functional.silu(z))
    assert relative_error(y, exact) < 1e-6
    wanted = torch.autograd.grad(exact, list(stack.parameters()), dy.double())
    for (name, _), g, w in zip(stack.named_parameters(), got, wanted, strict=True):
        assert relative_error(g, w) < 3e-6, name


@pytest.mark.parametrize("position", ["layer", "attention"])
@pytest.mark.usefixtures("_operator")
def test_stacks_in_a_model(position: str) -> None:
    """Fused and unfused agree on loss and gradients, and every adapter of a stack gets one."""
    config = ak.AdapterConfig(
        adapter_dim=4, depth=2, activation="identity", init="xavier", position=position, layers=(0, -1)
    )
    model = ak.LlamaAdapter(tiny(), config)
    assert [len(site) for site in model.adapters["default"].values()] == [2, 2]  # type: ignore[operator]  # Tensor | Module to torch
    ids = torch.arange(12).view(2, 6)
    outcomes = []
    for fused in (True, False):
        model.fused = fused
        loss = model(input_ids=ids, labels=ids).loss
        outcomes.append([loss, *torch.autograd.grad(loss, model.adapter_parameters())])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert a.any()


def test_weights_are_given_by_layer_and_place() -> None:
    model = ak.LlamaAdapter(tiny(), ak.AdapterConfig(adapter_dim=3, depth=2, activation="identity"))
    d, count = model.config.hidden_size, len(model.layers)
    before = [p.clone() for p in model.adapters["default"]["0"].parameters()]
    matrices = torch.randn(4, d, d)
    init_from_weights(model, {1: matrices[:2], -1: [matrices[2].bfloat16(), matrices[3].double()]})
    for site, place, matrix in ((1, 0, matrices[0]), (1, 1, matrices[1]), (count - 1, 1, matrices[3])):
        assert relative_error(product(model.adapters["default"][str(site)][place]), best(matrix, 3)) < 1.2e-7
    last = product(model.adapters["default"][str(count - 1)][0])
    assert relative_error(last, best(matrices[2].bfloat16(), 3)) < 1.2e-7
    assert all(torch.equal(a, b) for a, b in zip(before, model.adapters["default"]["0"].parameters(), strict=True))


def test_weights_that_do_not_fit_change_nothing() -> None:
    model = ak.LlamaAdapter(tiny(), ak.AdapterConfig(adapter_dim=3, layers=(1, 2)))
    d = model.config.hidden_size
    before = [p.clone() for p in model.adapter_parameters()]
    for weights, message in (
        ({1: torch.eye(d), 0: torch.eye(d)}, r"weights: expected layers among \[1, 2\], got 0"),
        (
            {1: torch.eye(d), 2: torch.full((d, d), torch.nan)},
            "weights: expected finite numbers, got inf or nan for layer 2",
        ),
        ({1: torch.ones(d, 2)}, rf"weights: expected 1 of shape \({d}, {d}\) for layer 1, got \[\({d}, 2\)\]"),
        ({1: torch.ones(2, d, d)}, "for layer 1, got"),
    ):
        with pytest.raises(ValueError, match=message):
            init_from_weights(model, weights)
    with pytest.raises(ValueError, match="name: expected one of default, got 'other'"):
        init_from_weights(model, {}, "other")
    assert all(torch.equal(a, b) for a, b in zip(before, model.adapter_parameters(), strict=True))
    with model.disable_adapter():  # it is still the default
        init_from_weights(model, {1: torch.eye(d), 2: torch.eye(d)})
    assert not any(torch.equal(a, b) for a, b in zip(before, model.adapter_parameters(), strict=True) if a.dim() == 2)


def test_svd_fills_no_more_dimensions_than_there_are() -> None:
    with pytest.raises(ValueError, match="adapter_dim: expected at most hidden_size=32 with init='svd', got 40"):
        ak.AdapterConfig(adapter_dim=40, init="svd").resolve(32, 2)
    assert ak.AdapterConfig(init="svd", max_params=1_000_000).resolve(32, 2).adapter_dim == 32
    adapter = ak.Adapter(8, 9, init="xavier")
    before = [p.clone() for p in adapter.parameters()]
    with pytest.raises(ValueError, match="adapter_dim: expected at most hidden_size=8"):
        adapter.reset_parameters("svd")
    assert all(map(torch.equal, before, adapter.parameters()))
