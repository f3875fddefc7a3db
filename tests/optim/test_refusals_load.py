"""What ``ClippedAdamW`` and its ``load_state_dict`` refuse: by name, and before anything is changed."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapterkern.optim import ClippedAdamW, backend


def stepped() -> ClippedAdamW:
    params = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    optimizer = ClippedAdamW([{"params": params[:1]}, {"params": params[1:], "lr": 1e-3}])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def setting(*keys: Any, value: Any) -> Callable[[Any], Any]:
    def change(saved: Any) -> Any:
        inner = saved
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return saved

    return change


def without(*keys: Any) -> Callable[[Any], Any]:
    def change(saved: Any) -> Any:
        inner = saved
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return saved

    return change


MOMENT = ("state", 0, "exp_avg")
REFUSALS: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    ("a list", lambda _: [], TypeError, "state_dict: expected a dict, got list"),
    ("no state", without("state"), ValueError, "state_dict: state: expected a dict, got none"),
    ("no groups", without("param_groups"), ValueError, "state_dict: param_groups: expected a list, got none"),
    ("a group", without("param_groups", 1), ValueError, "state_dict: expected 2 parameter groups, got 1"),
    ("a group of text", setting("param_groups", 0, value="x"), ValueError, "group 0: expected a dict with a list"),
    ("no params", without("param_groups", 1, "params"), ValueError, "group 1: expected a dict with a list 'params'"),
    ("lists", setting("param_groups", 0, "params", value=[[]]), ValueError, "group 0: expected a dict with a list"),
    ("twice", setting("param_groups", 1, "params", value=[0]), ValueError, "group 1: expected 1 parameters, each once"),
    ("no eps", without("param_groups", 0, "eps"), ValueError, "state_dict: group 0: expected a value of 'eps'"),
    ("lr", setting("param_groups", 1, "lr", value="x"), TypeError, "state_dict: group 1: lr: expected a number"),
    ("betas", setting("param_groups", 1, "betas", value=[10**400, 0]), ValueError, "group 1: betas: expected two"),
    ("maximize", setting("param_groups", 0, "maximize", value="x"), TypeError, "group 0: maximize: expected True or"),
    ("unknown", setting("state", 9, value={}), ValueError, "state: 9: expected a dict for one of the parameters"),
    ("a number", setting("state", 0, value=1.0), ValueError, "state: 0: expected a dict for one of the parameters"),
    ("no moment", without(*MOMENT), ValueError, "state of 0: expected step, exp_avg, exp_avg_sq, got"),
    ("None", setting(*MOMENT, value=None), ValueError, "exp_avg of 0: expected a dense tensor, got None"),
    (
        "a shape",
        setting(*MOMENT, value=torch.ones(3)),
        ValueError,
        r"exp_avg of 0: expected \(2, 3\) of floating point",
    ),
    ("integers", setting(*MOMENT, value=torch.ones(2, 3).long()), ValueError, "of floating point, got .*int64"),
    ("sparse", setting(*MOMENT, value=torch.ones(2, 3).to_sparse()), ValueError, "expected a dense tensor"),
    ("meta", setting(*MOMENT, value=torch.ones(2, 3, device="meta")), ValueError, "expected a dense tensor"),
    (
        "NaN",
        setting(*MOMENT, value=torch.full((2, 3), torch.nan)),
        ValueError,
        "exp_avg of 0: expected finite numbers, got",
    ),
    ("< 0", setting("state", 1, "exp_avg_sq", value=-torch.ones(4)), ValueError, "of 1: expected numbers >= 0"),
    ("a step", setting("state", 1, "step", value=torch.ones(1)), ValueError, r"step of 1: expected \(\) of floating"),
]


@pytest.mark.parametrize(("change", "error", "message"), [row[1:] for row in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_is_refused(change: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    optimizer = stepped()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(change(copy.deepcopy(before)))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i][k], t) for i, s in before["state"].items() for k, t in s.items())


def test_a_step_may_be_an_integer() -> None:
    optimizer, saved = stepped(), stepped().state_dict()
    saved["state"][0]["step"] = torch.tensor(7)
    optimizer.load_state_dict(saved)
    step = optimizer.state_dict()["state"][0]["step"]
    assert step == 7
    assert step.dtype == torch.float32


@pytest.mark.parametrize("name", list(inspect.signature(ClippedAdamW).parameters)[1:])
def test_every_argument_is_checked(name: str) -> None:
    given: dict[str, Any] = {name: object()}
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        ClippedAdamW([torch.nn.Parameter(torch.ones(2))], **given)


def test_another_word_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKERN_FUSED", "no")
    with pytest.raises(ValueError, match=r"^ADAPTERKERN_FUSED: expected 0 or 1, got 'no'$"):
        backend("cpu")
