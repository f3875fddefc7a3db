"""The kernels compiled ahead of time: what they take of the device, and that one shape means one variant."""

from collections import defaultdict

import pytest
import torch
from conftest import make_weights

from adapterkern.kernels import cache, launch
from bench import aot

NO_PRODUCTS = ("prepare", "reduce", "hidden_finish")


@pytest.mark.parametrize(
    ("d", "r", "sm", "dtype"),
    [
        (4096, 64, 90, torch.bfloat16),
        (4096, 64, 80, torch.bfloat16),
        (8192, 256, 90, torch.float16),
        (576, 16, 100, torch.bfloat16),
        (2048, 128, 100, torch.bfloat16),
        (5120, 32, 80, torch.bfloat16),
        (577, 20, 90, torch.float32),
    ],
    ids=str,
)
def test_fits_without_spilling_and_uses_tensor_cores(d: int, r: int, sm: int, dtype: torch.dtype) -> None:
    for variant in aot.variants(d, r, dtype, wide=sm >= 90):
        c = aot.compile_launch(variant, sm)
        assert c.stack == 0, c
        assert c.shared <= aot.SHARED_LIMIT[sm], c
        if dtype != torch.float32 and c.kernel not in NO_PRODUCTS:
            assert c.wgmma + c.mma > 0, c
            if sm == 90 and r >= 64:
                assert c.wgmma > 0 or (c.kernel.startswith("hidden") and r == 256), c


@pytest.mark.parametrize("d", [128, 136, 141])
@pytest.mark.parametrize("x_free", [False, True])
def test_one_variant_whatever_the_rows_and_strides(d: int, x_free: bool) -> None:
    r = 20
    weights = make_weights(d, r)
    variants = defaultdict(set)
    base = torch.randn(5000, d + 16, dtype=torch.bfloat16)
    for x in (
        base[:1, :d],
        base[:16, 16:],
        base[:33, 3 : d + 3],
        base[:128, :d].contiguous(),
        base[::2, :d],
        base[:, :d],
    ):
        with aot.recorded_launches() as launches:
            cache.clear()
            _, z, mean, rstd = launch.adapter_forward(
                x, weights, None, eps=1e-5, activation="silu", compute=x.dtype, save=True
            )
            dy = x[:1].expand(x.shape)
            launch.adapter_backward(
                dy, x, z, mean, rstd, weights, None, activation="silu", needed=[True] * 7, x_free=x_free
            )
        for recorded in launches:
            variants[recorded.kernel.fn.__name__].add(recorded.variant)
    assert set(variants) == {
        "_prepare_kernel", "forward_kernel", "forward_partial_kernel", "forward_finish_kernel",
        "hidden_partial_kernel", "hidden_kernel", "slice_kernel", "reduce_kernel",
    }  # fmt: skip
    # hidden_kernel makes its product, or adds up hidden_partial_kernel's.
    expected = {name: 2 if name == "hidden_kernel" else 1 for name in variants}
    assert {name: len(found) for name, found in variants.items()} == expected
