"""The closed form in PyTorch operations, which CPUs without kernels run: against fp64."""

import pytest
import torch

from adapterkern.ops import closed_form
from tests.ops.test_native import check
from tests.support.numerics import DISTRIBUTIONS, make_weights


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_is_within_twice_eager_s(distribution: str, dtype: torch.dtype, compute: torch.dtype) -> None:
    x = DISTRIBUTIONS[distribution](torch.randn(150, 300, dtype=torch.float64)).to(dtype)
    check(x, make_weights(300, 64), torch.randn(150, 300).to(dtype), compute, "silu", closed_form)
