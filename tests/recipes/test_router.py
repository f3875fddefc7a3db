"""The router: its choices, its two losses by hand, and its gradients in fp64."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapterkern.recipes.routing.router import (
    GATES,
    Route,
    Router,
    RoutingConfig,
    balance_loss,
    choice_counts,
    run_probability,
)


def router_of(**values: Any) -> Router:
    return Router(8, RoutingConfig(**({"experts": 3, "gate": "probability"} | values)))


# Choices


@pytest.mark.parametrize(
    ("scores", "top_k", "expected"),
    [
        ([3.0, 1.0, 2.0, 0.0], 1, [0]),
        ([3.0, 1.0, 2.0, 4.0], 1, [-1]),
        ([3.0, 1.0, 2.0, 0.0], 2, [0, 2]),
        ([3.0, 1.0, 2.0, 2.5], 2, [0, -1]),
        ([3.0, 1.0, 2.0, 9.0], 3, [-1, -1, -1]),
    ],
)
def test_the_best_experts_above_none_run_with_their_probability(
    scores: list[float], top_k: int, expected: list[int]
) -> None:
    route = router_of(top_k=top_k).choose(torch.tensor([scores]))
    assert route.chosen.tolist() == [expected]
    p = torch.tensor(scores).softmax(0)
    torch.testing.assert_close(route.weight[0], torch.stack([p[i] if i >= 0 else torch.tensor(0.0) for i in expected]))


def test_without_skip_something_always_runs() -> None:
    router = router_of(skip=False, top_k=2)
    route = router(torch.randn(5, 4, 8), torch.ones(5, 4))
    assert route.scores.shape == (5, 3)
    assert (route.chosen >= 0).all()
    assert run_probability(route, 3).item() == pytest.approx(1.0)


def test_noise_draws_from_the_softmax() -> None:
    router = router_of()
    scores = torch.tensor([1.0, 0.0, -1.0, 0.5])
    many = scores.expand(20000, 4)
    drawn = router.choose(many, router.draw(len(many)))
    frequency = torch.bincount(torch.where(drawn.chosen[:, 0] < 0, 3, drawn.chosen[:, 0]), minlength=4) / len(many)
    assert torch.allclose(frequency, scores.softmax(0), atol=4 * math.sqrt(0.25 / len(many)))
    assert torch.equal(drawn.weight[drawn.chosen == 0], scores.softmax(0)[0].expand(int((drawn.chosen == 0).sum())))
    assert (router.choose(many).chosen == 0).all()


def test_integrated_gate_is_one_where_nothing_is_drawn() -> None:
    route = router_of(gate="integrated", top_k=2).choose(torch.tensor([[3.0, 1.0, 2.0, 1.5]]))
    assert route.chosen.tolist() == [[0, 2]]
    assert route.weight.tolist() == [[1.0, 1.0]]
    assert router_of(gate="integrated").choose(torch.tensor([[0.0, 0.0, 0.0, 1.0]])).weight.item() == 0.0


def test_integrated_gate_gives_the_gradient_of_the_expected_loss() -> None:
    """Also for experts whose loss has derivative 0 where they run fully: from them the probability gate learns nothing.

    Expert i at weight w has loss a_i·((1 − w)² − 1), so a_i less than none's at w = 1: where it is at its optimum.
    """
    worth = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    scores = torch.tensor([0.3, -0.2, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    many = 200_000
    router = router_of(gate="integrated")
    route = router.choose(scores.expand(many, 4), router.draw(many))
    losses = worth[route.chosen[:, 0]] * ((1 - route.weight[:, 0]) ** 2 - 1) * (route.chosen[:, 0] >= 0)
    got = torch.autograd.grad(losses.mean(), scores)[0]
    expected = torch.autograd.grad(-(scores.softmax(0)[:3] * worth).sum(), scores)[0]
    assert torch.allclose(got, expected, atol=0.01)
    assert expected.abs().min() > 0.03


def test_neither_padding_nor_the_size_of_a_token_steers_the_route() -> None:
    """The first token of a LLaMA is a thousand times larger than the rest, and must not count more."""
    router = router_of()
    hidden = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    before = router(hidden, mask)
    padded = torch.where(mask[..., None] > 0, hidden, 1e3)
    assert torch.equal(router(padded, mask).scores, before.scores)
    padded[0, 0] *= 1000
    assert torch.allclose(router(padded, mask).scores, before.scores, atol=1e-4)
    tokens = [F.layer_norm(h[m > 0], (8,)).mean(0) for h, m in zip(hidden, mask, strict=True)]
    assert torch.allclose(before.scores, router.linear(torch.stack(tokens)), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "error", "named"),
    [
        ({"experts": 0}, ValueError, "experts"),
        ({"experts": 2.0}, TypeError, "experts"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 5}, ValueError, "top_k"),
        ({"gate": "none"}, ValueError, "gate"),
        ({"free_epochs": -1}, ValueError, "free_epochs"),
        ({"skip": 1}, TypeError, "skip"),
        ({"noise": -1.0}, ValueError, "noise"),
        ({"noise": math.inf}, ValueError, "noise"),
        ({"noise": "1"}, TypeError, "noise"),
        ({"balance": math.nan}, ValueError, "balance"),
        ({"cost": -0.1}, ValueError, "cost"),
        ({"cost": 0.1, "skip": False}, ValueError, "cost"),
    ],
)
def test_arguments_that_do_not_fit_are_named(values: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=f"^{named}: expected"):
        RoutingConfig(**values)


def test_every_field_has_what_the_command_line_shows() -> None:
    described = {field.name: dict(field.metadata) for field in dataclasses.fields(RoutingConfig)}
    assert all(len(metadata["help"]) > 10 for metadata in described.values())
    assert described["gate"]["choices"] == GATES


# Losses


def route_of(index: list[list[int]], scores: Tensor) -> Route:
    chosen = torch.tensor(index)
    return Route(chosen, torch.zeros(chosen.shape), scores)


def test_balance_is_one_when_even_and_n_when_collapsed() -> None:
    even = torch.eye(3) * 50
    assert balance_loss(route_of([[0], [1], [2]], even), 3).item() == pytest.approx(1.0)
    collapsed = torch.tensor([50.0, 0.0, 0.0]).expand(3, 3)
    assert balance_loss(route_of([[0], [0], [0]], collapsed), 3).item() == pytest.approx(3.0)


def test_balance_by_hand_over_the_sequences_that_run_something() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0, 9.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    route = route_of([[-1, -1], [1, -1], [2, 0]], scores)
    P = (scores[1, :3].softmax(0) + scores[2, :3].softmax(0)) / 2
    assert balance_loss(route, 3).item() == pytest.approx(3 * P.sum().item() / 3)
    route = route_of([[-1], [1], [1]], scores)
    assert balance_loss(route, 3).item() == pytest.approx(3 * P[1].item())


def test_parts_of_a_step_add_up_to_its_balance() -> None:
    router = router_of()
    with torch.no_grad():
        router.linear.bias.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
    routes = [router(torch.randn(size, 4, 8), torch.ones(size, 4), router.draw(size)) for size in (7, 2, 5)]
    whole = router.joined(routes)
    counts = [choice_counts(route, 3) for route in routes]
    assert torch.equal(sum(counts[1:], counts[0]), choice_counts(whole, 3))
    assert (whole.chosen < 0).any()
    parts = sum(balance_loss(route, 3, choice_counts(whole, 3)) for route in routes)
    value = balance_loss(whole, 3)
    torch.testing.assert_close(parts, value)
    gradients = [torch.autograd.grad(v, list(router.parameters())) for v in (parts, value)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert value.item() != pytest.approx(sum(balance_loss(route, 3).item() for route in routes) / 3, rel=1e-3)


def test_balance_of_a_batch_that_runs_nothing_is_zero() -> None:
    scores = torch.randn(2, 4, requires_grad=True)
    loss = balance_loss(route_of([[-1], [-1]], scores), 3)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(scores.grad, torch.zeros(2, 4))


@given(st.integers(0, 10_000), st.integers(1, 3), st.booleans())
def test_losses_and_weights_pass_gradcheck(seed: int, top_k: int, skip: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Scores a hundredth apart or more: no choice changes within the difference quotient.
    order = torch.stack([torch.randperm(3 + skip, generator=generator) for _ in range(4)]).double()
    scores = (order + 0.3 * torch.rand(order.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    router = router_of(top_k=top_k, skip=skip)

    def quantities(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        route = router.choose(s)
        return route.weight, balance_loss(route, 3), run_probability(route, 3)

    assert torch.autograd.gradcheck(quantities, scores)


def test_descent_on_the_balance_loss_evens_the_load() -> None:
    router = router_of()
    with torch.no_grad():
        router.linear.bias.copy_(torch.tensor([4.0, 0.0, 0.0, 2.0]))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    hidden, mask = torch.randn(64, 4, 8), torch.ones(64, 4)
    for _ in range(200):
        optimizer.zero_grad()
        balance_loss(router(hidden, mask), 3).backward()
        optimizer.step()
    p = router(hidden, mask).scores[:, :3].softmax(1).mean(0)
    assert p.max() < 0.45
