"""The learning rate of every step against its formula."""

import math
from typing import Any

import pytest
import torch

from adapterkern import TrainConfig
from adapterkern.training.optimization import default_lr, make_optimizer, make_schedule, warmup_steps, with_rates
from tests.support import tiny_run


def rates(steps: int, **values: object) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, tiny_run.quiet(lr=1.0, **values), steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*found, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: (1 + math.cos(math.pi * share)) / 2),
        ("constant", lambda share: 1.0),
    ],
)
def test_rates(name: str, after) -> None:  # type: ignore[no-untyped-def]
    expected = [n / 4 if n < 4 else after((n - 4) / 16) for n in range(21)]
    assert rates(20, schedule=name, warmup=4) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("width", "lr", "head_lr"),
    [(64, 6e-3, 1e-2), (576, 6e-3, 1e-2), (1152, 3e-3, 5e-3), (4096, 8.4e-4, 1.4e-3)],
)
def test_the_default_rates(width: int, lr: float, head_lr: float) -> None:
    assert (default_lr(width), default_lr(width, head=True)) == (lr, head_lr)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (3e-3, 5e-3)),
        ({"lr": 1e-4}, (1e-4, None)),
        ({"lr": 1e-4, "head_lr": 2e-4}, (1e-4, 2e-4)),
        ({"head_lr": 1e-4}, (3e-3, 1e-4)),
        ({"task": "causal-lm"}, (3e-3, None)),
        ({"train_adapters": False}, (5e-3, None)),
        ({"train_adapters": False, "lr": 1e-4}, (1e-4, None)),
    ],
)
def test_rates_that_are_not_given(values: dict[str, Any], expected: tuple[float, float | None]) -> None:
    found = with_rates(TrainConfig(**values), 1152)
    assert (found.lr, found.head_lr) == expected
    assert with_rates(found, 64) == found


@pytest.mark.parametrize("begun", [{"lr": 1e-3}, {"lr": 1e-3, "head_lr": None}, {"lr": 1e-3, "head_lr": 5e-2}])
def test_a_resumed_run_keeps_its_rates(begun: dict[str, float]) -> None:
    found = with_rates(TrainConfig(), 64, begun)
    assert (found.lr, found.head_lr) == (1e-3, begun.get("head_lr"))
    assert with_rates(TrainConfig(lr=3.0, head_lr=4.0), 64, begun) == TrainConfig(lr=3.0, head_lr=4.0)


def test_heads_have_their_rate_whatever_a_task_is_called() -> None:
    names = ("adapter.down.weight", "head.weight", "head.bias", "head.head.weight", "head.adapter.down.weight")
    parameters = {
        name: torch.nn.Parameter(torch.ones(2, 2) if "weight" in name else torch.ones(2))
        for name in (*names, "a.head.weight", "a.adapter.up.bias", "router.weight", "adapter.modules.lm_head.weight")
    }
    optimizer = make_optimizer(parameters, TrainConfig(lr=1e-3, head_lr=1e-2))
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in parameters.items()}
    heads = {"head.weight", "head.bias", "head.head.weight", "a.head.weight"}
    assert found == {name: (1e-2 if name in heads else 1e-3, 0.01 if "weight" in name else 0.0) for name in parameters}
    for config in (TrainConfig(lr=1e-3), TrainConfig(lr=1e-3, head_lr=1e-3)):
        assert len(make_optimizer(parameters, config).param_groups) == 2
    with pytest.raises(ValueError, match="lr: expected a number, got None"):
        make_optimizer(parameters, TrainConfig())


def test_no_warmup_begins_at_the_full_rate() -> None:
    assert rates(5, warmup=0)[0] == 1.0


def test_warmup_is_a_share_or_a_number() -> None:
    assert warmup_steps(tiny_run.quiet(warmup=0.1), 45) == 5
    assert warmup_steps(tiny_run.quiet(warmup=7), 45) == 7
    with pytest.raises(ValueError, match=r"warmup: .* 45 steps, got 46"):
        make_schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), tiny_run.quiet(warmup=46), 45)
