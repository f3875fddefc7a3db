"""An adapter and the RMSNorm behind it in one call: the CPU kernels, and the two calls that they stand for."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adapterkern as ak
from adapterkern.ops import adapter_and_norm, native, native_normed, normed, reference
from adapterkern.ops.call import Call
from adapterkern.ops.reference import Weights, adapter_eager
from adapterkern.ops.stock import eager_autocast
from tests.ops.test_native import isa
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error

__all__ = ["isa"]  # the fixture: a test runs with each instruction set
EPS = 1e-6
NAMES = ["y", "n", "x", "added", *Weights._fields]
pytestmark = pytest.mark.skipif(native.instruction_set()[0] is None, reason="no native kernels here")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU kernels' passes, which run however small an input is."""
    passes: list[str] = []
    monkeypatch.setattr(normed, "prefers_eager", lambda *_: False)
    for name in ("forward", "norm_backward"):
        own = getattr(native_normed, name)
        monkeypatch.setattr(
            native_normed, name, lambda *a, own=own, name=name, **k: (passes.append(name), own(*a, **k))[1]
        )
    return passes


def stock(x: Tensor, added: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' LLaMA has it."""
    weights, weight = Weights(*rest[:6]), rest[6]
    with eager_autocast(x):
        y = adapter_eager(x + added, weights).to(x.dtype)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return y, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(y.dtype)


def ours(x: Tensor, added: Tensor | None, *rest: Any, **how: Any) -> tuple[Tensor, Tensor]:
    return adapter_and_norm(x, *rest, added=added, next_eps=EPS, **how)


def run(function: Callable[..., Any], tensors: list[Tensor], dy: Tensor, dn: Tensor, **how: Any) -> list[Tensor]:
    """y, n and the gradients of all ``tensors`` but the last, the norm's weight."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:-1]]
    outputs = function(*leaves, tensors[-1], **how)
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, (dy, dn))]


def some(T: int, d: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    x, added, dy, dn = torch.randn(4, T, d).to(dtype)
    return [x, added, *make_weights(d, r), (1 + 0.2 * torch.randn(d)).to(dtype)], dy, dn


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_is_within_twice_eager_s(distribution: str, dtype: torch.dtype, calls: list[str]) -> None:
    d = 77  # whole vectors, and a part of one
    tensors, dy, dn = some(70, d, 16, dtype)
    # Summed, twice the values must still fit.
    tensors[:2] = (DISTRIBUTIONS[distribution](torch.randn(70, d, dtype=torch.float64)).to(dtype) / 4 for _ in range(2))
    got, theirs = run(ours, tensors, dy, dn), run(stock, tensors, dy, dn)
    assert calls == ["forward", "norm_backward"]
    exact = run(stock, [t.double() for t in tensors], dy.double(), dn.double())
    floor = 4 * torch.finfo(dtype).eps
    for name, o, t, e in zip(NAMES, got, theirs, exact, strict=True):
        assert o.dtype == t.dtype, name
        assert relative_error(o, e) <= 2 * relative_error(t, e) + floor, name


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_norm_s_equations_are_autograd_s(distribution: str) -> None:
    y = DISTRIBUTIONS[distribution](torch.randn(7, 30, dtype=torch.float64)).requires_grad_()
    weight, dn = torch.randn(2, 30, dtype=torch.float64)
    n, rstd = reference.rms_norm(y, weight, EPS)
    torch.testing.assert_close(n, F.rms_norm(y, (30,), weight, EPS))
    (expected,) = torch.autograd.grad(n, y, dn.expand_as(n), retain_graph=True)
    got = reference.rms_norm_backward(dn.expand_as(n), y.detach(), rstd.detach(), weight)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_what_stands_elsewhere_passes_gradcheck() -> None:
    tensors = [t.double().requires_grad_() for t in some(4, 5, 3)[0]]
    weight = tensors.pop().detach()
    assert torch.autograd.gradcheck(lambda *t: ours(*t, weight), tensors)


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    d=st.integers(2, 70),  # of one number the gradient through the norm is 0 but for rounding
    r=st.integers(1, 20),
    added=st.booleans(),
    parts=st.sampled_from(["both", "y", "n"]),
)
def test_any_shape_and_any_part(shape: list[int], d: int, r: int, added: bool, parts: str) -> None:
    """Also where only one of the results is used."""
    x, more, dy, dn = torch.randn(4, *shape, d)
    weights, weight = make_weights(d, r), torch.randn(d)

    def of(**how: Any) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in ((x, more) if added else (x,)) + weights]
        given = (leaves[0], leaves.pop(1)) if added else (leaves[0], None)
        outputs = ours(*given, *leaves[1:], weight, **how)
        kept = [i for i, name in enumerate("yn") if parts in ("both", name)]
        wanted = [t for t in (*given, *leaves[1:]) if t is not None]
        return [*outputs, *torch.autograd.grad([outputs[i] for i in kept], wanted, [(dy, dn)[i] for i in kept])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normed, "prefers_eager", lambda *_: False)
        got, expected = of(), of(fused=False)
    assert [g.shape for g in got] == [e.shape for e in expected]
    for g, e in zip(got, expected, strict=True):
        assert (g.double() - e.double()).norm() <= 1e-3 * (1 + e.double().norm())


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("wanted", [[0], [1], [2, 3], [4], [5, 7], [6], [0, 1, 8]], ids=str)
def test_only_gradients_asked_for(wanted: list[int]) -> None:
    tensors, dy, dn = some(40, 33, 8)
    tensors.insert(8, torch.tensor([0.5]))
    for i in wanted:
        tensors[i].requires_grad_()

    def grads(**how: Any) -> Any:
        *rest, scale, weight = tensors
        return torch.autograd.grad(ours(*rest, weight, scale=scale, **how), [tensors[i] for i in wanted], (dy, dn))

    for g, e in zip(grads(), grads(fused=False), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("scale", [0.3, torch.tensor([-0.7])], ids=["a number", "learned"])
def test_a_scale_and_dropout(scale: Tensor | float) -> None:
    tensors, dy, dn = some(50, 64, 16)
    for g, e in zip(
        *(run(ours, tensors, dy, dn, scale=scale, dropout=0.4, seed=3, fused=f) for f in (True, False)), strict=True
    ):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("calls")
def test_without_layer_norm_and_of_any_strides() -> None:
    tensors, *_ = some(24, 24, 8)
    tensors[2:4] = None, None  # type: ignore[assignment]
    base = torch.randn(2, 48, 30)
    x, added = base[:, ::2, 3:27].transpose(1, 2)
    dy, dn = torch.randn(1, 1).expand(24, 24), torch.randn(24, 24).T

    def of(x: Tensor, added: Tensor, **how: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, added)]
        outputs = ours(*leaves, *tensors[2:], **how)
        return [*outputs, *torch.autograd.grad(outputs, leaves, (dy, dn))]

    for g, e in zip(of(x, added), of(x.contiguous(), added.contiguous(), fused=False), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_norm_of_another_dtype(weight_dtype: torch.dtype, calls: list[str]) -> None:
    tensors, dy, dn = some(70, 64, 16, torch.bfloat16)
    tensors[-1] = tensors[-1].to(weight_dtype)
    got, expected = (run(ours, tensors, dy, dn, fused=fused) for fused in (True, False))
    assert calls == ["forward", "norm_backward"]
    assert got[1].dtype == expected[1].dtype == torch.bfloat16
    assert relative_error(got[1], expected[1]) < 1e-2


def test_autocast_keeps_the_stream_s_dtype(calls: list[str]) -> None:
    tensors, dy, dn = some(70, 64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (run(ours, tensors, dy, dn, fused=fused) for fused in (True, False))
    assert calls == ["forward", "norm_backward"]
    for name, g, e in zip(NAMES, got, expected, strict=True):
        assert g.dtype == torch.float32
        assert 0 < relative_error(g, e) < 2e-2, name  # its products are of bf16


def test_a_gradient_at_y_is_all_of_it(calls: list[str]) -> None:
    """n is a function of y, though both are made at once."""
    tensors, dy, dn = some(70, 64, 16)
    grads = []
    for fused in (True, False):
        y, n = ours(tensors[0].requires_grad_(), *tensors[1:], fused=fused)
        y.retain_grad()
        seen: list[Tensor] = []
        y.register_hook(seen.append)
        torch.autograd.backward((y, n), (dy, dn), inputs=[y, tensors[0]])
        grads.append([y.grad, seen[-1], tensors[0].grad])
        tensors[0].grad = None
    assert calls == ["forward", "norm_backward"]
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_keeps_two_tensors_of_the_stream_s_size(calls: list[str]) -> None:
    tensors, *_ = some(64, 48, 4)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = ours(tensors[0].requires_grad_(), None, *tensors[2:])
    large = [t.data_ptr() for t in saved if t.numel() == 64 * 48]
    assert large == [tensors[0].data_ptr(), y.data_ptr()]
    assert calls == ["forward"]


class _Listening(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_a_backward_that_somebody_listens_to(calls: list[str]) -> None:
    tensors, dy, dn = some(70, 64, 16)
    outputs = ours(tensors[0].requires_grad_(), tensors[1], *(t.requires_grad_() for t in tensors[2:8]), tensors[8])
    leaves = [tensors[0], *tensors[2:8]]
    expected = torch.autograd.grad(outputs, leaves, (dy, dn), retain_graph=True)
    assert calls == ["forward", "norm_backward"]
    with _Listening():
        got = torch.autograd.grad(outputs, leaves, (dy, dn), retain_graph=True)
    assert calls == ["forward", "norm_backward"]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused(calls: list[str]) -> None:
    tensors, *_ = some(70, 64, 16)
    y, n = ours(tensors[0].requires_grad_(), *tensors[1:])
    (dx,) = torch.autograd.grad(y.sum() + n.sum(), tensors[0], create_graph=True)
    assert calls == ["forward"]
    with pytest.raises(NotImplementedError, match="not differentiable a second time"):
        dx.sum().backward()


@pytest.mark.usefixtures("calls")
def test_compiled_code_holds_the_operator() -> None:
    tensors, dy, dn = some(70, 64, 16)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for g, e in zip(run(compiled, tensors, dy, dn), run(ours, tensors, dy, dn), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_small_inputs_run_as_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_normed, "forward", None)
    tensors, *_ = some(3, 64, 16)
    for x_free in (False, True):
        y, n = ours(*tensors, x_free=x_free)
        torch.testing.assert_close(y, ak.adapter(tensors[0] + tensors[1], *tensors[2:8]))
        torch.testing.assert_close(n, F.rms_norm(y, (64,), tensors[8], EPS))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"next_weight": None},
            TypeError,
            "next_weight: expected a dense torch.Tensor of a floating dtype, got NoneType",
        ),
        ({"next_weight": torch.ones(8, dtype=torch.int64)}, TypeError, "next_weight: expected a dense torch.Tensor of"),
        ({"next_weight": torch.ones(7)}, ValueError, "next_weight: expected shape (8,) on cpu for x of shape (4, 8)"),
        ({"next_weight": torch.ones(8, requires_grad=True)}, ValueError, "next_weight: expected one that requires no"),
        ({"next_eps": -1.0}, ValueError, "next_eps: expected"),
        ({"next_eps": "small"}, TypeError, "next_eps: expected"),
        ({"added": torch.ones(4, 7)}, ValueError, "added: expected shape (4, 8) on cpu like x, got (4, 7)"),
        ({"added": torch.ones(4, 8).half()}, TypeError, "added: expected a dense tensor of x's dtype torch.float32"),
        ({"added": 3}, TypeError, "added: expected a torch.Tensor, got int"),
        ({"dropout": 1.0}, ValueError, "dropout: expected"),
        ({"activation": "swish"}, ValueError, "activation: expected"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        adapter_and_norm(torch.randn(4, 8), *make_weights(8, 2), **({"next_weight": torch.ones(8)} | change))


@pytest.mark.parametrize("name", ["dn", "y", "rho", "next_weight"])
def test_a_direct_call_reads_nothing_beyond_its_tensors(name: str) -> None:
    (x, _, *weights, weight), _, dn = some(6, 8, 2)
    y, *_, rho = native_normed.forward(x, None, weights, weight, EPS, Call(1e-5, "silu", torch.float32), True)
    given = {"dn": dn, "y": y, "rho": rho, "next_weight": weight}
    expected = native_normed.norm_backward(*given.values())
    wide = given | {"rho": rho.double(), "next_weight": weight.double()}
    assert torch.equal(native_normed.norm_backward(*wide.values()), expected)
    given[name] = given[name][:-1]
    if name == "y":
        given |= {"dn": dn, "rho": rho}
    with pytest.raises(ValueError, match=f"^{'dn' if name == 'y' else name}: expected shape"):
        native_normed.norm_backward(*given.values())
