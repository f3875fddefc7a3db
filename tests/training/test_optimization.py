"""The learning rate of every step against its formula."""

import math

import pytest
import torch

from adapterkern.training.optimization import make_schedule, warmup_steps
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


def test_no_warmup_begins_at_the_full_rate() -> None:
    assert rates(5, warmup=0)[0] == 1.0


def test_warmup_is_a_share_or_a_number() -> None:
    assert warmup_steps(tiny_run.quiet(warmup=0.1), 45) == 5
    assert warmup_steps(tiny_run.quiet(warmup=7), 45) == 7
    with pytest.raises(ValueError, match=r"warmup: .* 45 steps, got 46"):
        make_schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), tiny_run.quiet(warmup=46), 45)
