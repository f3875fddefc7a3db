"""Every refusal says which argument, what was expected and what came."""

import math
from typing import Any

import pytest

from adapterkern import checks


@pytest.mark.parametrize("value", [1, 7, 2**70])
def test_integers_in_range_come_back(value: int) -> None:
    assert checks.integer("n", value, 1) is value


@pytest.mark.parametrize(
    ("check", "arguments", "error", "message"),
    [
        (checks.integer, (True, 0), TypeError, "n: expected an integer >= 0, got True"),
        (checks.integer, (1.0, 0), TypeError, "n: expected an integer >= 0, got 1.0"),
        (checks.integer, ("1",), TypeError, "n: expected an integer, got '1'"),
        (checks.integer, (0, 1), ValueError, "n: expected an integer >= 1, got 0"),
        (checks.integer, (513, 1, 512), ValueError, "n: expected an integer from 1 to 512, got 513"),
        (checks.number, (False, "[0, 1)"), TypeError, "n: expected a number in [0, 1), got False"),
        (checks.number, (1, "[0, 1)"), ValueError, "n: expected a number in [0, 1), got 1"),
        (checks.number, (0.0, "(0, inf)"), ValueError, "n: expected a number in (0, inf), got 0.0"),
        (checks.number, (math.inf, "(0, inf)"), ValueError, "n: expected a number in (0, inf), got inf"),
        (checks.number, (10**400, "[0, inf)"), ValueError, f"n: expected a number in [0, inf), got 1{79 * '0'}"),
        (checks.number, (math.nan, "[0, inf]"), ValueError, "n: expected a number in [0, inf], got nan"),
        (checks.choice, ("c", ("a", "b")), ValueError, "n: expected one of a, b, got 'c'"),
        (checks.choice, (["a"], ("a", "b")), ValueError, "n: expected one of a, b, got ['a']"),
        (checks.flag, (1,), TypeError, "n: expected True or False, got 1"),
    ],
)
def test_others_are_refused(check: Any, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refused:
        check("n", *arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize(("value", "on"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_what_a_switch_in_the_environment_says(value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTERKERN_FUSED", raising=False)
    if value is not None:
        monkeypatch.setenv("ADAPTERKERN_FUSED", value)
    assert checks.switch("ADAPTERKERN_FUSED") is on


@pytest.mark.parametrize("value", ["no", "false", "2", " 0"])
def test_other_words_for_a_switch_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKERN_FUSED", value)
    with pytest.raises(ValueError, match=f"^ADAPTERKERN_FUSED: expected 0 or 1, got '{value}'$"):
        checks.switch("ADAPTERKERN_FUSED")


def test_numbers_in_range_come_back() -> None:
    assert checks.number("n", math.inf, "[0, inf]") == math.inf
    assert checks.number("n", 0, "[0, 1)") == 0
    assert checks.number("n", -3.5, "(-inf, 0]") == -3.5


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ep", ["epochs", "eps"]),
        ("dim", ["adapter_dim"]),
        ("lerning_rate", ["learning_rate"]),
        ("batch_size_of_training", ["batch_size"]),
        ("batch-sizes", ["batch_size"]),
        ("l", ["learning_rate"]),
        ("a", []),  # of six
        ("zzz", []),
    ],
)
def test_names_that_are_near(name: str, found: list[str]) -> None:
    known = ["epochs", "eps", "adapter_dim", "learning_rate", "batch", "batch_size", *[f"a{i}" for i in range(5)]]
    assert checks.near(name, known) == found
