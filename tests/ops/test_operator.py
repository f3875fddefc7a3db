"""The operator on CPU: against fp64, through torch.library's checks, under autocast and torch.compile; its errors."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad

import adapterkern as ak
from adapterkern.ops import choice, operator, stock
from adapterkern.ops.checks import DTYPES
from adapterkern.ops.reference import ACTIVATIONS, Weights, adapter_eager
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error

LOW = (torch.bfloat16, torch.float16)


def op(x: Tensor, *weights: Tensor, activation: str = "silu", compute_dtype: torch.dtype | None = None) -> Tensor:
    """The operator itself: ``adapter`` runs inputs as small as these in eager PyTorch."""
    return torch.ops.adapterkern.adapter_forward(x, *weights, 1e-5, activation, compute_dtype, True)[0]


def eager(x: Tensor, *weights: Tensor, activation: str = "silu") -> Tensor:
    return ak.adapter(x, *weights, activation=activation, fused=False)


def value_and_grads(function, x: Tensor, weights: Weights, dy: Tensor, **kwargs) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    y = function(*leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


NAMES = ["y", "x", *Weights._fields]


@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_is_within_twice_eager_s(distribution: str, dtype: torch.dtype) -> None:
    T, d, r = 128, 96, 16
    x = DISTRIBUTIONS[distribution](torch.randn(T, d, dtype=torch.float64)).to(dtype)
    weights, dy = make_weights(d, r), torch.randn(T, d).to(dtype)
    exact = value_and_grads(eager, x.double(), Weights(*(w.double() for w in weights)), dy.double())
    ours = value_and_grads(op, x, weights, dy)
    theirs = value_and_grads(eager, x, weights, dy)
    floor = 4 * torch.finfo(dtype).eps
    for name, o, t, e in zip(NAMES, ours, theirs, exact, strict=True):
        assert relative_error(o, e) <= 2 * relative_error(t, e) + floor, name


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_opcheck(activation: str) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = [w.requires_grad_() for w in make_weights(5, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: op(*t, activation=activation), (x, *weights))
    frozen = [t.detach().float() for t in (x, *weights)]
    for args, save in (((x, *weights), True), (frozen, True), (frozen, False)):
        torch.library.opcheck(torch.ops.adapterkern.adapter_forward.default, (*args, 1e-5, activation, None, save))


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    d=st.integers(1, 40),
    r=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape(shape: list[int], d: int, r: int, dtype: torch.dtype) -> None:
    x, dy = torch.randn(2, *shape, d, dtype=dtype)
    weights = make_weights(d, r)
    got = value_and_grads(op, x, weights, dy)
    expected = value_and_grads(eager, x.double(), Weights(*(w.double() for w in weights)), dy.double())
    assert [g.shape for g in got] == [e.shape for e in expected]
    assert [g.dtype for g in got] == [dtype, dtype, *(w.dtype for w in weights)]
    for name, g, e in zip(NAMES, got, expected, strict=True):
        # d=1 normalizes every row to exactly 0: the exact gradients of x cancel to dy, so compare on dy's scale.
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")  # type: ignore[misc]  # mypy infers no lambda with a default


def test_strided_and_zero_stride_inputs() -> None:
    weights = make_weights(24, 8)
    base = torch.randn(24, 5, 3)
    x = base.permute(2, 1, 0)
    dy = torch.randn(1, 1, 1).expand(3, 5, 24)
    for got, expected in zip(
        value_and_grads(lambda x, *w: op(x.permute(2, 1, 0), *w), base, weights, dy),
        value_and_grads(lambda x, *w: eager(x.permute(2, 1, 0), *w), base, weights, dy),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(op(x, *weights), op(x.contiguous(), *weights), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 12)], ids=str)
def test_the_result_may_be_written_in_place(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape, requires_grad=True), make_weights(12, 4)
    y = op(x, *w)
    y += 1
    (got,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad((eager(x, *w) + 1).square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wanted", [[i] for i in range(7)] + [[0, 3], [1, 2], [3, 4, 5, 6]], ids=str)
def test_only_gradients_asked_for(wanted: list[int]) -> None:
    leaves = [torch.randn(6, 12), *make_weights(12, 4)]
    for i in wanted:
        leaves[i].requires_grad_()
    got = torch.autograd.grad(op(*leaves).square().sum(), [leaves[i] for i in wanted])
    expected = torch.autograd.grad(eager(*leaves).square().sum(), [leaves[i] for i in wanted])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_saves_no_hidden_sized_tensor_but_x() -> None:
    T, d, r = 64, 48, 4
    saved: list[Tensor] = []
    x = torch.randn(T, d, requires_grad=True)
    weights = make_weights(d, r)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op(x, *weights)
    large = [t for t in saved if t.numel() == T * d]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_residual_stream_s_dtype(x_dtype: torch.dtype) -> None:
    weights = make_weights(64, 8)
    x, dy = torch.randn(2, 32, 64).to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_grads(op, x, weights, dy)  # the backward, too, runs with autocast on
    assert got[0].dtype == got[1].dtype == x_dtype
    explicit = value_and_grads(op, x, weights, dy, compute_dtype=torch.bfloat16)
    for g, e in zip(got, explicit, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0)


def test_autocast_leaves_fp64_alone() -> None:
    x, weights = torch.randn(4, 8, dtype=torch.float64), make_weights(8, 2, torch.float64)
    expected = op(x, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(op(x, *weights), expected, rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(autocast: bool) -> None:
    weights = make_weights(32, 8)
    x, dy = torch.randn(2, 4, 8, 32)

    def step(*leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ak.adapter(*leaves)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = value_and_grads(compiled, x, weights, dy)
    expected = value_and_grads(step, x, weights, dy)
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < (1e-2 if autocast else 1e-6)


def test_compiled_code_prepares_weights_for_the_kernels_alone() -> None:
    """Once, in the forward; none of the operator's other implementations reads them."""
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append([str(node.target) for node in graph.graph.nodes if "adapterkern" in str(node.target)])
        return make_boxed_func(graph)

    leaves = [torch.randn(4, 32), *make_weights(32, 8)]
    for dtype, prepared in ((torch.float32, choice.INTERPRETED), (torch.float64, False)):
        graphs.clear()
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        leaves = [t.to(dtype).requires_grad_() for t in leaves]
        torch.compile(ak.adapter, fullgraph=True, backend=backend)(*leaves).sum().backward()
        names = ["prepare_weights", "adapter_forward", "adapter_backward"]
        expected = [f"adapterkern.{name}.default" for name in names[0 if prepared else 1 :]]
        assert graphs == [expected[:-1], expected[-1:]]


def test_results_are_contiguous_whatever_x_is() -> None:
    """As the fake says: a compiled graph is built on its strides."""
    leaves = [torch.randn(32, 48).t(), *(w.requires_grad_() for w in make_weights(32, 8))]
    leaves[0].requires_grad_()
    y = op(*leaves, compute_dtype=torch.bfloat16)
    grads = torch.autograd.grad(y, leaves, torch.randn(32, 48).t())
    assert all(t.is_contiguous() for t in (y, *grads))
    arguments = (*leaves, 1e-5, "silu", torch.bfloat16, True)
    torch.library.opcheck(torch.ops.adapterkern.adapter_forward.default, arguments)
    stacked = [torch.stack([w, w], -1).detach().movedim(-1, 0).requires_grad_() for w in leaves[1:]]
    index = torch.tensor([0, 1, -1] * 16)
    y = torch.ops.adapterkern.adapter_forward(leaves[0], *stacked, 1e-5, "silu", None, True, False, index)[0]
    assert all(g.is_contiguous() for g in torch.autograd.grad(y.sum(), [leaves[0], *stacked]))


def test_transforms_take_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator would return zero tangents, and has no rule for torch.func."""
    monkeypatch.setattr(operator, "prefers_eager", lambda *_: False)
    x, w = torch.randn(2, 3, 8), make_weights(8, 4)

    def fused(x: Tensor) -> Tensor:
        return ak.adapter(x, *w)

    def stock(x: Tensor) -> Tensor:
        return ak.adapter(x, *w, fused=False)

    def dual(function) -> Tensor:  # type: ignore[no-untyped-def]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x)))[1]

    for transformed in (
        dual,
        lambda f: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.vjp(f, x)[1](x)[0],
        lambda f: torch.vmap(f)(x),
    ):
        torch.testing.assert_close(transformed(fused), transformed(stock), rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_the_stock_path_takes_every_dtype_beside_every_other(
    dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> None:
    x, weights = torch.randn(2, 3, 8).to(dtype), make_weights(8, 4, weight_dtype)
    stacked = Weights(*(w[None] for w in weights))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = value_and_grads(eager, x, weights, x)
        mixed = ak.adapter(x, *stacked, index=torch.zeros(2, dtype=torch.int64), fused=False)
        module = ak.Adapter(8, 4, fused=False, dtype=weight_dtype)
        assert module(x).dtype == dtype
    assert [t.dtype for t in got] == [dtype, dtype] + [weight_dtype] * 6
    expected = eager(x.double(), *(w.double() for w in weights))
    low = (autocast and dtype != torch.float64) or dtype in LOW
    for y in (got[0], mixed):
        assert relative_error(y, expected) < (2e-2 if low else 1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_an_empty_mixed_batch(shape: tuple[int, ...], fused: bool) -> None:
    weights = (w[None] for w in make_weights(8, 4))
    index = torch.zeros(shape[0], dtype=torch.int64)
    assert ak.adapter(torch.zeros(shape), *weights, index=index, fused=fused).shape == shape


@pytest.mark.parametrize(("native", "least"), [(True, 64), (False, 512)])
def test_large_inputs_take_the_operator_and_small_ones_eager(
    native: bool, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    monkeypatch.setattr(choice, "runs_native", lambda kind, dtype: native)
    monkeypatch.setattr(operator, "needs_no_dispatcher", lambda *_: False)
    monkeypatch.setattr(stock, "adapter_eager", lambda *a, **k: names.append("eager") or adapter_eager(*a, **k))
    monkeypatch.setattr(
        operator, "forward_op", lambda *a: names.append("op") or torch.ops.adapterkern.adapter_forward(*a)
    )
    weights = make_weights(4096, 16)
    for rows in (1, least - 1, least):
        ak.adapter(torch.randn(rows, 4096), *weights)
    assert names == ["eager", "eager", "op"]
    monkeypatch.setenv("ADAPTERKERN_FUSED", "0")
    ak.adapter(torch.randn(512, 4096), *weights)
    assert names[3:] == ["eager"]


def test_double_backward_is_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(op(x, *make_weights(4, 2)).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fused=False"):
        g.sum().backward()


def bad(index: int, value: object, **kwargs: object):  # type: ignore[no-untyped-def]
    args: list[object] = [torch.randn(3, 8), *make_weights(8, 4)]
    args[index] = value
    return lambda: ak.adapter(*args, **kwargs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(0, [1.0]), TypeError, "x: expected a torch.Tensor, got list"),
        (bad(0, torch.zeros(3, 8, dtype=torch.int64)), TypeError, "x: expected dtype .*, got torch.int64"),
        (bad(0, torch.eye(8).to_sparse()), TypeError, "x: expected a dense tensor, got layout torch.sparse_coo"),
        (bad(2, None), TypeError, "norm_bias: expected a torch.Tensor, got NoneType"),
        (bad(0, torch.tensor(1.0)), ValueError, r"x: expected shape \(..., d\) .* got \(\)"),
        (bad(0, torch.zeros(3, 0)), ValueError, r"x: expected shape .* got \(3, 0\)"),
        (bad(0, torch.zeros(3, 7)), ValueError, r"norm_weight: expected shape \(7,\) .* got \(8,\)"),
        (bad(3, torch.zeros(8)), ValueError, r"down_weight: expected shape \(r, 8\), got \(8,\)"),
        (bad(3, torch.zeros(513, 8)), ValueError, "down_weight: expected 1 <= r <= 512 rows, got 513"),
        (bad(3, torch.zeros(0, 8)), ValueError, "down_weight: expected 1 <= r <= 512 rows, got 0"),
        (bad(5, torch.zeros(4, 8)), ValueError, r"up_weight: expected shape \(8, 4\) .* got \(4, 8\)"),
        (bad(6, torch.zeros(8, device="meta")), ValueError, "up_bias: expected device cpu like x, got meta"),
        (bad(6, torch.zeros(8), activation="swish"), ValueError, "activation: expected one of silu, .* got 'swish'"),
        (bad(6, torch.zeros(8), activation=["silu"]), ValueError, r"activation: .*, got \['silu'\]"),
        (bad(6, torch.zeros(8), scale="2"), TypeError, r"scale: expected a number in \(-inf, inf\), got '2'"),
        (bad(6, torch.zeros(8), scale=float("nan")), ValueError, r"scale: expected a number in \(-inf, inf\), got nan"),
        (
            bad(6, torch.zeros(8), scale=torch.ones(2)),
            ValueError,
            r"scale: expected a number or a tensor of one element, got shape \(2,\)",
        ),
        (bad(6, torch.zeros(8), scale=torch.ones(1, dtype=torch.int64)), TypeError, "scale: expected dtype .*int64"),
        (bad(6, torch.zeros(8), residual=1.0), TypeError, "residual: expected a torch.Tensor, got float"),
        (
            bad(6, torch.zeros(8), residual=torch.ones(3, 8).double()),
            TypeError,
            "residual: expected a dense tensor of x's dtype torch.float32, got torch.float64",
        ),
        (
            bad(6, torch.zeros(8), residual=torch.ones(8)),
            ValueError,
            r"residual: expected shape \(3, 8\) on cpu like x, got \(8,\) on cpu",
        ),
        (
            bad(6, torch.zeros(8), residual=torch.ones(3, 8), x_free=True),
            ValueError,
            "x_free: expected False with a residual, .*, got True",
        ),
        (bad(6, torch.zeros(8), eps="a"), TypeError, r"eps: expected a number in \[0, inf\], got 'a'"),
        (bad(6, torch.zeros(8), eps=True), TypeError, r"eps: expected a number in \[0, inf\], got True"),
        (bad(6, torch.zeros(8), eps=float("nan")), ValueError, r"eps: expected a number in \[0, inf\], got nan"),
        (bad(6, torch.zeros(8), eps=-1.0), ValueError, r"eps: expected a number in \[0, inf\], got -1\.0"),
    ],
)
def test_errors_name_the_argument(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error) as caught:
        call()
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 1, 0], TypeError, "index: expected a torch.Tensor of dtype int64 or int32, got list"),
        (torch.zeros(3), TypeError, "index: expected a torch.Tensor of dtype int64 or int32, got torch.float32"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "index: expected device cpu like x, got meta"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"index: expected leading dimensions of x, \(3,\), got \(4,\)"),
        (torch.zeros(2, 8, dtype=torch.int64), ValueError, r"index: expected leading dimensions .* got \(2, 8\)"),
        (torch.tensor([0, 1, 2]), ValueError, "index: expected values from -1 to 1, got 0 to 2"),
        (torch.tensor([0, -2, 0]), ValueError, "index: expected values from -1 to 1, got -2 to 0"),
    ],
)
def test_errors_of_an_index(index: object, error: type[Exception], message: str) -> None:
    weights = [torch.stack([w, w]) for w in make_weights(8, 4)]
    with pytest.raises(error, match=message):
        ak.adapter(torch.randn(3, 8), *weights, index=index)
