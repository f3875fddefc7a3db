"""An adapter per row, in tiles of rows that are sorted by adapter; dropout's mask and the gate's gradient alone.

Interpreted, against fp64. Run by test_kernels.py. Every uninitialized tensor is filled with NaN, as in
interpreted_kernels.py. interpreted_variants.py has the gate and dropout of a plain call.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops import choice
from adapterkern.ops.dropout import Drop
from adapterkern.ops.kernels import backward, forward, rows
from bench.traffic import metered
from tests.support.interpreted import set_sms
from tests.support.numerics import make_weights, relative_error
from tests.support.variants import Case, check, evaluate, make_case

pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")

assert choice.INTERPRETED
T, D, R, N = 100, 136, 12, 4
SPLIT = 20  # multiprocessors with which column blocks are shared


def routed(sequences: int, n: int = N) -> Tensor:
    """Adapter 1 has one sequence, 2 none, the last the most; a fifth of the sequences has none of them."""
    index = torch.randint(-1, n, (sequences,))
    index[(index == 1) | (index == 2)] = n - 1
    index[sequences // 2] = 1
    return index


@pytest.fixture
def sorted_rows(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each launcher that ran, whether its tiles are of sorted rows."""
    found: list[bool] = []

    def routing(*args: Any) -> rows.Routing:
        found.append((made := rows.routing(*args)).bounds is not None)
        return made

    for module in (forward, backward):
        monkeypatch.setattr(module, "routing", routing)
    return found


def check_routed(case: Case, index: Tensor, x_free: bool = False) -> dict[str, Tensor]:
    how = {"index": index}
    ours = evaluate(ak.adapter, case, x_free=x_free, **how)
    theirs = evaluate(ak.adapter, case, fused=False, **how)
    exact = evaluate(ak.adapter, case.to(torch.float64), fused=False, **how)
    check(case, ours, theirs, exact, torch.finfo(case.x.dtype).eps, **how)
    none = index == -1
    assert torch.equal(ours["y"][none], (case.x if case.residual is None else case.residual)[none])
    assert torch.equal(ours["x"][none], case.dy[none] if case.residual is None else torch.zeros_like(case.dy[none]))
    if case.gate is not None:
        assert not ours["gate"][none].any()
    return ours


@pytest.mark.parametrize(
    ("variant", "dtype", "sms", "distribution", "x_free"),
    [
        ("a gate and dropout", torch.float32, SPLIT, "mean 100 sigma", False),
        ("a gate and dropout", torch.bfloat16, 2, "normal", True),
        ("all", torch.float16, SPLIT, "outlier channels", False),
        ("all", torch.bfloat16, 2, "normal", False),
        ("scale", torch.bfloat16, SPLIT, "constant rows", False),
        ("residual", torch.float16, 2, "near fp16 max", False),
    ],
    ids=str,
)
def test_an_adapter_per_row(
    variant: str,
    dtype: torch.dtype,
    sms: int,
    distribution: str,
    x_free: bool,
    sorted_rows: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_sms(monkeypatch, sms)
    d = D if sms == 2 else 2 * D
    check_routed(make_case(variant, T, d, R, dtype, distribution, N), routed(T), x_free)
    assert sorted_rows == [True, True]


def test_sequences_shorter_than_a_tile(sorted_rows: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    set_sms(monkeypatch, 2)
    for index in (routed(24), torch.full((24,), -1)):
        check_routed(make_case("a gate and dropout", 72, 40, 12, torch.float32, n=N).view(24, 3, 40), index)
    assert sorted_rows == [True] * 4


def test_sorted_or_not_is_the_same_and_twice_the_same_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, sorted_rows: list[bool]
) -> None:
    case, index = make_case("a gate and dropout", 24, 40, 12, torch.float32, n=N), routed(24)
    apart = evaluate(ak.adapter, case, index=index)  # a tile per row
    set_sms(monkeypatch, 2)
    once, again = (evaluate(ak.adapter, case, index=index) for _ in range(2))
    assert sorted_rows == [False] * 2 + [True] * 4
    for name, value in once.items():
        assert torch.equal(value, again[name])
        torch.testing.assert_close(value, apart[name], rtol=1e-5, atol=1e-5)


def test_a_constant_row_turns_its_adapter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_sms(monkeypatch, 2)
    case, index = make_case("scale", 70, 40, 12, torch.bfloat16, n=N), routed(70)
    case.x[35] = 6e4  # the one row of adapter 1
    check_routed(case, index)


def test_rows_are_sorted_where_that_saves_more_than_it_costs() -> None:
    a = torch.empty(8, 64, 4096, dtype=torch.bfloat16, device="meta")
    for T, S, expected in ((32, 1, False), (54, 1, False), (55, 1, True), (4096, 64, False), (4096, 16, True)):
        made = rows.routing(torch.zeros(T // S, dtype=torch.int64), T, a, BT=64, sms=132)
        assert (made.bounds is not None) == expected, (T, S)
        assert made.tiles(64) == (T // 64 + 9 if expected else T // S), (T, S)


def test_eight_adapters_move_about_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of at most n tiles more than ⌈T/BT⌉ reads the weights again, and in the backward each adapter's slice of A.

    At T = 512 and BT = 64, where an adapter's rows are one tile, that is 1 + n·BT/T = 2 times the forward's weights.
    What does not grow with T (the parameters, 8 times as many, and their gradients) is not of this comparison.
    """
    set_sms(monkeypatch, 2)
    x, dy = torch.randn(2, 512, 128).bfloat16()
    moved = []
    for index in (None, torch.randint(8, (512,))):
        w = [t if index is None else torch.stack([t] * 8) for t in make_weights(128, 16)]
        leaves = [t.requires_grad_() for t in (x.clone(), *w)]
        with metered() as traffic:
            torch.autograd.grad(ak.adapter(*leaves, index=index), leaves, dy)
        assert traffic.total("activations") == 7 * x.nbytes
        moved.append(sum(traffic.total(kind) for kind in ("activations", "weights", "rows")))
    assert moved[1] <= 1.2 * moved[0]


# One adapter


@pytest.mark.parametrize("rate", [0.3, 0.9])
@pytest.mark.parametrize("sms", [2, 64], ids=["fused", "split"])
def test_the_mask_is_the_definition_s_to_the_bit(sms: int, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is read from the seed's memory, so that each replay of a CUDA graph has its own."""
    set_sms(monkeypatch, sms)
    x = torch.randn(70, 41)
    weights = None, None, torch.zeros(41, 41), torch.ones(41), torch.eye(41), torch.zeros(41)
    seeds = torch.zeros(2, dtype=torch.int64)
    for seed in (5, -1, 1 << 62 | 77):
        seeds[1] = seed
        y = ak.adapter(x, *weights, activation="identity", residual=0 * x, dropout=rate, seed=seeds[1:])
        assert torch.equal(y, Drop(rate, seeds[1]).mask(70, 41, torch.float32))


@pytest.mark.parametrize("sms", [1, 64], ids=["fused", "split"])
def test_the_gate_s_gradient_alone_reads_dy_once(sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sms(monkeypatch, sms)
    case = make_case("all", 70, 2 * D, R, torch.float32)
    leaves = case.leaves("gate")
    y = ak.adapter(leaves.x, *leaves.weights, **leaves.more())
    with metered() as traffic:
        (got,) = torch.autograd.grad(y, leaves.named()["gate"], case.dy)
    assert relative_error(got, evaluate(ak.adapter, case.to(torch.float64), fused=False)["gate"]) < 1e-6
    assert traffic.total("activations") == case.dy.nbytes
    assert traffic.launches.keys() == {"hidden_kernel", *(["hidden_partial_kernel"] if sms == 64 else [])}
