"""Dropout on h, and several adapters of each row: what they are, and what they are drawn from."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import adapterkern as ak
from adapterkern.ops import operator
from adapterkern.ops.dropout import Drop, philox
from tests.support.numerics import make_weights
from tests.support.variants import SEED

T, D, R = 50, 24, 10


@pytest.fixture(params=[True, False], ids=["fused", "eager"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(operator, "prefers_eager", lambda *_: False)  # such small inputs as these
    return bool(request.param)


@pytest.mark.parametrize(
    ("seed", "counters", "words"),
    [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (-1, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_words_are_philox_s(seed: int, counters: tuple[int, ...], words: str) -> None:
    """The known answers that the paper's authors publish for philox4x32-10."""
    found = philox(torch.tensor(seed), *map(torch.tensor, counters))
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_a_mask_is_a_function_of_the_seed_and_the_place() -> None:
    mask = Drop(0.25, torch.tensor([SEED])).mask(2000, 30, torch.float64)
    kept = torch.tensor(1 / 0.75).double()  # rounded to fp32
    assert set(mask.unique().tolist()) == {0.0, kept.item()}
    assert (mask == 0).double().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / mask.numel()) ** 0.5)
    for rows in (mask, mask.T):  # neither rows nor units are alike
        assert len(rows.unique(dim=0)) > 0.99 * len(rows)
    assert Drop(0.25, torch.tensor(SEED)).mask(0, 30, torch.float64).shape == (0, 30)
    # A part is a part: of the units, of the rows, and of rows in another order, also beyond 2³².
    assert torch.equal(Drop(0.25, torch.tensor(SEED)).mask(7, 9, torch.float64), mask[:7, :9])
    some = torch.tensor([1999, 3, 3])
    assert torch.equal(Drop(0.25, torch.tensor(SEED), some).mask(3, 30, torch.float64), mask[some])
    far = Drop(0.25, torch.tensor(SEED), some + 2**32).mask(3, 30, torch.float64)
    assert not torch.equal(far, mask[some])
    assert not torch.equal(Drop(0.25, torch.tensor(SEED + 1)).mask(2000, 30, torch.float64), mask)
    assert not torch.equal(Drop(0.25, torch.tensor(SEED + 2**32)).mask(2000, 30, torch.float64), mask)


def test_the_seed(fused: bool) -> None:
    x, w = torch.randn(T, D, requires_grad=True), make_weights(D, R)

    def call(**how: Any) -> Tensor:
        y = ak.adapter(x, *w, dropout=0.5, fused=fused, **how)
        return torch.cat([y, *torch.autograd.grad(y.square().sum(), x)])

    torch.manual_seed(3)
    drawn = [call(), call()]
    assert not torch.equal(*drawn)
    torch.manual_seed(3)
    assert torch.equal(call(), drawn[0])
    assert torch.equal(call(seed=9), call(seed=torch.tensor([9])))
    assert not torch.equal(call(seed=9), call(seed=10))
    before = torch.get_rng_state()
    call(seed=9)
    ak.adapter(x, *w, fused=fused)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(ak.adapter(x, *w, fused=fused, dropout=0.0, seed=9), ak.adapter(x, *w, fused=fused))


@pytest.mark.parametrize("x_free", [False, True])
def test_a_recomputed_call_drops_the_same(fused: bool, x_free: bool) -> None:
    w = [t.requires_grad_() for t in make_weights(D, R)]

    def grads(recompute: bool) -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(T, D, requires_grad=True)

        def call(x: Tensor) -> Tensor:
            return ak.adapter(ak.adapter(x, *w, dropout=0.3, fused=fused, x_free=x_free), *w, dropout=0.3, fused=fused)

        y = checkpoint(call, x, use_reentrant=False) if recompute else call(x)
        return list(torch.autograd.grad(y.square().sum(), [x, *w]))

    for got, expected in zip(grads(True), grads(False), strict=True):
        assert torch.equal(got, expected)


def test_x_free_finds_x_again() -> None:
    x, w, gate = torch.randn(T, D).double().requires_grad_(), make_weights(D, R, torch.float64), torch.rand(T).double()
    found = []
    for x_free in (False, True):
        y = ak.adapter(x, *w, dropout=0.3, seed=1, gate=gate, x_free=x_free)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_compiled_code_draws_anew() -> None:
    x, w = torch.randn(T, D), make_weights(D, R)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ak.adapter(x, *w, dropout=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(compiled(x), first)


@pytest.mark.parametrize("lead", [(T,), (5, 10)], ids=str)
def test_several_adapters_of_each_row(fused: bool, lead: tuple[int, ...]) -> None:
    """The sum over experts, densely: of every expert's branch times the gates of the choices that are this expert."""
    n, k = 3, 2
    stacked = [torch.stack(ws).double() for ws in zip(*(make_weights(D, R) for _ in range(n)), strict=True)]
    x, dy = torch.randn(2, *lead, D, dtype=torch.float64)
    index = torch.randint(-1, n, (*lead, k))
    index[0] = torch.tensor([2, 2])  # twice the same
    index[1] = -1
    gate = torch.randn(*lead, k, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, gate, *stacked)]

    def dense(x: Tensor, gate: Tensor, *w: Tensor) -> Tensor:
        y = x
        for e in range(n):
            gamma, beta, down, b_down, up, b_up = (t[e] for t in w)
            h = F.silu(F.linear(F.layer_norm(x, (D,), gamma, beta), down, b_down))
            y = y + (gate * (index == e)).sum(-1, keepdim=True) * F.linear(h, up, b_up)
        return y

    y = ak.adapter(leaves[0], *leaves[2:], index=index, gate=leaves[1], fused=fused)
    expected = dense(*leaves)
    torch.testing.assert_close(y, expected)
    got, want = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e)
    plain = ak.adapter(x, *stacked, index=index, fused=fused)
    torch.testing.assert_close(plain, dense(x, torch.ones_like(gate), *stacked))


def test_several_adapters_of_a_row_have_masks_of_their_own(fused: bool) -> None:
    w = [torch.stack([t, t]) for t in make_weights(D, R)]
    x, index = torch.randn(T, D), torch.tensor([[0, 1]]).expand(T, 2)
    how = {"dropout": 0.5, "fused": fused}
    y = ak.adapter(x, *w, index=index, seed=7, **how)
    first = ak.adapter(x, *w, index=index[:, 0], seed=7, **how)
    torch.testing.assert_close(y, first + ak.adapter(x, *w, index=index[:, 1], seed=8, **how) - x)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"dropout": 1.0}, ValueError, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"dropout": "a"}, TypeError, r"dropout: expected a number in \[0, 1\), got 'a'"),
        ({"seed": 2**63}, ValueError, "seed: expected an integer from -9223372036854775808 to 9223372036854775807"),
        ({"dropout": torch.tensor([0.1, 0.2])}, TypeError, r"dropout: expected a number in \[0, 1\), got tensor"),
        ({"index": torch.zeros(3, 2, 2).long(), "seed": "a"}, TypeError, "seed: expected an integer .*, got 'a'"),
        ({"seed": torch.zeros(1)}, TypeError, "seed: expected a torch.Tensor of dtype int64, got torch.float32"),
        ({"seed": torch.zeros(2).long()}, ValueError, r"seed: expected one element on cpu like x, got shape \(2,\)"),
        ({"gate": 0.5}, TypeError, "gate: expected a dense torch.Tensor of a floating dtype, got float"),
        ({"gate": torch.ones(3).long()}, TypeError, "gate: expected a dense torch.Tensor .*, got torch.int64"),
        ({"gate": torch.ones(4)}, ValueError, r"gate: expected leading dimensions of x, \(3, 2\), got \(4,\)"),
        ({"gate": torch.ones(3, device="meta")}, ValueError, "gate: expected device cpu like x, got meta"),
        (
            {"index": torch.zeros(3, 2, 2).long(), "gate": torch.ones(3, 2)},
            ValueError,
            r"gate: expected shape \(3, 2, 2\) like index, got \(3, 2\)",
        ),
        (
            {"index": torch.zeros(3, 4, 2).long()},
            ValueError,
            r"index: expected leading dimensions of x, \(3, 2\), or \(3, 2, 'k'\), got \(3, 4, 2\)",
        ),
        (
            {"index": torch.zeros(3, 2, 2).long(), "x_free": True},
            ValueError,
            "x_free: expected False with 2 adapters of each row, which all read x, got True",
        ),
    ],
)
def test_errors(how: dict[str, Any], error: type[Exception], message: str) -> None:
    w = make_weights(D, R)
    given = [t[None] for t in w] if "index" in how else w
    with pytest.raises(error, match=message):
        ak.adapter(torch.randn(3, 2, D), *given, **how)


def test_one_row(fused: bool) -> None:
    """x of shape (d,): a gate of no dimensions, and k adapters of its one row."""
    w = [torch.stack([t, 2 * t]) for t in make_weights(D, R)]
    x, gate, index = torch.randn(D), torch.tensor([0.5, -2.0]), torch.tensor([1, 0])
    got = ak.adapter(x, *w, index=index, gate=gate, fused=fused)
    rows = ak.adapter(x[None], *w, index=index[None], gate=gate[None], fused=fused)
    torch.testing.assert_close(got, rows[0])
    alone = ak.adapter(x, *(t[1] for t in w), gate=gate[0], fused=fused)
    torch.testing.assert_close(ak.adapter(x, *w, index=index[0], gate=gate[0], fused=fused), alone)


def test_transforms_and_fake_tensors_take_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    w = [torch.stack([t, 2 * t]) for t in make_weights(D, R)]
    x, gate, index = torch.randn(T, D), torch.randn(T, 2), torch.randint(-1, 2, (T, 2))

    def call(x: Tensor) -> Tensor:
        return ak.adapter(x, *w, index=index, gate=gate).sin().sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(call)(x), torch.autograd.grad(call(leaf), leaf)[0])
    both = torch.vmap(call)(torch.stack([x, -x]))
    torch.testing.assert_close(both, torch.stack([call(x), call(-x)]))
    with pytest.raises(ValueError, match="index: expected one for all calls that vmap makes at once"):
        torch.vmap(lambda x, i: ak.adapter(x, *w, index=i))(torch.stack([x, x]), torch.zeros(2, T, dtype=torch.long))
    monkeypatch.setattr(operator, "prefers_eager", lambda *_: False)  # whose rows are chosen by value
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = ak.adapter(mode.from_tensor(x), *map(mode.from_tensor, w), index=mode.from_tensor(index[:, 0]))
    assert y.shape == x.shape


def test_the_operator_itself_refuses_what_it_cannot_read() -> None:
    x, w = torch.randn(6, D), [torch.stack([t]) for t in make_weights(D, R)]

    def call(index: Tensor, *more: Any) -> Tensor:
        return torch.ops.adapterkern.adapter_forward(x, *w, 1e-5, "silu", None, True, False, index, *more)[0]

    assert call(torch.zeros(3, dtype=torch.long)).shape == x.shape
    for index in (torch.zeros(n, dtype=torch.long) for n in (0, 4, 7)):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            call(index)
    rows = torch.zeros(6, dtype=torch.long)
    for rate, seed, message in ((1.0, torch.zeros(1).long(), "dropout"), (0.5, None, "seed")):
        with pytest.raises(ValueError, match=f"{message}: expected"):
            call(rows, None, None, None, 1.0, None, rate, seed)


def test_a_scale_keeps_fp64() -> None:
    """Of fp32 parameters under an fp64 x."""
    x, w = torch.randn(T, D).double(), make_weights(D, R)
    exact = ak.adapter(x, *(t.double() for t in w), scale=0.7, fused=False)
    torch.testing.assert_close(
        torch.ops.adapterkern.adapter_forward(x, *w, 1e-5, "silu", None, False, False, None, None, None, None, 0.7)[0],
        exact,
        rtol=1e-12,
        atol=1e-12,
    )
