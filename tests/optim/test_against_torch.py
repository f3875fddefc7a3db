"""ClippedAdamW as a torch optimizer: state dicts, hooks, copies, changing gradients, errors."""

import copy
import io
import itertools
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from adapterkern.optim.clipped_adamw import ClippedAdamW
from tests.support.optim_oracle import TILE, Oracle, parameters, set_grads, worst

SIZES = [3, TILE + 1]


def torch_step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_goes_to_torch_and_back_mid_run(dtype: torch.dtype) -> None:
    ours, theirs = parameters(SIZES, dtype), parameters(SIZES, dtype)
    a, b = ClippedAdamW(ours, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3)
    for step in range(12):
        if step == 4:
            b.load_state_dict(a.state_dict())
        if step == 8:
            a.load_state_dict(b.state_dict())
            assert all(a.state[p]["exp_avg"].dtype == torch.float32 for p in ours)
        for params in (ours, theirs):
            set_grads(params, step)
        if step < 4 or step >= 8:
            a.step()
        if step >= 4:
            torch_step(b, theirs)
        for p, q in zip(ours, theirs, strict=True):
            if step < 4:
                q.data.copy_(p)
            elif step < 8:
                p.data.copy_(q)
    assert all(a.state[p]["step"] == b.state[q]["step"] == 12 for p, q in zip(ours, theirs, strict=True))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # torch keeps bf16 moments for a bf16 parameter
    assert worst(ours, [q.detach().double() for q in theirs]) < tolerance


@pytest.mark.parametrize("how", ["load_state_dict", "deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("low_precision", ["master", "stochastic"])
def test_a_copy_continues_to_the_bit(how: str, low_precision: str) -> None:
    params = [*parameters(SIZES, torch.bfloat16), *parameters([5])]
    optimizer = ClippedAdamW(params, lr=1e-2, max_norm=0.3, seed=7, low_precision=low_precision)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    if how in ("load_state_dict", "torch.save"):
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        twin = ClippedAdamW(twins, max_norm=0.3, seed=7, low_precision=low_precision)
        saved = optimizer.state_dict()
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file)
        twin.load_state_dict(saved)
    else:
        twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        twins = twin.param_groups[0]["params"]
        assert twin.max_norm == 0.3
        with pytest.raises(RuntimeError, match="no step yet"):
            _ = twin.grad_norm
    for step in range(3, 6):
        for each, opt in ((params, optimizer), (twins, twin)):
            set_grads(each, step)
            opt.step()
    assert all(torch.equal(p, q) and p is not q for p, q in zip(params, twins, strict=True))
    assert all(
        torch.equal(optimizer.state[p][k], twin.state[q][k])
        for p, q in zip(params, twins, strict=True)
        for k in optimizer.state[p]
    )


def test_closure_hooks_scheduler_and_groups_added_later() -> None:
    params = parameters(SIZES)
    optimizer, calls = ClippedAdamW(params[:1], lr=1e-2), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> torch.Tensor | int:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    optimizer.add_param_group({"params": params[1:], "lr": 1e-3, "weight_decay": 0.0})
    scheduler.step()
    assert optimizer.step(closure) < first
    assert calls == ["before", "after"] * 2
    assert [g["lr"] for g in optimizer.param_groups] == [5e-3, 5e-4]
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 1]


def test_parameters_without_gradients_are_left_out_and_count_their_own_steps() -> None:
    params = parameters([5, 6, 7])
    optimizer = ClippedAdamW(params, lr=1e-3, max_norm=None)
    oracles = [Oracle([p], max_norm=math.inf) for p in params]
    for step, live in enumerate([(0, 1, 2), (0, 2), (1,), (), (0, 1, 2)]):
        optimizer.zero_grad()
        for i in live:
            oracles[i].step(set_grads([params[i]], step))
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(math.sqrt(sum(params[i].grad.square().sum().item() for i in live)))  # type: ignore[misc]  # .grad is set
    assert worst(params, [oracle.params[0] for oracle in oracles]) < 1e-6
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 3, 3]


def test_pointers_that_move_between_steps_are_noticed() -> None:
    params = parameters(SIZES)
    optimizer, oracle = ClippedAdamW(params, lr=1e-3), Oracle(params)
    kept: list[torch.Tensor | None] = []  # keeps old memory, so that every replacement has another address
    for step in range(6):
        if step == 2:
            kept += [p.data for p in params]
            for p in params:
                p.data = p.data.clone()
        if step == 3:
            for p in params:
                kept.append(optimizer.state[p]["exp_avg"])
                optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}
        kept += [p.grad for p in params]
        oracle.step(set_grads(params, step))
        optimizer.step()
    assert worst(params, oracle.params) < 1e-6
    assert worst([optimizer.state[p]["exp_avg"] for p in params], oracle.exp_avg) < 1e-6


@pytest.mark.parametrize(
    ("key", "how"),
    [("step", "item"), ("exp_avg", "item"), ("exp_avg_sq", "item"), ("master", "item"), ("exp_avg", "data")],
)
def test_a_state_tensor_that_is_replaced_is_the_one_that_counts(key: str, how: str) -> None:
    params, fresh = parameters(SIZES, torch.bfloat16), parameters(SIZES, torch.bfloat16)
    optimizer, expected = ClippedAdamW(params, lr=1e-2), ClippedAdamW(fresh, lr=1e-2)
    kept = []
    for step in range(3):
        for each, opt in ((params, optimizer), (fresh, expected)):
            set_grads(each, step)
            opt.step()
        if step == 1:
            expected.state[fresh[1]][key].mul_(2)
            state = optimizer.state[params[1]]
            kept.append(state[key].data)
            if how == "item":
                state[key] = state[key] * 2
            else:
                state[key].data = state[key] * 2
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))


def test_a_state_tensor_of_another_kind_is_refused_by_name() -> None:
    (p,) = parameters([3])
    optimizer = ClippedAdamW([p])
    set_grads([p], 0)
    optimizer.step()
    good = optimizer.state[p]["step"]
    for bad, got in [(torch.tensor(5), "torch.int64 ()"), (torch.ones(2), "torch.float32 (2,)"), (5, "5")]:
        optimizer.state[p]["step"] = bad
        message = re.escape("state 'step' of parameter 0 of group 0: expected float32 () on cpu, got " + got)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    optimizer.state[p]["step"] = good
    optimizer.step()
    assert good == 2


def test_parameters_and_gradients_that_change_in_place_are_checked_again() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = ClippedAdamW([weight])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    weight.grad.data = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"gradient of parameter 0 of group 0: expected shape \(4, 4\), got \(2, 4\)"):
        optimizer.step()
    weight.grad.data = torch.ones(4, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"gradient of parameter 0 of group 0: expected torch\.float32, got torch\.bf"):
        optimizer.step()
    weight.grad.data = torch.ones(4, 4)
    whole = weight.data
    weight.data = whole[:2]  # at the same address
    weight.grad = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"state 'exp_avg' .* expected float32 \(2, 4\) on cpu, got .* \(4, 4\)"):
        optimizer.step()
    weight.data, weight.grad = whole.double(), torch.ones(4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"parameter 0 of group 0: expected float32, .* got torch\.float64"):
        optimizer.step()
    weight.grad = None
    weight.data, oracle = whole.t(), Oracle([whole.t()])
    optimizer.state.clear()
    weight.grad = torch.arange(16.0).view(4, 4)
    oracle.step([weight.grad])
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert worst([weight], oracle.params) < 1e-6


def test_a_low_precision_run_loads_into_fp32_parameters() -> None:
    low, full = parameters(SIZES, torch.bfloat16), parameters(SIZES)
    a, b = ClippedAdamW(low), ClippedAdamW(full)
    set_grads(low, 0)
    a.step()
    b.load_state_dict(a.state_dict())
    set_grads(full, 1)
    b.step()
    assert all("master" not in b.state[p] and b.state[p]["step"] == 2 for p in full)


def test_nothing_is_copied_to_the_cpu_without_waiting() -> None:
    """A copy from a GPU that is read before it arrives holds arbitrary values."""

    class Copies(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.to:
                waits.append(not (kwargs or {}).get("non_blocking"))
            return func(*args, **(kwargs or {}))

    waits: list[bool] = []
    (p,) = parameters([3])
    optimizer = ClippedAdamW([p], lr=torch.tensor(1e-3))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # type: ignore[attr-defined]  # as GradScaler
    set_grads([p], 0)
    with Copies():
        optimizer.step()
    assert waits
    assert all(waits)


def test_a_plan_is_kept_until_something_changes() -> None:
    params = parameters(SIZES)
    optimizer, plans = ClippedAdamW(params), []
    for step in range(6):
        set_grads(params, step)
        if step == 2:
            params[0].data = params[0].data.clone()
        if step == 4:
            params[1].grad = None
        optimizer.step()
        plans.append(optimizer._plan)
    assert [a is b for a, b in itertools.pairwise(plans)] == [True, False, True, False, False]


def test_grad_norm_is_the_callers_to_keep() -> None:
    params = parameters(SIZES)
    optimizer = ClippedAdamW(params)
    with pytest.raises(RuntimeError, match="no step yet"):
        _ = optimizer.grad_norm
    norms = []
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert len({n.item() for n in norms}) == 3


# ---- errors ----


def test_errors_name_the_argument_and_what_came() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    for bad, error, message in [
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\], got -1"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: .* got \(0.9, 1.0\)"),
        ({"max_norm": -2.0}, ValueError, "max_norm: .* got -2"),
        ({"max_norm": math.nan}, ValueError, "max_norm: .* got nan"),
        ({"low_precision": "none"}, ValueError, "low_precision"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": None}, TypeError, r"seed: expected an integer from 0 to 4294967295, got None"),
        ({"lr": None}, TypeError, r"lr: expected a number in \[0, inf\], got None"),
        ({"eps": "a"}, TypeError, r"eps: expected a number in \[0, inf\], got 'a'"),
        ({"betas": None}, ValueError, r"betas: expected two floats in \[0, 1\), got None"),
        ({"betas": (0.9,)}, ValueError, r"betas: expected two floats in \[0, 1\), got \(0.9,\)"),
    ]:
        with pytest.raises(error, match=message):
            ClippedAdamW([weight], **bad)
    with pytest.raises(ValueError, match="max_norm: expected it as an argument, for all groups"):
        ClippedAdamW([{"params": [weight], "max_norm": 1.0}])
    ClippedAdamW(torch.optim.AdamW([{"params": [weight], "layer": 3}]).param_groups)
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(TypeError, match=rf"parameter 1 of group 0: .* got {dtype}"):
            ClippedAdamW([weight, nn.Parameter(torch.zeros(2, dtype=dtype))])
    with pytest.raises(TypeError, match=r"parameter 'w': expected bfloat16 for low_precision='stochastic'"):
        ClippedAdamW([("w", nn.Parameter(torch.zeros(2, dtype=torch.float16)))], low_precision="stochastic")
    gaps = nn.Parameter(torch.zeros(4, 6)[:, :3])
    weight.grad, gaps.grad = torch.zeros(4, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="parameter 0 of group 0: expected memory without gaps"):
        ClippedAdamW([gaps]).step()
    optimizer = ClippedAdamW([weight], lr=torch.ones(2))
    with pytest.raises(ValueError, match="lr: expected a float or a float32 tensor of one element, got shape"):
        optimizer.step()
    assert optimizer.state[weight]["step"] == 0


def test_sparse_gradients_are_refused_by_name() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = ClippedAdamW(table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of parameter 'weight': expected a dense tensor, got .*sparse"):
        optimizer.step()


def test_sparse_gradients_are_refused_after_dense_ones_too() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = ClippedAdamW([weight])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    weight.grad = torch.eye(4).to_sparse()
    with pytest.raises(TypeError, match=r"gradient of parameter 0 of group 0: expected a dense tensor"):
        optimizer.step()


def test_amsgrad_state_is_refused() -> None:
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="amsgrad"):
        ClippedAdamW([p]).load_state_dict(torch.optim.AdamW([p], amsgrad=True).state_dict())
