"""ClippedAdamW under torch.amp.GradScaler and accelerate."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adapterkern.optim import ClippedAdamW
from tests.support.optim_oracle import TILE, parameters, set_grads, worst

SIZES = [3, TILE + 1]


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("bad", [None, 0, TILE])
def test_scaled_gradients_take_the_unscaled_step_once(unscale_first: bool, bad: int | None) -> None:
    ours, theirs = parameters(SIZES), parameters(SIZES)
    optimizer, baseline = ClippedAdamW(ours, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    control = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(5):
        for each, s in ((ours, scaler), (theirs, control)):
            s.scale(torch.zeros(()))
            for g in set_grads(each, step):
                g.mul_(s.get_scale())
            if bad is not None and step == 2:
                each[1].grad[bad] = math.inf
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        control.unscale_(baseline)
        norm = nn.utils.clip_grad_norm_(theirs, 1.0)
        control.step(baseline)
        assert optimizer.skipped == (bad is not None and step == 2)
        if optimizer.skipped == 0:
            assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        scaler.update()
        control.update()
        assert scaler.get_scale() == control.get_scale()
    assert worst(ours, [p.detach().double() for p in theirs]) < 1e-6
    assert all(optimizer.state[p]["step"] == baseline.state[q]["step"] for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_scaled_step_reads_no_value_on_the_host(unscale_first: bool) -> None:
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reads.append(func is torch.ops.aten._local_scalar_dense.default)
            return func(*args, **(kwargs or {}))

    reads: list[bool] = []
    params = parameters(SIZES)
    optimizer, scaler = ClippedAdamW(params), torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    set_grads(params, 0)
    with Reads():
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert reads
    assert not any(reads)


def test_found_inf_may_be_more_than_one_and_alone_skips_the_step() -> None:
    params = parameters(SIZES)
    optimizer = ClippedAdamW(params, clear_grads=True)
    for found, skipped in [(0.0, 0.0), (2.0, 1.0), (math.nan, 1.0)]:
        grads = set_grads(params, 0)
        before = [p.detach().clone() for p in params]
        optimizer.found_inf = torch.tensor(found)  # type: ignore[attr-defined]  # as GradScaler sets it
        optimizer.step()
        assert optimizer.skipped == skipped
        assert all(torch.equal(p, b) == bool(skipped) for p, b in zip(params, before, strict=True))
        assert not any(g.any() for g in grads)


def test_accelerate_holds_its_scheduler_back_on_a_skipped_step() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    accelerate.Accelerator(cpu=True)
    params = parameters(SIZES)
    inner = ClippedAdamW(params, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = AcceleratedOptimizer(inner, scaler=scaler)
    scheduler = AcceleratedScheduler(schedule, wrapped)
    rates = []
    for step in range(3):
        scaler.scale(torch.zeros(()))
        for g in set_grads(params, step):
            g.mul_(scaler.get_scale())
        if step == 1:
            params[0].grad[0] = math.inf
        wrapped.step()
        scheduler.step()
        assert wrapped.step_was_skipped == (step == 1)
        rates.append(inner.param_groups[0]["lr"])
    assert rates == [0.5, 0.5, 0.25]
    assert all(inner.state[p]["step"] == 2 for p in params)
