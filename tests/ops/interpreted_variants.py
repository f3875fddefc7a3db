"""The calls that are not plain, interpreted: a residual, a scale, no LayerNorm. Run by test_kernels.py.

Every uninitialized tensor is filled with NaN, as in interpreted_kernels.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops import adapter_and_norm, choice
from adapterkern.ops.kernels import cache
from bench.traffic import metered
from tests.support.interpreted import Recording, set_sms
from tests.support.numerics import make_weights, relative_error
from tests.support.variants import VARIANTS, check, evaluate, make_case

pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")

assert choice.INTERPRETED
T, D, R = 40, 136, 20
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check_variant(variant: str, dtype: torch.dtype, distribution: str = "normal", **kwargs: Any) -> None:
    n = 3 if "index" in kwargs else None
    case = make_case(variant, T, D, R, dtype, distribution, n)
    how = {name: value for name, value in kwargs.items() if name != "x_free"}
    case = case if n is None else case.view(4, T // 4, D)
    ours = evaluate(ak.adapter, case, **kwargs)
    theirs = evaluate(ak.adapter, case, fused=False, **how)
    exact = evaluate(ak.adapter, case.to(torch.float64), fused=False, **how)
    check(case, ours, theirs, exact, torch.finfo(dtype).eps, **how)
    if case.residual is not None:
        assert torch.equal(ours["residual"], case.dy)


@pytest.mark.parametrize(("sms", "distribution"), [(2, "normal"), (64, "mean 100 sigma")], ids=["fused", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(
    variant: str, dtype: torch.dtype, sms: int, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sms(monkeypatch, sms)
    check_variant(variant, dtype, distribution)


@pytest.mark.parametrize("variant", ["scale", "no LayerNorm", "a gate and dropout"])
def test_variants_x_free(variant: str) -> None:
    check_variant(variant, torch.bfloat16, x_free=True)


@pytest.mark.parametrize("sms", [2, 64], ids=["fused", "split"])
@pytest.mark.parametrize("variant", ["residual and a learned scale", "no LayerNorm, a residual and a learned scale"])
def test_variants_mixed(variant: str, sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sms(monkeypatch, sms)
    check_variant(variant, torch.float16, index=torch.tensor([2, -1, 0, 2]))


def test_a_residual_is_read_in_place_whatever_its_strides() -> None:
    x, w = torch.randn(T, D).bfloat16(), make_weights(D, R)
    base = torch.randn(2 * T, D + 8).bfloat16()
    for residual in (base[:T, :D], base[:T, 1 : D + 1], base[::2, :D], base[:1, :1].expand(T, D)):
        assert torch.equal(ak.adapter(x, *w, residual=residual), ak.adapter(x, *w, residual=residual.contiguous()))


@pytest.mark.parametrize(("wanted", "units"), [("x", 3), ("residual", 0), ("scale", 1), ("up_weight", 1)])
def test_only_one_gradient_of_a_call_with_a_residual(wanted: str, units: int) -> None:
    """Of x: dy; x, dx. dy is read again for what the branch's end has, and the residual's gradient is dy itself."""
    case = make_case("residual and a learned scale", T, D, R, torch.float32)
    expected = evaluate(ak.adapter, case, fused=False)[wanted]
    leaves = case.leaves(wanted)
    y = ak.adapter(leaves.x, *leaves.weights, **leaves.more())
    with metered() as traffic:
        (got,) = torch.autograd.grad(y, leaves.named()[wanted], case.dy)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert traffic.total("activations") == units * case.x.nbytes


@pytest.mark.parametrize(("variant", "forward", "backward"), [("residual", 3, 4), ("no LayerNorm", 3, 4)])
def test_traffic(variant: str, forward: int, backward: int) -> None:
    """In units of T·d: x, residual, y, which is one more than the floor of a plain call; and dy; dy, x, dx."""
    case = make_case(variant, 128, 512, 64, torch.bfloat16).leaves()
    with metered() as first:
        y = ak.adapter(case.x, *case.weights, **case.more())
    with metered() as second:
        torch.autograd.grad(y, list(case.named().values()), case.dy)
    assert first.total("activations") == forward * case.x.nbytes
    assert second.total("activations") == backward * case.x.nbytes


def test_the_cache_sees_a_changed_scale(recording: Recording) -> None:
    x, w = torch.randn(3, 40), make_weights(40, 12)
    branch = ak.adapter(x, *w) - x
    learned = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([learned], lr=1.0)
    cache.clear()

    def error(scale: Tensor | float, by: float) -> float:
        return (ak.adapter(x, *w, scale=scale) - x - by * branch).abs().max().item()

    assert max(error(0.5, 0.5), error(-3, -3), error(0.5, 0.5)) < 1e-5
    assert len(cache._entries) == 2
    assert error(learned, 1) < 1e-5
    learned.grad = torch.full((1,), -3.0)
    optimizer.step()
    assert error(learned, 4) < 1e-5
    with recording():
        assert error(learned, 4) < 1e-5
    learned.data.fill_(2)  # as a replay changes what trains: without a version
    assert error(learned, 2) < 1e-5


def test_a_recorded_call_reads_the_preparation_of_its_frozen_scale(recording: Recording) -> None:
    x, w, scale = torch.randn(3, 40), make_weights(40, 12), torch.tensor(2.0)
    expected = ak.adapter(x, *w, scale=scale)
    ak.adapter(x, *w, scale=3.0)
    kept = len(cache._pinned)
    with recording():
        assert torch.equal(ak.adapter(x, *w, scale=scale), expected)
        assert torch.equal(ak.adapter(x, *w, scale=2.0), expected)  # which no call has prepared
    assert len(cache._pinned) == kept + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", ["both", "n", "y"])
def test_the_norm_that_follows(parts: str, dtype: torch.dtype) -> None:
    """By kernels/norm.py; of columns that no block divides, and with y, n or both of use to what comes behind."""
    T, d, r = 24, 77, 16
    x, added, dy, dn = torch.randn(4, T, d).to(dtype)
    weights, weight = make_weights(d, r), torch.randn(d)
    scale = torch.tensor([0.7]) if dtype == torch.float32 else 0.7  # its gradient is one number, of cancelling terms

    given = [t for t in (x, added, *weights, scale) if isinstance(t, Tensor)]

    def of(dtype: torch.dtype, **how: Any) -> list[Tensor]:
        leaves = [t.to(torch.promote_types(t.dtype, dtype)).requires_grad_() for t in given]
        own: Any = {"added": leaves[1], "scale": leaves[8] if len(leaves) > 8 else scale, "dropout": 0.2, "seed": 3}
        call: Any = adapter_and_norm
        outputs = call(leaves[0], *leaves[2:8], weight.to(leaves[2].dtype), **own, **how)
        kept = [i for i, name in enumerate("yn") if parts in ("both", name)]
        grads = torch.autograd.grad(
            [outputs[i] for i in kept], leaves, [(dy, dn)[i].to(outputs[0].dtype) for i in kept]
        )
        return [*(t.detach() for t in outputs), *grads]

    with metered() as traffic:
        ours = of(dtype)
    assert ("norm_backward_kernel" in traffic.launches) == (parts != "y")
    for o, t, e in zip(ours, of(dtype, fused=False), of(torch.float64, fused=False), strict=True):
        assert relative_error(o, e) <= 2 * relative_error(t, e) + 8 * torch.finfo(dtype).eps


def test_the_norm_of_no_rows_and_of_many_columns() -> None:
    for T, d in ((0, 40), (2, 4100)):
        x, weights, weight = torch.randn(T, d), make_weights(d, 4), torch.randn(d)
        got, expected = (adapter_and_norm(x, *weights, weight, fused=fused) for fused in (True, False))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
