"""Adapter: fused and plain modules give the same numbers; its initializations."""

import copy
import inspect
from typing import Any

import pytest
import torch

import adapterkern as ak
from adapterkern.model.adapter import INITS
from tests.support.numerics import relative_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "tanh", "identity"])
def test_fused_and_modules_agree(activation: str, dtype: torch.dtype) -> None:
    adapter = ak.Adapter(32, 8, activation=activation, init="xavier")
    x = torch.randn(2, 5, 32).to(dtype)
    fused = adapter(x)
    adapter.fused = False
    assert fused.dtype == dtype == adapter(x).dtype
    assert relative_error(fused, adapter(x)) <= 2 * torch.finfo(dtype).eps


def test_unfused_runs_the_submodules_themselves() -> None:
    adapter = ak.Adapter(8, 2, fused=False)
    called = []
    for name in ("norm", "down", "up"):
        getattr(adapter, name).register_forward_hook(lambda *_, name=name: called.append(name))
    adapter(torch.randn(3, 8))
    assert called == ["norm", "down", "up"]


def test_environment_turns_the_fused_path_off(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ak.Adapter(8, 2)
    called = []
    adapter.down.register_forward_hook(lambda *_: called.append("down"))
    adapter(torch.randn(3, 8))
    assert called == []
    monkeypatch.setenv("ADAPTERKERN_FUSED", "0")
    adapter(torch.randn(3, 8))
    assert called == ["down"]


def test_identity_init_changes_nothing_and_still_learns() -> None:
    adapter = ak.Adapter(16, 4)
    x = torch.randn(3, 16)
    assert torch.equal(adapter(x), x)
    adapter(x).square().sum().backward()
    assert adapter.up.weight.grad is not None
    assert adapter.up.weight.grad.norm() > 0


def test_xavier_init_has_its_variance() -> None:
    adapter = ak.Adapter(512, 128, init="xavier")
    expected = (2 / (512 + 128)) ** 0.5
    for weight in (adapter.down.weight, adapter.up.weight):
        assert weight.std().item() == pytest.approx(expected, rel=0.02)


def test_svd_init_is_the_best_low_rank_map_of_a_matrix() -> None:
    d, r = 24, 5
    matrix = torch.randn(d, d)
    adapter = ak.Adapter(d, r)
    adapter.reset_parameters("svd", matrix)
    U, S, Vt = torch.linalg.svd(matrix.double())
    best = U[:, :r] @ torch.diag(S[:r]) @ Vt[:r]
    assert relative_error(adapter.up.weight @ adapter.down.weight, best) < 5e-6
    # Split evenly: the factors' singular values are the same.
    factors = [torch.linalg.svdvals(w) for w in (adapter.up.weight, adapter.down.weight)]
    torch.testing.assert_close(factors[0], factors[1])


def test_svd_init_of_a_random_matrix() -> None:
    singular = torch.linalg.svdvals(ak.Adapter(256, 16, init="svd").up.weight.detach())
    assert singular[0] < 1.5  # the largest singular value of a Xavier-normal matrix is near 2, split evenly √2
    assert singular[-1] > 1


@pytest.mark.parametrize("init", INITS)
def test_init_is_deterministic_and_biases_are_zero(init: str) -> None:
    adapters = []
    for _ in range(2):
        torch.manual_seed(3)
        adapters.append(ak.Adapter(16, 4, init=init))
    for a, b in zip(adapters[0].parameters(), adapters[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not adapters[0].down.bias.any()
    assert not adapters[0].up.bias.any()


def test_x_free_keeps_y_alone() -> None:
    """Large enough for the operator on a CPU. y is what the next module keeps; x is then free to go."""
    adapter = ak.Adapter(4096, 16, init="xavier", x_free=True)
    x = torch.randn(512, 4096, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = adapter(x)
    large = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert large == {y.data_ptr()}
    y.square().sum().backward()
    expected = torch.autograd.grad(ak.adapter(x, *adapter.parameters()).square().sum(), [x, *adapter.parameters()])
    for name, got, e in zip(
        ["x", *dict(adapter.named_parameters())], [x, *adapter.parameters()], expected, strict=True
    ):
        assert got.grad is not None
        assert relative_error(got.grad, e) < 1e-5, name


def test_deepcopy_and_state_dict() -> None:
    adapter = ak.Adapter(8, 2, init="xavier")
    other = copy.deepcopy(adapter)
    assert set(other.state_dict()) == {
        f"{module}.{kind}" for module in ("norm", "down", "up") for kind in ("weight", "bias")
    }
    x = torch.randn(2, 8)
    assert torch.equal(other(x), adapter(x))


def test_module_errors() -> None:
    with pytest.raises(ValueError, match="adapter_dim: expected an integer from 1 to 512, got 513"):
        ak.Adapter(8, 513)
    with pytest.raises(ValueError, match="adapter_dim: expected at most hidden_size=8 with init='svd', got 9"):
        ak.Adapter(8, 9, init="svd")
    with pytest.raises(ValueError, match=r"matrix: expected shape \(8, 8\)"):
        ak.Adapter(8, 2).reset_parameters("svd", torch.zeros(4, 8))


@pytest.mark.parametrize(
    "name", [name for name in inspect.signature(ak.Adapter).parameters if name not in ("device", "dtype")]
)
def test_every_argument_is_checked(name: str) -> None:
    given: dict[str, Any] = {"hidden_size": 8, "adapter_dim": 4, name: object()}
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        ak.Adapter(**given)
