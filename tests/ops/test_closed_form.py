"""The closed form in PyTorch operations, which CPUs without kernels run: against fp64."""

import pytest
import torch

from adapterkern.ops import closed_form
from adapterkern.ops.reference import Weights
from tests.ops.test_native import NAMES, VIEWS, check, check_variant, eager, run
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error
from tests.support.variants import TABLE

LOW_AND_FP32 = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["oneDNN's bf16", "no bf16 of oneDNN's"])
def _products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the products that this machine has, and as where oneDNN has none in bf16."""
    if not request.param:
        monkeypatch.setattr(closed_form, "_adds_in_the_product", lambda: False)


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", LOW_AND_FP32, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_is_within_twice_eager_s(distribution: str, dtype: torch.dtype, compute: torch.dtype) -> None:
    x = DISTRIBUTIONS[distribution](torch.randn(150, 300, dtype=torch.float64)).to(dtype)
    check(x, make_weights(300, 64), torch.randn(150, 300).to(dtype), compute, "silu", closed_form)


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize(("variant", "distribution", "dtype"), TABLE, ids=str)
def test_a_residual_a_scale_and_no_norm(variant: str, distribution: str, dtype: torch.dtype) -> None:
    check_variant(variant, distribution, dtype, closed_form)


@pytest.mark.parametrize("dtype", LOW_AND_FP32, ids=str)
@pytest.mark.parametrize("change", [0, 16])
def test_large_constant_rows(change: float, dtype: torch.dtype) -> None:
    """Eager with parameters in x's dtype (no autocast) has none of the rounding of rstd·mean in the scale's gradient.

    ``change`` is added to one number of every row.
    """
    x = (1000 * torch.randn(150, 1)).to(dtype).repeat(1, 300)
    x[:, 7] += change
    w, dy = Weights(*(t.to(dtype) for t in make_weights(300, 64))), torch.randn(150, 300).to(dtype)
    compute = torch.float32 if dtype == torch.float16 else dtype
    ours, theirs = run(x, w, dy, compute, on=closed_form), eager(x, w, dy, "silu")
    exact = eager(x.double(), Weights(*(t.double() for t in w)), dy.double(), "silu")
    for name, o, t, e in zip(NAMES, ours, theirs, exact, strict=True):
        assert relative_error(o, e) <= 2 * relative_error(t, e) + 4 * torch.finfo(dtype).eps, name


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("dtype", [torch.float64, *LOW_AND_FP32], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, dtype: torch.dtype) -> None:
    x, dy = (VIEWS[view](base) for base in torch.randn(2, 140, 140).to(dtype))
    w, before = make_weights(100, 24, dtype), x.clone()
    compute = torch.float32 if dtype == torch.float16 else dtype
    got, expected = (run(a, w, b, compute, on=closed_form) for a, b in ((x, dy), (x.contiguous(), dy.contiguous())))
    assert got[0].is_contiguous()
    assert torch.equal(x, before)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
