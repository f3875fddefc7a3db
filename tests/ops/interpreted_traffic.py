"""The totals of the traffic table. Run by test_kernels.py in a process with TRITON_INTERPRET=1."""

import pytest

from adapterkern.ops import kernels
from adapterkern.ops.kernels.tiles import ceil_div
from bench.traffic import eager, ours


@pytest.mark.parametrize("x_free", [False, True])
@pytest.mark.parametrize(("d", "r"), [(512, 64), (576, 16), (512, 256)])
def test_ours(d: int, r: int, x_free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    T, itemsize = 128, 2
    # Two row tiles on the interpreter's four multiprocessors would share their columns at r = 256.
    monkeypatch.setattr(kernels.forward, "column_split", lambda *given, reads: (1, ceil_div(d, given[4])))
    preparation, forward, backward = ours(T, d, r, x_free=x_free)
    assert preparation.launches == forward.launches == 1
    separate = r >= 256  # G and U in two launches, dy read once more
    assert backward.launches == 3 + separate
    assert forward.activations == 3.0  # x twice, y
    assert backward.activations == 4.0 + separate  # dy; dy, x, dx
    # A and W_up once per 64 rows, and the fp32 bias and row sums beside them; W_up once per 64 rows, A once.
    padding = -(-d // 128) * 128 / d  # weights and bias are padded to whole column tiles
    vectors = (4 * (d * padding + 2 * r) / 64) / (d * itemsize)
    assert forward.weights <= 2 * r / 64 * padding + vectors
    assert backward.weights <= (r / (32 if separate else 64) + (2 if x_free else 1) * r / T) * padding + 2 * vectors
    # z and two fp32 constants; z, dz, h and four constants, then dz, h and three constants once per slice of d.
    slices = -(-d // (64 if separate else 128))
    assert forward.rows == pytest.approx((r * itemsize + 8) / (d * itemsize))
    constants: float = 4 + 3 * slices
    # Per row tile: two sums over its rows, written and read, and a number that every program reads.
    constants += (4 * r + 1 + (1 + separate) * slices) / (32 if separate else 64)
    numbers = (3 + (2 + (separate and x_free)) * slices) * r
    assert backward.rows <= (numbers * itemsize + constants * 4) / (d * itemsize)
    # Parameters read, A and W_up written; partial sums of G and U written, read, and turned into gradients.
    assert preparation.fixed < 2.6 * padding
    assert backward.fixed < 4


def test_eager_moves_what_the_table_says() -> None:
    forward, backward, *_ = eager(8192, 4096, 64)
    assert forward.activations == pytest.approx(7.1, abs=0.05)
    assert backward.activations == pytest.approx(11.2, abs=0.05)
    assert forward.launches + backward.launches == 14
