"""The CPU kernels of every instruction set that the machine has: against fp64, and to the bit between threads."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from adapterkern.ops import native, rows
from adapterkern.ops.call import Call
from adapterkern.ops.dropout import Drop
from adapterkern.ops.kept import parameters_changed
from adapterkern.ops.reference import Weights, adapter_eager
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error
from tests.support.variants import SEED, evaluate, make_case
from tests.support.variants import TABLE as VARIANT_TABLE
from tests.support.variants import check as check_case
from tests.support.variants import eager as eager_of_any

PLAIN = Call(1e-5, "silu", torch.float32)
HERE = native._C.instruction_sets() if native._C is not None else []
NAMES = ("y", "x", *Weights._fields)
# T, d, r, activation: rows, columns and dimensions on both sides of every block
SHAPES = [
    (1, 40, 1, "silu"),
    (33, 576, 16, "gelu"),
    (130, 100, 70, "relu"),
    (257, 1000, 256, "tanh"),
    (5, 33, 5, "identity"),
    (40, 513, 512, "silu"),
    (64, 1, 3, "silu"),
    (129, 7, 32, "silu"),
    (300, 96, 33, "gelu"),
]
TABLE = [(shape, "normal") for shape in SHAPES] + [((150, 300, 64, "silu"), name) for name in DISTRIBUTIONS]


@pytest.fixture(params=["avx2", "avx512", "avx512_bf16", "amx"], autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param not in HERE:
        pytest.skip(f"this machine or this build has no {request.param}, only {', '.join(HERE) or 'none'}")
    monkeypatch.setenv("ADAPTERKERN_CPU_ISA", request.param)
    native.instruction_set.cache_clear()
    yield request.param
    native.instruction_set.cache_clear()


def run(
    x: Tensor, w: Weights, dy: Tensor, compute: torch.dtype, activation: str = "silu", on: rows.Rows = native
) -> list[Tensor]:
    """y and the gradients, by the kernels."""
    y, z, mean, rstd = rows.adapter_forward(on, x, w, call := Call(1e-5, activation, compute), True)
    grads = rows.adapter_backward(on, dy, x, z, mean, rstd, w, call, [True] * 7)
    return [y, *(g for g in grads if g is not None)]


def eager(x: Tensor, w: Weights, dy: Tensor, activation: str, compute: torch.dtype | None = None) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *w)]
    with torch.autocast("cpu", compute or torch.bfloat16, enabled=compute is not None):
        y = adapter_eager(leaves[0], Weights(*leaves[1:]), eps=1e-5, activation=activation).to(x.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(x: Tensor, w: Weights, dy: Tensor, compute: torch.dtype, activation: str, on: rows.Rows = native) -> None:
    """The error is within twice that of eager PyTorch, in autocast to the lower of the two dtypes."""
    exact = eager(x.double(), Weights(*(t.double() for t in w)), dy.double(), activation)
    low = compute if compute != torch.float32 else x.dtype
    theirs = eager(x, w, dy, activation, None if low == torch.float32 else low)
    floor = 4 * max(torch.finfo(t).eps for t in (x.dtype, compute))
    for name, o, t, e in zip(NAMES, run(x, w, dy, compute, activation, on), theirs, exact, strict=True):
        assert relative_error(o, e) <= 2 * relative_error(t, e) + floor, name


@pytest.mark.usefixtures("nan_in_empty_tensors")
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "distribution"), TABLE, ids=str)
def test_error_is_within_twice_eager_s(
    shape: tuple[int, int, int, str], distribution: str, dtype: torch.dtype, compute: torch.dtype
) -> None:
    T, d, r, activation = shape
    x = DISTRIBUTIONS[distribution](torch.randn(T, d, dtype=torch.float64)).to(dtype)
    check(x, make_weights(d, r), torch.randn(T, d).to(dtype), compute, activation)


def check_variant(variant: str, distribution: str, dtype: torch.dtype, on: rows.Rows) -> None:
    """As ``check``, of a call that is not plain, in the dtype of products that it has on a CPU."""
    compute = torch.float32 if dtype == torch.float16 else dtype
    case = make_case(variant, 70, 100, 24, dtype, distribution)
    low = compute if compute != torch.float32 else dtype
    given = case.named()
    # Where the scale is a number it is a factor, where it is a tensor the seventh parameter.
    learned = "scale" in given
    w = (*case.weights, case.scale) if learned else case.weights
    factor = 1.0 if learned else case.scale
    gate = None if case.gate is None else case.gate.float()
    drop = Drop(case.dropout, torch.tensor([SEED])) if case.dropout else None
    call = Call(1e-5, "silu", compute, factor, gate, drop)
    y, z, mean, rstd = rows.adapter_forward(on, case.x, w, call, True, residual=case.residual)
    needed = [name in given for name in ("x", *Weights._fields)] + [True] * (learned + (gate is not None))
    residual = case.residual is not None
    grads = rows.adapter_backward(on, case.dy, case.x, z, mean, rstd, w, call, needed, residual=residual)
    names = ("x", *Weights._fields, *(name for name in ("scale", "gate") if name in given))
    ours = {"y": y} | {name: g for name, g in zip(names, grads, strict=True) if g is not None}
    if gate is not None:
        ours["gate"] = ours["gate"].to(dtype)
    theirs, exact = (
        evaluate(eager_of_any, case, low=None if low == torch.float32 else low),
        evaluate(eager_of_any, case.to(torch.float64)),
    )
    for values in (theirs, exact):
        values.pop("residual", None)  # dy, which the operator returns without these
    check_case(case, ours, theirs, exact, max(torch.finfo(t).eps for t in (dtype, compute)))


@pytest.mark.usefixtures("nan_in_empty_tensors")
@pytest.mark.parametrize(("variant", "distribution", "dtype"), VARIANT_TABLE, ids=str)
def test_a_residual_a_scale_and_no_norm(variant: str, distribution: str, dtype: torch.dtype) -> None:
    check_variant(variant, distribution, dtype, native)


def test_many_rows_of_outlier_channels() -> None:
    """A sum over all rows in one chain has 7 times eager's error here."""
    x = DISTRIBUTIONS["outlier channels"](torch.randn(4096, 64, dtype=torch.float64)).float()
    check(x, make_weights(64, 16), torch.randn(4096, 64), torch.float32, "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    x, dy = torch.randn(2, 700, 577).to(dtype)
    w, before = make_weights(577, 40), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            native.clear()
            found.append(run(x, w, dy, dtype))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("nan_in_empty_tensors")
def test_only_what_is_needed() -> None:
    x, dy = torch.randn(2, 70, 100)
    w = make_weights(100, 24)
    whole = run(x, w, dy, torch.float32)[1:]
    y, z, mean, rstd = rows.adapter_forward(native, x, w, PLAIN, True)
    for needed in itertools.product([False, True], repeat=7):
        grads = rows.adapter_backward(native, dy, x, z, mean, rstd, w, PLAIN, needed)
        for wanted, got, expected in zip(needed, grads, whole, strict=True):
            assert (got is not None) == wanted
            assert got is None or torch.equal(got, expected)
    forward = rows.adapter_forward(native, x, w, PLAIN, False)
    assert torch.equal(forward[0], y)
    assert [t.numel() for t in forward[1:]] == [0, 0, 0]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a gap between rows": lambda base: base[:70, :100],
    "every second row": lambda base: base[::2, :100],
    "an odd address": lambda base: base[:70, 1:101],
    "one row many times": lambda base: base[:1, :100].expand(70, -1),
    "transposed": lambda base: base.t()[:70, :100],
    "every second column": lambda base: base.view(98, 200)[:70, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str) -> None:
    x, dy = (VIEWS[view](base) for base in torch.randn(2, 140, 140))
    w = make_weights(100, 24)
    for got, expected in zip(run(x, w, dy, torch.float32), run(x.clone(), w, dy.clone(), torch.float32), strict=True):
        assert torch.equal(got, expected)


def test_parameters_of_any_kind() -> None:
    """Not contiguous, of other dtypes, at odd addresses: what the kernels read is copied, gradients keep the dtype."""
    x, dy = torch.randn(2, 70, 100)
    plain = make_weights(100, 24)
    odd = Weights(*(torch.stack([t, t], -1)[..., 0] for t in plain))
    flat = torch.cat([torch.zeros(1), *(t.flatten() for t in plain)])
    ends = torch.tensor([1, *(t.numel() for t in plain)]).cumsum(0).tolist()
    shifted = Weights(*(flat[a:b].view(t.shape) for a, b, t in zip(ends, ends[1:], plain, strict=False)))
    expected = run(x, plain, dy, torch.float32)
    for w in (odd, shifted):
        assert all(torch.equal(a, b) for a, b in zip(run(x, w, dy, torch.float32), expected, strict=True))
    low = Weights(*(t.bfloat16() for t in plain))
    got = run(x, low, dy, torch.float32)
    expected = run(x, Weights(*(t.float() for t in low)), dy, torch.float32)
    assert [t.dtype for t in got] == [torch.float32] * 2 + [torch.bfloat16] * 6
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-2, atol=1e-3)


def test_several_adapters() -> None:
    w = [make_weights(48, 8) for _ in range(3)]
    stacked = Weights(*(torch.stack(one) for one in zip(*w, strict=True)))
    x, dy, index = torch.randn(6, 5, 48), torch.randn(6, 5, 48), torch.tensor([2, -1, 0, 2, 0, 2])
    y, z, mean, rstd = rows.adapter_forward(native, x, stacked, PLAIN, True, index)
    dx, *grads = rows.adapter_backward(native, dy, x, z, mean, rstd, stacked, PLAIN, [True] * 7, False, index)
    assert dx is not None
    assert torch.equal(y[1], x[1])
    assert torch.equal(dx[1], dy[1])
    for e in (0, 2):
        chosen = index == e
        one = run(x[chosen], w[e], dy[chosen], torch.float32)
        for got, expected in zip((y[chosen], dx[chosen], *(g[e] for g in grads)), one, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all((g[1] == 0).all() for g in grads)


class OneByOne:
    """The kernels without their door for several adapters: copies of each one's rows."""

    forward = staticmethod(native.forward)
    backward = staticmethod(native.backward)


# T, d, r, n, and which adapter each row or sequence has: by chance, all the last, none any, one for 43 rows
ROUTES = [
    (0, 40, 3, 2, "chance"),
    (1, 40, 5, 3, "last"),
    (31, 33, 1, 2, "chance"),
    (33, 70, 512, 2, "none"),
    (129, 100, 70, 40, "chance"),
    (300, 577, 33, 4, "last"),
    (301, 96, 64, 3, "sequence"),
]


def routed(
    on: rows.Rows, T: int, d: int, r: int, n: int, how: str, dtype: torch.dtype, compute: torch.dtype, x_free: bool
) -> list[Tensor]:
    """y, what is saved and all gradients of rows with a gate, dropout, a residual unless ``x_free``, and a scale."""
    torch.manual_seed(3)
    parameters = map(torch.stack, zip(*(make_weights(d, r) for _ in range(n)), strict=True))
    w = [*parameters, torch.linspace(-1, 2, n)]
    x, dy, base = torch.randn(3, T, d).to(dtype)
    index = torch.randint(-1, n - 1, (T,), dtype=torch.int32)  # the last has no rows
    index = {"last": torch.full((T,), n - 1), "none": torch.full((T,), -1), "sequence": index[:7]}.get(how, index)
    gate = torch.randn(T)
    gate[::5], gate[1::5] = 0, 1e4
    call = Call(1e-5, "gelu", compute, 1.0, gate, Drop(0.3, torch.tensor([-7])))
    y, z, mean, rstd = rows.adapter_forward(on, x, w, call, True, index, None if x_free else base)
    back = call, [True] * 9, x_free, index, not x_free
    grads = rows.adapter_backward(on, dy, y if x_free else x, z, mean, rstd, w, *back)
    assert all(g is not None for g in grads)
    return [y, z, mean, rstd, *grads]  # type: ignore[list-item]


@pytest.mark.usefixtures("nan_in_empty_tensors")
@pytest.mark.parametrize("x_free", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_rows_where_they_lie_are_rows_in_copies(
    route: tuple[int, int, int, int, str], dtype: torch.dtype, compute: torch.dtype, x_free: bool
) -> None:
    """To the bit: routed rows have what each adapter's own call gives, and rows without an adapter are copied."""
    got = routed(native, *route, dtype, compute, x_free)
    for o, e in zip(got, routed(OneByOne, *route, dtype, compute, x_free), strict=True):
        assert o.dtype == e.dtype
        torch.testing.assert_close(o, e, rtol=0, atol=0, equal_nan=True)


def test_routed_bits_do_not_depend_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            native.clear()
            found.append(routed(native, 300, 577, 33, 6, "chance", torch.float32, torch.float32, False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [-2, 3])
def test_an_index_that_no_adapter_has_is_refused(value: int) -> None:
    w = [torch.stack([t] * 3) for t in make_weights(40, 12)]
    with pytest.raises(ValueError, match=f"index: expected values from -1 to 2, got .*{value}"):
        rows.adapter_forward(native, torch.randn(2, 40), w, PLAIN, False, torch.tensor([0, value]))


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
@pytest.mark.parametrize(("rate", "r"), [(0.0, 8), (0.1, 7), (0.5, 512), (0.999, 33)])
def test_the_mask_is_the_closed_form_s(rate: float, r: int, seed: int) -> None:
    """h = z = 1 and W_up = 1 for one unit at a time: y has the mask itself; rows have numbers beyond 2³², too."""
    T, numbers = 40, torch.arange(40) * (2**31 + 1)
    drop = Drop(rate, torch.tensor([seed]), numbers)
    ones = Weights(None, None, torch.zeros(r, r), torch.ones(r), torch.eye(r), torch.zeros(r))
    zeros = torch.zeros(T, r)
    y = native.forward(zeros, ones, Call(1e-5, "identity", torch.float32, drop=drop), residual=zeros)[0]
    assert torch.equal(y, drop.mask(T, r, torch.float32))


def test_a_changed_scale_is_prepared_again() -> None:
    x, w, scale = torch.randn(40, 64), make_weights(64, 8), torch.tensor(2.0)
    made = native._prepared(w, torch.float32, scale)
    assert native._prepared(w, torch.float32, scale) is made
    assert native._prepared(w, torch.float32, 2.0) is not made
    scale.mul_(2)
    assert native._prepared(w, torch.float32, scale) is not made

    def branch(scale: Tensor | float) -> Tensor:
        return native.forward(x, w, PLAIN._replace(scale=scale))[0] - x

    torch.testing.assert_close(branch(scale), 4 * branch(1.0), rtol=1e-4, atol=1e-5)
    assert torch.equal(branch(4.0), branch(scale))


def test_changed_parameters_are_prepared_again() -> None:
    x, w = torch.randn(40, 64), make_weights(64, 8)
    made = native._prepared(w, torch.float32)
    assert native._prepared(w, torch.float32) is made
    w.up_weight.mul_(2)
    assert native._prepared(w, torch.float32) is not made
    fresh = Weights(*(t.clone() for t in w))
    both = run(x, w, x, torch.float32), run(x, fresh, x, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_parameters_that_are_written_past_pytorch() -> None:
    x, w = torch.randn(40, 64), make_weights(64, 8)
    before = native.forward(x, w, PLAIN)[0]
    w.up_weight.numpy()[:] *= 2
    parameters_changed()
    changed = native.forward(x, w, PLAIN)[0]
    assert not torch.equal(changed, before)
    assert torch.equal(changed, native.forward(x, Weights(*(t.clone() for t in w)), PLAIN)[0])


def test_nothing_is_kept_of_memory_that_processes_share() -> None:
    x, w = torch.randn(40, 64), make_weights(64, 8)
    for t in w:
        t.share_memory_()
    before = native.forward(x, w, PLAIN)[0]
    w.up_weight.numpy()[:] *= 2  # as another process may
    assert not torch.equal(native.forward(x, w, PLAIN)[0], before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_alone(value: float) -> None:
    x, w = torch.randn(70, 100), make_weights(100, 24)
    clean = run(x, w, torch.ones_like(x), torch.float32)[0]
    x[33, 5] = value
    got = run(x, w, torch.ones_like(x), torch.float32)[0]
    others = torch.arange(70) != 33
    assert torch.equal(got[others], clean[others])
    assert not got[33].isfinite().any()


def test_an_instruction_set_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKERN_CPU_ISA", "sse9")
    native.instruction_set.cache_clear()
    with pytest.raises(ValueError, match=r"ADAPTERKERN_CPU_ISA: expected one of avx2.*, got 'sse9'"):
        native.instruction_set()
