"""The Triton kernels, interpreted, against fp64. Run by test_kernels.py in a process with TRITON_INTERPRET=1.

Every uninitialized tensor is filled with NaN, so what a kernel fails to write, or reads unmasked, shows.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adapterkern as ak
from adapterkern.ops import choice
from adapterkern.ops.kernels import backward, hidden, launch, slice
from adapterkern.ops.reference import ACTIVATIONS, Weights
from tests.support.interpreted import exact, set_sms, value_and_grads
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error

pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")

assert choice.INTERPRETED
NAMES = ["y", "x", *Weights._fields]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check_within_twice_eager(x: Tensor, weights: list[Tensor] | Weights, dy: Tensor, **kwargs) -> None:  # type: ignore[no-untyped-def]
    eager_kwargs = {k: v for k, v in kwargs.items() if k != "x_free"}
    floor = 4 * torch.finfo(x.dtype).eps
    for name, ours, theirs, true in zip(
        NAMES,
        value_and_grads(x, weights, dy, **kwargs),
        value_and_grads(x, weights, dy, fused=False, **eager_kwargs),
        exact(x, weights, dy, **eager_kwargs),
        strict=True,
    ):
        assert ours.shape == true.shape
        assert relative_error(ours, true) <= 2 * relative_error(theirs, true) + floor, name


T, D, R = 70, 136, 20
# Constant and large: without the row shift the error is ρ = 316 times that of fp32 sums of 6e4.
# A mean of 15 deviations is just below the bound up to which bf16 rows go into the products unchanged.
TABLE = {**DISTRIBUTIONS, "constant 6e4": lambda x: torch.full_like(x, 6e4), "mean 15 sigma": lambda x: x + 15}
# Where a row's deviation is far below the branch, y's rounding hides it, and x̂ cannot be recovered from y.
X_FREE = [name for name in DISTRIBUTIONS if name not in ("constant rows", "zero rows", "tiny variance")]


def draw(distribution: str, dtype: torch.dtype) -> tuple[Tensor, Weights, Tensor]:
    x = TABLE[distribution](torch.randn(T, D, dtype=torch.float64)).to(dtype)
    return x, make_weights(D, R), torch.randn(T, D).to(dtype)


@pytest.mark.parametrize("sms", [2, 64], ids=["fused", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", TABLE)
def test_error_table(distribution: str, dtype: torch.dtype, sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sms(monkeypatch, sms)
    check_within_twice_eager(*draw(distribution, dtype))


@pytest.mark.parametrize("sms", [2, 64], ids=["fused", "split"])
def test_rows_whose_squares_overflow(sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sms(monkeypatch, sms)
    _, w, dy = draw("normal", torch.bfloat16)
    check_within_twice_eager((1e18 * (torch.randn(T, D) + 3)).bfloat16(), w, dy)


@pytest.mark.parametrize("sms", [2, 64], ids=["fused", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype, sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sms(monkeypatch, sms)
    x, w, dy = draw("normal", dtype)
    x[5, 100], x[9, 0], x[66], dy[20, 3] = float("nan"), float("inf"), float("-inf"), float("nan")
    # Not eager in the same dtype: with AMX oneDNN's bf16 product spoils the row above, too.
    for ours, theirs in zip(value_and_grads(x, w, dy)[:2], exact(x, w, dy)[:2], strict=True):
        finite = theirs.isfinite().all(1)
        assert torch.equal(ours.isfinite().all(1), finite)
        assert relative_error(ours[finite], theirs[finite]) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", X_FREE)
def test_error_table_x_free(distribution: str, dtype: torch.dtype) -> None:
    check_within_twice_eager(*draw(distribution, dtype), x_free=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    x, w, dy = draw("normal", torch.float32)
    check_within_twice_eager(3 * x, w, dy, activation=activation)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 80),
    d=st.one_of(st.integers(4, 20), st.integers(100, 200)),  # below, ρ magnifies what cancels
    r=st.one_of(st.integers(1, 70), st.sampled_from([256, 257])),
    dtype=st.sampled_from(DTYPES),
    sms=st.sampled_from([1, 3, 40]),
    x_free=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_any_shape(rows: int, d: int, r: int, dtype: torch.dtype, sms: int, x_free: bool, activation: str) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, rows, d).to(dtype)
    w = make_weights(d, r)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_sms(monkeypatch, sms)
        got = value_and_grads(x, w, dy, x_free=x_free, activation=activation)
    for name, g, e in zip(NAMES, got, exact(x, w, dy, activation=activation), strict=True):
        # Gradients of few rows cancel to less than dy's own rounding: compare on the scale of dy.
        error = (g.double() - e).norm() / torch.maximum(e.norm(), dy.double().norm())
        assert error <= 16 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize(("d", "r"), [(40, 512), (33, 32)])
def test_tiles_of_few_columns(d: int, r: int) -> None:
    """8 columns where x and A, W_up in fp32 would not fit; 16 at r = 32 and odd d, where 32 could not be told apart."""
    check_within_twice_eager(torch.randn(20, d), make_weights(d, r), torch.randn(20, d), x_free=True)


def test_row_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = torch.randn(2, 300, 96)
    w = make_weights(96, 16)
    calls: list[object] = []
    set_sms(monkeypatch, 2)
    run = backward.slice_kernel.run
    monkeypatch.setattr(backward.slice_kernel, "run", lambda *a, **k: calls.append(k["grid"]) or run(*a, **k))
    got = value_and_grads(x, w, dy)
    assert len(calls) == 5  # two tiles of 32 rows per wave
    for name, g, e in zip(NAMES, got, exact(x, w, dy), strict=True):
        assert relative_error(g, e) < 1e-6, name


def walks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each program of the slice kernel, whether it found that its rows may go into the products unchanged."""
    found: list[bool] = []
    may_go = slice._may_go_direct

    class Noted:
        def __call__(self, *args: object) -> object:
            found.append(bool((result := may_go(*args)).handle.data))
            return result

    monkeypatch.setattr(slice, "_may_go_direct", Noted())
    return found


def test_a_constant_row_turns_its_chunk_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = torch.randn(2, 300, 96).bfloat16()
    x[200] = 6e4
    set_sms(monkeypatch, 2)
    found = walks(monkeypatch)
    check_within_twice_eager(x, make_weights(96, 16), dy)
    assert found == [True, True, False, False, True, True]  # three chunks, two shares of the rows


def test_a_constant_sequence_turns_its_adapter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    w = [torch.stack(t) for t in zip(*(make_weights(40, 12) for _ in range(3)), strict=True)]
    x, dy = torch.randn(2, 5, 70, 40).bfloat16()
    x[3] = 0.5
    found = walks(monkeypatch)
    check_within_twice_eager(x, w, dy, index=torch.tensor([2, 0, -1, 1, 0]))
    assert set(found) == {True, False}
    assert len(found) == 3 * found.count(False)


def test_two_runs_agree_to_the_bit() -> None:
    x, w, dy = draw("normal", torch.float16)
    for a, b in zip(value_and_grads(x, w, dy), value_and_grads(x, w, dy), strict=True):
        assert torch.equal(a, b)


def test_strided_rows_are_read_in_place_and_misaligned_ones_copied() -> None:
    _, w, dy = draw("normal", torch.float32)
    base = torch.randn(T, D + 8)
    for x, copied in ((base[:, :D], False), (base[:, 1 : D + 1], True), (base[::2, :D], False)):
        rows = launch._rows(x, dense=False)
        assert (rows.data_ptr() != x.data_ptr()) == copied
        y = ak.adapter(x, *w)
        assert torch.equal(y, ak.adapter(x.contiguous(), *w))
    wide = torch.randn(T, D + 8)[:, :D].copy_(dy)
    for a, b in zip(value_and_grads(base[:, :D], w, wide), value_and_grads(base[:, :D], w, dy), strict=True):
        assert torch.equal(a, b)


def test_gradient_of_a_sum_has_no_strides() -> None:
    x, w, _ = draw("normal", torch.float32)
    leaf = x.clone().requires_grad_()
    ak.adapter(leaf, *w).sum().backward()
    assert leaf.grad is not None
    assert relative_error(leaf.grad, exact(x, w, torch.ones_like(x))[1]) < 1e-6


def test_offsets_beyond_int32() -> None:
    x = torch.randn(3, 64).half()
    torch.use_deterministic_algorithms(False)  # 4 GB of address space, of which three rows are ever touched
    wide = torch.empty(2 * 2**30 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1)).copy_(x)
    w = make_weights(64, 16)
    assert torch.equal(ak.adapter(wide, *w), ak.adapter(x, *w))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one(rows: int) -> None:
    x, w, dy = draw("normal", torch.float32)
    got = value_and_grads(x[:rows], w, dy[:rows])
    for name, g, e in zip(NAMES, got, exact(x[:rows], w, dy[:rows]), strict=True):
        assert relative_error(g, e) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [[i] for i in range(7)] + [[0, 3], [1, 2], [0, 5]], ids=str)
def test_only_what_is_asked_for(wanted: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, dy = draw("normal", dtype)
    kernels: dict[str, dict[str, object]] = {}
    for kernel in (hidden.hidden_kernel, backward.slice_kernel, backward.reduce_kernel):

        def run(*args: object, _kernel=kernel, _run=kernel.run, **kwargs: object) -> None:  # type: ignore[no-untyped-def]
            kernels[_kernel.fn.__name__] = dict(zip(_kernel.arg_names, args, strict=False))
            _run(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", run)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, *w))]
    got = torch.autograd.grad(ak.adapter(*leaves), [leaves[i] for i in wanted], dy)
    for i, g in zip(wanted, got, strict=True):
        assert relative_error(g, exact(x, w, dy)[1 + i]) < (1e-6 if dtype == torch.float32 else 1e-2)
    given = {name for name, value in kernels["slice_kernel"].items() if isinstance(value, Tensor)}
    assert ("p_dx" in given) == (0 in wanted)
    assert ("p_g" in given) == bool({1, 3} & set(wanted))
    assert ("p_s" in given) == bool({2, 3, 4} & set(wanted))
    assert ("p_q" in given) == (dtype == torch.bfloat16 and bool({1, 3} & set(wanted)))
    assert ("p_u" in given) == (5 in wanted)
    assert ("p_dbias" in given) == (6 in wanted)
    assert ("hidden_kernel" in kernels) == (wanted != [6])
    assert ("reduce_kernel" in kernels) == (wanted != [0])


# Mixed adapters


@pytest.mark.parametrize("x_free", [False, True])
@pytest.mark.parametrize("sms", [2, 64], ids=["fused", "split"])
@pytest.mark.parametrize(
    ("shape", "index"),
    [
        ((6, 10, 40), [2, 0, -1, 2, 2, 0]),
        ((3, 70, 40), [1, -1, 0]),
        ((5, 40), [3, -1, 3, 0, 1]),
        ((2, 2, 9, 40), [[0, 3], [-1, -1]]),
        ((2, 9, 40), [-1, -1]),
    ],
    ids=str,
)
def test_mixed_adapters(
    shape: tuple[int, ...], index: list[object], sms: int, x_free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sms(monkeypatch, sms)
    w = [torch.stack(t) for t in zip(*(make_weights(40, 12) for _ in range(4)), strict=True)]
    x, dy = torch.randn(2, *shape)
    chosen = torch.tensor(index)
    got = value_and_grads(x, w, dy, index=chosen, x_free=x_free)
    for name, g, e in zip(NAMES, got, exact(x, w, dy, index=chosen), strict=True):
        assert relative_error(g, e) < 1e-6, name
    none = chosen == -1
    assert torch.equal(got[0][none], x[none])
    assert torch.equal(got[1][none], dy[none])


def test_mixed_adapters_equal_each_alone_to_the_bit() -> None:
    w = [torch.stack(t) for t in zip(*(make_weights(40, 12) for _ in range(2)), strict=True)]
    x = torch.randn(4, 70, 40)
    index = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    mixed = ak.adapter(x, *w, index=index)
    for i, e in enumerate(index):
        assert torch.equal(mixed[i], ak.adapter(x[i], *(t[e] for t in w)))
    column = torch.stack([index, 1 - index], 1)[:, 0]  # every second number in memory
    assert torch.equal(ak.adapter(x, *w, index=column), mixed)


# The operator around the kernels


def test_one_hidden_sized_tensor_is_saved_and_it_is_x_or_y() -> None:
    x, w, _ = draw("normal", torch.float32)
    for x_free in (False, True):
        saved: list[Tensor] = []
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):  # type: ignore[misc]  # mypy infers no lambda with a default
            y = ak.adapter(leaf, *w, x_free=x_free)
        rows = [t for t in saved if t.shape[:1] == (T,)]
        large = [t.data_ptr() for t in rows if t.numel() >= T * D]
        assert large == [(y if x_free else leaf).data_ptr()]
        assert sum(t.nbytes for t in rows if t.data_ptr() not in large) == T * R * 4 + 2 * T * 4


def test_products_follow_each_of_torch_s_tf32_settings() -> None:
    """After the last way, transformers' TrainingArguments(tf32=True), reading allow_tf32 raises."""
    matmul = torch.backends.cuda.matmul
    before = torch.backends.fp32_precision, matmul.fp32_precision  # type: ignore[attr-defined]  # torch replaces the module at import
    try:
        assert launch._precision(torch.float32) == "ieee"
        matmul.allow_tf32 = True
        assert launch._precision(torch.float32) == "tf32"
        assert launch._precision(torch.bfloat16) == "ieee"
        matmul.allow_tf32 = False
        assert launch._precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert launch._precision(torch.float32) == "tf32"
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]  # torch replaces the module at import
        assert launch._precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision, matmul.fp32_precision = before  # type: ignore[attr-defined]  # torch replaces the module at import


def test_what_lies_beyond_the_columns_of_the_sums_is_not_read() -> None:
    """The kernels by clusters write d of D columns, and here d ends amid a block of the last kernel's."""
    d, r, R, D = 240, 12, 16, 256
    weights = [*make_weights(d, r), torch.tensor([1.5])]
    sums = [torch.randn(3, 1, *size) for size in ((R, D), (R,), (R,), (R, D), (D,))]
    for i in (0, 3, 4):
        sums[i][..., d:] = float("nan")
    needed = backward.Needed(False, *[True] * 7)
    grads = backward._gradients(sums, weights, needed, D=D, R=R, scale=weights[6], pdl=False)
    u, dbias = sums[3].sum((0, 1))[:r, :d].T, sums[4].sum((0, 1))[:d]
    torch.testing.assert_close(grads[4:6], [1.5 * u, 1.5 * dbias])
    torch.testing.assert_close(grads[6], ((u * weights[4]).sum() + (dbias * weights[5]).sum()).view(1))
    assert all(g is not None and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("mode", ["plain", "x-free", "mixed"])
def test_opcheck_and_compile(mode: str) -> None:
    x, dy = torch.randn(2, 4, 9, 40)
    index = torch.tensor([1, 0, -1, 1]) if mode == "mixed" else None
    w: list[Tensor] = list(make_weights(40, 12))
    if index is not None:
        w = [torch.stack([t, t + 0.1]) for t in w]
    leaves = [t.clone().requires_grad_() for t in (x, *w)]
    arguments = (*leaves, 1e-5, "silu", None, True, mode == "x-free", index)
    torch.library.opcheck(torch.ops.adapterkern.adapter_forward.default, arguments)

    kwargs = {"x_free": mode == "x-free", "index": index}
    compiled = torch.compile(lambda *t: ak.adapter(*t, **kwargs), fullgraph=True, backend="aot_eager")
    y = compiled(*leaves)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    for g, e in zip(got, value_and_grads(x, w, dy, **kwargs), strict=True):
        assert torch.equal(g, e)
