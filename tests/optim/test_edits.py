"""What users do to groups, state and gradients between steps: as under torch.optim.AdamW."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterkern.optim import ClippedAdamW


def moved(o: Any) -> None:
    o.param_groups[1]["params"].insert(0, o.param_groups[0]["params"].pop())


def appended(o: Any) -> None:
    first = o.param_groups[0]
    o.param_groups.append({**first, "params": [first["params"].pop()], "lr": 0.0})


def dropped(o: Any) -> None:
    del o.param_groups[0]


def merged(o: Any) -> None:
    o.param_groups[0]["params"] += o.param_groups.pop()["params"]


@pytest.mark.parametrize("edit", [moved, appended, dropped, merged])
@pytest.mark.parametrize("fused", ["1", "0"])
def test_groups_that_are_edited(edit: Callable[[Any], None], fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKERN_FUSED", fused)

    def run(kind: Any, **more: Any) -> list[Tensor]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(4)]
        groups: list[Any] = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.01}]
        optimizer = kind(groups, weight_decay=0.0, **more)
        for step in range(4):
            if step == 2:
                edit(optimizer)
            for p in params[1:]:  # the first has none
                p.grad = torch.randn(5)
            optimizer.step()
        return [p.detach() for p in params]

    for got, expected in zip(run(ClippedAdamW, max_norm=None), run(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "master"])
def test_a_state_whose_memory_is_replaced(name: str) -> None:
    """By an assignment to ``.data``, which leaves the tensor the same: what it was is not written to."""
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = ClippedAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[p][name]
    before, kept = state.data, state.clone()
    state.data = kept.clone()
    optimizer.step()
    assert torch.equal(before, kept)
    assert not torch.equal(state, kept)


def test_a_state_that_is_another_view_of_its_memory() -> None:
    def run(kind: Any, **more: Any) -> Tensor:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.ones(3, 3))
        optimizer = kind([p], lr=0.1, **more)
        for step in range(4):
            if step == 2:
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].t()
            p.grad = torch.randn(3, 3)
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(run(ClippedAdamW, max_norm=None), run(torch.optim.AdamW), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_a_view_of_its_negative() -> None:
    p, values = torch.nn.Parameter(torch.zeros(6)), torch.randn(6)
    p.grad = torch._neg_view(values)
    ClippedAdamW([p], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(p.detach(), 0.1 * values.sign(), rtol=1e-5, atol=0)
    q = torch.nn.Parameter(torch._neg_view(torch.zeros(6)))
    q.grad = torch.ones(6)
    with pytest.raises(ValueError, match="parameter 0 of group 0: expected a tensor of its own values"):
        ClippedAdamW([q]).step()


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5])
def test_a_small_beta1_keeps_small_gradients(beta1: float) -> None:
    """Beside a first moment that is far larger, which fades at once."""
    p = torch.nn.Parameter(torch.zeros(64))
    optimizer = ClippedAdamW([p], betas=(beta1, 0.999), max_norm=None)
    exact = torch.zeros(64, dtype=torch.float64)
    torch.manual_seed(0)
    for scale in (1.0, 1e-7, 1e-7):
        p.grad = scale * torch.randn(64)
        exact = beta1 * exact + (1 - beta1) * p.grad.double()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), exact, rtol=1e-5, atol=0)
