"""The CPU kernels as the operator calls them: what tensors, threads and processes they meet, and what is kept."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from adapterkern.ops import adapter, choice, native, rows
from adapterkern.ops.call import Call
from adapterkern.ops.reference import Weights
from tests.support.numerics import make_weights, relative_error

SET, WHY = native.instruction_set()
pytestmark = pytest.mark.skipif(SET is None, reason=f"no kernels: {WHY}")


PLAIN = Call(1e-5, "silu", torch.float32)


def op(x: Tensor, *w: Tensor, activation: str = "silu", index: Tensor | None = None) -> Tensor:
    """The operator itself: ``adapter`` runs inputs as small as these in eager PyTorch."""
    return torch.ops.adapterkern.adapter_forward(x, *w, 1e-5, activation, None, True, False, index)[0]


def value_and_gradients(x: Tensor, w: Weights, dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *w)]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def test_the_operator_runs_them() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choice.runs_native("cpu", dtype)
    assert not choice.runs_native("cpu", torch.float64)


def test_parameters_that_are_gone_are_forgotten() -> None:
    """What is kept must not hold them: then they would never go."""
    x = torch.randn(3, 40)
    native.clear()  # those of tests before that are not collected yet
    for _ in range(5):
        op(x, *make_weights(40, 12))
    assert len(native._kept._entries) <= 2


def test_an_optimizer_that_writes_data() -> None:
    class Flat(torch.optim.SGD):
        def step(self) -> None:  # type: ignore[override]  # called without a closure
            w.up_weight.data.mul_(3)

    x, w = torch.randn(3, 40), make_weights(40, 12)
    before = op(x, *w)
    Flat([w.up_weight], lr=0.1).step()
    got, expected = op(x, *w), op(x, *(t.clone() for t in w))
    assert torch.equal(got, expected)
    assert not torch.equal(got, before)
    w.norm_weight.data = torch.randn(40)  # swapped
    assert torch.equal(op(x, *w), op(x, *(t.clone() for t in w)))


def test_inference_tensors_are_never_kept() -> None:
    with torch.inference_mode():
        w, x = make_weights(40, 12), torch.randn(3, 40)
        first = op(x, *w)
        w.up_bias.add_(1)
        torch.testing.assert_close(op(x, *w), first + 1)


def test_adapters_without_rows_are_not_prepared() -> None:
    stacked = [torch.stack([t] * 50) for t in make_weights(40, 12)]
    native.clear()
    op(torch.randn(4, 3, 40), *stacked, index=torch.tensor([7, -1, 7, 30]))
    assert [sorted(entry.prepared.made) for entry in native._stacks._entries.values()] == [[7, 30]]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_is_not_where_results_lie(device: str) -> None:
    x, dy, w = torch.randn(8, 40), torch.randn(8, 40), make_weights(40, 12)
    expected = value_and_gradients(x, w, dy)
    native.clear()
    with torch.device(device):
        got = value_and_gradients(x, w, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_tensors_that_are_not_what_lies_in_memory() -> None:
    class Named(torch.Tensor):
        pass

    x, y, w = torch.randn(8, 40), torch.randn(8, 40), make_weights(40, 12)
    negated = torch.complex(x, y).conj().imag
    assert negated.is_neg()
    assert torch.equal(op(negated, *w), op(-y, *w))
    assert torch.equal(op(torch._efficientzerotensor((8, 40)), *w), op(torch.zeros(8, 40), *w))
    named = op(x.as_subclass(Named), *w)
    assert type(named) is Named
    assert torch.equal(named.as_subclass(torch.Tensor), op(x, *w))
    odd = [
        torch.frombuffer(bytearray(b"\0" + t.numpy().tobytes()), dtype=t.dtype, offset=1).view_as(t) for t in (x, *w)
    ]
    assert all(t.data_ptr() % 4 for t in odd)
    assert torch.equal(op(odd[0], *odd[1:]), op(x, *w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_rows(dtype: torch.dtype) -> None:
    x, w = torch.randn(0, 40, dtype=dtype), make_weights(40, 12)
    y, dx, *grads = value_and_gradients(x, w, x)
    assert y.shape == dx.shape == (0, 40)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "tanh", "identity"])
def test_a_z_that_is_not_a_number_stays_none(activation: str) -> None:
    """A comparison with NaN is false: relu must not make 0 of it."""
    x, w = torch.randn(3, 40), make_weights(40, 12)
    w.down_bias[5] = float("nan")
    assert op(x, *w, activation=activation).isnan().all()


def test_a_gradient_of_another_dtype() -> None:
    x, w = torch.randn(8, 40).bfloat16(), make_weights(40, 12)
    saved = rows.adapter_forward(native, x, w, PLAIN, True)[1:]
    dy, how = torch.randn(8, 40), (w, PLAIN, [True] * 7)
    both = (rows.adapter_backward(native, g, x, *saved, *how) for g in (dy, dy.bfloat16()))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("name", ["x", *Weights._fields])
def test_a_direct_call_reads_nothing_beyond_its_tensors(name: str) -> None:
    """``adapter`` checks shapes, the operator itself does not."""
    given = {"x": torch.randn(8, 40)} | make_weights(40, 12)._asdict()
    given[name] = given[name].repeat_interleave(2, -1)[..., :41]
    with pytest.raises((ValueError, RuntimeError), match=r"expected shape \(.*\) on a CPU, got \("):
        op(*given.values())


@pytest.mark.parametrize(("d", "r"), [(8, 0), (0, 4)])
def test_a_direct_call_of_an_adapter_without_size(d: int, r: int) -> None:
    """``adapter`` checks it, too. The kernels divide by both, which would end the process."""
    w = [torch.ones(shape) for shape in ((d,), (d,), (r, d), (r,), (d, r), (d,))]
    with pytest.raises(ValueError, match=rf"^down_weight: expected .* r >= 1 and d >= 1, got \({r}, {d}\)"):
        native.forward(torch.ones(3, d), w, PLAIN)


@pytest.mark.parametrize("place", range(5))
def test_a_backward_reads_nothing_beyond_its_tensors(place: int) -> None:
    x, w = torch.randn(8, 40), make_weights(40, 12)
    given = [x, x, *native.forward(x, w, PLAIN._replace(compute=x.dtype))[1:]]
    given[place] = given[place][:-1]
    dy, rows_of_x, z, mean, rstd = given
    with pytest.raises(ValueError, match=r"expected shape \(.*\) on a CPU, got \("):
        native.backward(dy, rows_of_x, z, mean, rstd, w, PLAIN, [True] * 7)


def test_rows_that_lie_further_apart_than_32_bits_count() -> None:
    """Row 1 lies 2³¹ numbers and 4 GiB after row 0, in memory that is reserved and not touched."""
    stride = 2**31 + 8
    memory = torch.empty(stride + 40, dtype=torch.bfloat16)
    x = memory.as_strided((2, 40), (stride, 1))
    x.copy_(torch.randn(2, 40))
    w = make_weights(40, 12)
    assert torch.equal(op(x, *w), op(x.clone(), *w))


def test_calls_of_several_threads_at_once() -> None:
    sets = [(torch.randn(70, 100), make_weights(100, 24), torch.randn(70, 100)) for _ in range(4)]
    expected = [value_and_gradients(*one) for one in sets]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, alone in zip(pool.map(lambda one: value_and_gradients(*one), sets), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


def test_compiled_code_and_opcheck() -> None:
    x, w, dy = torch.randn(8, 40), make_weights(40, 12), torch.randn(8, 40)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in (x, *w)]
    got = torch.autograd.grad(compiled(*leaves), leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, value_and_gradients(x, w, dy)[1:], strict=True))
    for dtype in (torch.bfloat16, torch.float16):
        torch.library.opcheck(
            torch.ops.adapterkern.adapter_forward.default, (x.to(dtype), *w, 1e-5, "silu", torch.bfloat16, True)
        )


def test_autocast_keeps_the_stream_in_fp32() -> None:
    x, w, dy = torch.randn(64, 96), make_weights(96, 16), torch.randn(64, 96)
    exact = value_and_gradients(x, w, dy)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(x, w, dy)
    assert [t.dtype for t in got] == [torch.float32] * 8
    errors = [relative_error(a, b) for a, b in zip(got, exact, strict=True)]
    assert all(e < 2e-2 for e in errors), errors
    assert max(errors) > 1e-4  # the products were bf16's


def in_a_process(program: str) -> str:
    setting = """
        import os, resource, signal, sys, torch
        from adapterkern.ops import native, rows
        from adapterkern.ops.call import Call
        from tests.support.numerics import make_weights
        torch.set_num_threads(2)
        PLAIN = Call(1e-5, "silu", torch.float32)
        def forward(x, w):
            return rows.adapter_forward(native, x, w, PLAIN, True)
    """
    code = textwrap.dedent(setting) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_process_does_not_wait_for_threads_of_its_parent() -> None:
    program = """
        x, w = torch.randn(500, 64), make_weights(64, 8)
        y = forward(x, w)[0]
        if (child := os.fork()) == 0:
            signal.alarm(20)
            os._exit(0 if torch.equal(forward(x, w)[0], y) else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert in_a_process(program) == "0\n"


@pytest.mark.skipif(sys.platform != "linux", reason="lists a process's threads as Linux does")
def test_threads_that_have_no_work_stay() -> None:
    """OpenMP ends those that a call does not ask for, and torch's next operation would start them anew."""
    program = """
        from adapterkern.optim import ClippedAdamW
        torch.set_num_threads(6)
        numbers, x, w = torch.ones(1 << 20), torch.randn(64, 64), make_weights(64, 8)  # two blocks of rows
        p = torch.nn.Parameter(torch.zeros(64 * 4096))  # two chunks of tiles
        p.grad = torch.ones_like(p)
        optimizer = ClippedAdamW([p])
        optimizer.step()
        def threads():
            numbers + 1
            return set(os.listdir("/proc/self/task"))
        for use in (lambda: forward(x, w), optimizer.step):
            before = threads()
            use()
            print(len(before) >= 6, threads() - before)
    """
    assert in_a_process(program) == "True set()\n" * 2


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_memory_that_is_not_to_be_had_is_an_error() -> None:
    program = """
        x, w = torch.randn(2, 8192), make_weights(8192, 512)
        saved = forward(x, w)[1:]
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (4 << 20), -1))
        try:
            rows.adapter_backward(native, x, x, *saved, w, PLAIN, [False] * 6 + [True])
        except MemoryError as error:
            print("MemoryError")
    """
    assert in_a_process(program) == "MemoryError\n"


class Operations(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_direct_call_is_the_operator_s(dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``adapter`` spares torch's dispatcher, unless somebody listens to it."""
    monkeypatch.setattr(choice, "_prefers_eager_to_native", lambda *_: False)
    x, w, dy = torch.randn(40, 33, dtype=dtype), make_weights(33, 12), torch.randn(40, 33, dtype=dtype)

    def run() -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, *w)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = adapter(*leaves)
            with torch.no_grad():
                assert torch.equal(adapter(*leaves), y)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    direct = run()
    with Operations() as operations:
        dispatched = run()
    assert {"adapterkern::adapter_forward", "adapterkern::adapter_backward"} <= set(operations.names)
    assert all(map(torch.equal, direct, dispatched))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    assert {"adapterkern::adapter_forward", "adapterkern::adapter_backward"} <= {e.key for e in profile.key_averages()}


def a_direct_call(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Weights]:
    """y, its x and its parameters, of a forward that nobody listened to."""
    monkeypatch.setattr(choice, "_prefers_eager_to_native", lambda *_: False)
    x, w = torch.randn(40, 33, requires_grad=True), make_weights(33, 12)
    return adapter(x, *w), x, w


def test_a_backward_that_somebody_listens_to(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x, _ = a_direct_call(monkeypatch)
    with Operations() as operations:
        torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert "adapterkern::adapter_backward" in operations.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(y.sum(), x)
    assert "adapterkern::adapter_backward" in {e.key for e in profile.key_averages()}


def test_a_backward_that_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x, w = a_direct_call(monkeypatch)
    traced = make_fx(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(torch.ones(40, 33))
    dy = torch.randn(40, 33)
    assert torch.equal(traced(dy), value_and_gradients(x, w, dy)[1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert is_fake(torch.autograd.grad(y, x, torch.ones(40, 33))[0])


def test_a_direct_call_of_tensors_that_are_not_what_lies_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x, w = a_direct_call(monkeypatch)
    dy = torch.randn(40, 33)

    def dx(dy: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    assert torch.equal(dx(torch._neg_view(dy)), dx(-dy))
    assert torch.equal(dx(torch._efficientzerotensor((40, 33))), torch.zeros(40, 33))
    assert torch.equal(adapter(torch._neg_view(dy), *w), adapter(-dy, *w))
    assert torch.equal(adapter(torch._efficientzerotensor((40, 33)), *w), adapter(torch.zeros(40, 33), *w))
    negated = Weights(*(torch._neg_view(t) for t in w))
    assert torch.equal(adapter(dy, *negated), adapter(dy, *(-t for t in w)))


def test_a_batch_of_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x, _ = a_direct_call(monkeypatch)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for adapterkern::adapter_backward"):
        torch.autograd.grad(y, x, torch.randn(3, 40, 33), is_grads_batched=True)


def test_a_hook_that_leaves_saved_tensors_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its z would be read as bf16."""
    with torch.autograd.graph.saved_tensors_hooks(Tensor.half, lambda t: t):
        y, x, _ = a_direct_call(monkeypatch)
    with pytest.raises(TypeError, match=r"z: expected dtype float32 or bfloat16.*got torch\.float16"):
        torch.autograd.grad(y.sum(), x)


def test_a_direct_call_is_not_differentiable_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x, _ = a_direct_call(monkeypatch)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fused=False"):
        g.sum().backward()
