"""Prepared weights and sorted indices, interpreted: made as often as needed, in CUDA graphs too.

Run by test_kernels.py.

``graphs.recording`` decides what a recording is. Without a GPU a test patches it, and changes the weights as a replay
would: by hand, without the version counter.
"""

import copy
import gc
import sys
import types
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops import graphs, kept
from adapterkern.ops.kernels import cache
from adapterkern.ops.kernels.weights import Prepared, prepare
from tests.support.interpreted import Recording, assert_equal, exact, parameters
from tests.support.numerics import make_weights, relative_error

pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    made: list[torch.dtype] = []
    monkeypatch.setattr(cache, "prepare", lambda w, dtype, *by: made.append(dtype) or prepare(w, dtype, *by))
    cache.clear()
    return made


@pytest.mark.parametrize("kind", [torch.optim.SGD, ak.ClippedAdamW])
def test_weights_are_prepared_once_an_optimizer_step(
    kind: type[torch.optim.Optimizer], preparations: list[torch.dtype]
) -> None:
    module = ak.Adapter(40, 12, init="xavier")
    optimizer = kind(module.parameters(), lr=1e-3)  # type: ignore[call-arg]
    x = torch.randn(3, 40)
    for step in range(3):
        for _ in range(2):  # gradient accumulation
            module(x).square().sum().backward()
        assert len(preparations) == step + 1
        optimizer.step()
    assert relative_error(module(x), exact(x, parameters(module), x)[0]) < 1e-6
    module(x)
    assert len(preparations) == 4


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "data swapped", "data written by an optimizer"])
def test_changed_weights_are_prepared_again(change: str) -> None:
    module = ak.Adapter(40, 12, init="xavier")
    x = torch.randn(3, 40)
    module(x)
    if change == "in place":
        with torch.no_grad():
            module.up.weight.mul_(2)
    elif change == "load_state_dict":
        module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})
    elif change == "data swapped":
        module.norm.bias.data = torch.randn(40)
    else:

        class Flat(torch.optim.SGD):
            def step(self) -> None:  # type: ignore[override]  # called without a closure
                module.down.weight.data.mul_(3)

        version = module.down.weight._version
        Flat(module.parameters(), lr=0.1).step()
        assert module.down.weight._version == version
    assert relative_error(module(x), exact(x, parameters(module), x)[0]) < 1e-6


def test_a_freed_parameter_s_address_is_no_hit() -> None:
    cache.clear()
    x = torch.randn(3, 40)
    for _ in range(20):  # the allocator hands the same addresses out again
        w = make_weights(40, 12)
        assert relative_error(ak.adapter(x, *w), exact(x, w, x)[0]) < 1e-6
        gc.collect(1)  # the interpreter's launches are cycles, which hold what they were given
    assert len(cache._entries) <= 2


def test_the_same_memory_in_other_strides_or_another_dtype_is_no_hit() -> None:
    x, w = torch.randn(3, 24), list(make_weights(24, 8))
    bits = torch.randn(24).to(torch.bfloat16)
    for up, bias in ((w[2].t(), bits), (w[2].view(24, 8), bits), (w[2].view(24, 8), bits.view(torch.float16))):
        w[4], w[5] = up, bias
        assert relative_error(ak.adapter(x, *w), exact(x, w, x)[0]) < 1e-6


def test_an_expired_entry_that_another_thread_removes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: dict[str, Any]
    monkeypatch.setattr(cache, "_entries", entries := {})

    class Gone:
        def expired(self) -> bool:
            entries.pop("old", None)
            return True

    entries["old"] = kept.Entry((Gone(),), (), None)
    ak.adapter(torch.randn(3, 24), *make_weights(24, 8))
    assert "old" not in entries


def test_a_thread_without_graph_managers_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_manager(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    trees: Any = types.SimpleNamespace(get_manager=get_manager)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    assert not graphs.recording(torch.device("cuda", 0))


def test_weights_that_a_graph_has_used_are_prepared_at_every_call(
    preparations: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = ak.Adapter(40, 12, init="xavier"), torch.randn(3, 40)
    module(x)
    with monkeypatch.context() as recording:
        recording.setattr(graphs, "recording", lambda device: True)
        module(x)
    version = module.up.bias._version
    module.up.bias.data.add_(1)  # what a replay does
    assert module.up.bias._version == version
    assert relative_error(module(x), exact(x, parameters(module), x)[0]) < 1e-6
    assert len(preparations) == 3


def test_inference_tensors_are_never_kept(preparations: list[torch.dtype]) -> None:
    with torch.inference_mode():
        w, x = make_weights(40, 12), torch.randn(3, 40)
        first = ak.adapter(x, *w)
        w.up_bias.add_(1)
        torch.testing.assert_close(ak.adapter(x, *w), first + 1)
    assert len(preparations) == 2


# CUDA graphs


def leaves_of(module: ak.Adapter, x: Tensor) -> list[Tensor]:
    return [t for t in (x, *parameters(module)) if t.requires_grad]


def value_and_gradients(module: ak.Adapter, x: Tensor) -> list[Tensor]:
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves_of(module, x))]


@pytest.mark.parametrize("x_free", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_a_recording_prepares_once_for_forward_and_backward(
    apart: bool, autocast: bool, x_free: bool, preparations: list[torch.dtype], recording: Recording
) -> None:
    module, x = ak.Adapter(40, 12, init="xavier"), torch.randn(3, 40, requires_grad=True)
    module.x_free = x_free
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        expected = value_and_gradients(module, x)
        preparations.clear()
        with recording():
            y = module(x)
            if not apart:
                grads = torch.autograd.grad(y.square().sum(), leaves_of(module, x))
        if apart:  # make_graphed_callables: two graphs, and eager calls may come between their recordings
            module(x)
            assert preparations == [torch.float16 if autocast else torch.float32] * 2
            preparations.pop()
            with recording():
                grads = torch.autograd.grad(y.square().sum(), leaves_of(module, x))
    assert preparations == [torch.float16 if autocast else torch.float32]
    assert_equal([y, *grads], expected)
    assert len(cache._entries) == 1  # the eager call's


def test_a_recorded_backward_reads_what_its_forward_has_prepared(recording: Recording) -> None:
    """Not the weights' values at that time: between the two graphs of a callable anything may run."""
    module, x = ak.Adapter(40, 12, init="xavier"), torch.randn(3, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    with recording():
        y = module(x)
    module.down.weight.data.mul_(2)
    cache.clear()
    with recording():
        assert_equal(torch.autograd.grad(y.sum(), x), [expected])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", ["plain", "x-free", "autocast"])
def test_compiled_code_prepares_once_for_forward_and_backward(
    mode: str, frozen: bool, preparations: list[torch.dtype]
) -> None:
    module, x = ak.Adapter(40, 12, init="xavier").requires_grad_(not frozen), torch.randn(3, 40, requires_grad=True)
    module.x_free = mode == "x-free"
    with torch.autocast("cpu", torch.float16, enabled=mode == "autocast"):
        expected = value_and_gradients(module, x)
        compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
        for calls in (1, 2):
            preparations.clear()
            y = compiled(x)
            grads = torch.autograd.grad(y.square().sum(), leaves_of(module, x))
            assert_equal([y.detach(), *grads], expected)
            assert len(preparations) == (0 if frozen else 1), calls  # frozen: the eager call's entry


def test_compiled_code_hands_the_preparation_over_as_data(recording: Recording, preparations: list[Any]) -> None:
    """Graph trees record forward and backward as separate graphs."""
    module, x = ak.Adapter(40, 12, init="xavier"), torch.randn(3, 40, requires_grad=True)
    expected = value_and_gradients(module, x)
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x)
    preparations.clear()
    with recording():
        y = compiled(x)
    with recording():
        grads = torch.autograd.grad(y.square().sum(), leaves_of(module, x))
    assert len(preparations) == 1
    assert_equal([y.detach(), *grads], expected)


def test_opcheck_of_every_operator() -> None:
    ops = torch.ops.adapterkern
    x, dy = torch.randn(2, 2, 9, 40)
    w = list(make_weights(40, 12))
    prepared = list(ops.prepare_weights(*w, torch.float32))
    leaves = [t.clone().requires_grad_() for t in (x, *w)]
    _, z, mean, rstd = ops.adapter_forward(x, *w, 1e-5, "silu", None, True)
    stacked = [torch.stack([t, t]) for t in w]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.library.opcheck(ops.prepare_weights.default, (*w, dtype))
        torch.library.opcheck(ops.prepare_weights.default, (*stacked, dtype))
    for given in (None, prepared):
        torch.library.opcheck(ops.adapter_forward.default, (*leaves, 1e-5, "silu", None, True, False, None, given))
        for x_free in (False, True):
            how = (1e-5, "silu", torch.float32, [True] * 7, x_free, None, given)
            torch.library.opcheck(ops.adapter_backward.default, (dy, x, z, mean, rstd, *w, *how))


# CUDA graphs of frozen weights


def read_by_graphs(module: ak.Adapter, recording: Recording) -> Prepared:
    with recording():
        return cache.prepared_weights(parameters(module), torch.float32)


def frozen_adapter() -> ak.Adapter:
    return ak.Adapter(40, 12, init="xavier").requires_grad_(False)


@pytest.mark.parametrize("x_grad", [False, True])
def test_frozen_weights_are_prepared_by_no_recording(
    x_grad: bool, preparations: list[torch.dtype], recording: Recording
) -> None:
    module, x = frozen_adapter(), torch.randn(3, 40, requires_grad=x_grad)

    def run() -> list[Tensor]:
        y = module(x)
        return [y.detach(), *(torch.autograd.grad(y.sum(), x) if x_grad else ())]

    expected = run()
    with recording():
        assert_equal(run(), expected)
        assert_equal(run(), expected)
    assert len(preparations) == 1
    # in another dtype nothing was prepared before the recording
    with recording(), torch.autocast("cpu", torch.float16):
        run()
    assert preparations[1:] == [torch.float16]
    module(x)
    assert len(preparations) == 2  # a graph does not train them: eager calls still find their entry


@pytest.mark.parametrize("change", ["in place", "forgotten", "by an optimizer", "trained by another graph"])
def test_an_eager_call_renews_what_graphs_of_frozen_weights_read(change: str, recording: Recording) -> None:
    module, x = frozen_adapter(), torch.randn(3, 40)
    module(x)
    read = read_by_graphs(module, recording)
    before = copy.deepcopy(read)
    if change == "in place":
        module.load_state_dict({k: 1.5 * v + 0.1 for k, v in module.state_dict().items()})
    elif change == "trained by another graph":
        module.requires_grad_(True)
        with recording():
            module(x)
        module.requires_grad_(False)
        for p in module.parameters():
            p.data.mul_(1.5)
    else:
        for p in module.parameters():
            p.data.mul_(1.5)
        cache.clear() if change == "forgotten" else kept._count_step()
    assert_equal(read.tensors(), before.tensors())  # a graph does not see it by itself
    assert read_by_graphs(module, recording) is not read  # nor is it handed to another
    module(x)
    assert_equal(read.tensors(), prepare(parameters(module), torch.float32).tensors())
    assert not torch.equal(read.A, before.A)
    if change != "trained by another graph":
        assert read_by_graphs(module, recording) is read
    module.up.bias.data = module.up.bias.data + 1  # other weights, by their storage
    bias = read.b_up.clone()
    module(x)
    assert torch.equal(read.b_up, bias)


@pytest.mark.parametrize("first", [False, True])
def test_what_graphs_read_is_renewed_in_and_out_of_inference_mode(first: bool, recording: Recording) -> None:
    module, x = frozen_adapter(), torch.randn(3, 40)
    for inference in (first, not first):
        with torch.inference_mode(inference):
            ak.adapter(x, *parameters(module))
            read = read_by_graphs(module, recording)
        module.up.weight.mul_(1.5)
    with torch.inference_mode(not first):
        ak.adapter(x, *parameters(module))
    assert_equal(read.tensors(), prepare(parameters(module), torch.float32).tensors())


def test_what_graphs_read_stays_as_long_as_the_weights(recording: Recording) -> None:
    module, x = frozen_adapter(), torch.randn(3, 40)
    module(x)
    read = weakref.ref(read_by_graphs(module, recording).A)
    for _ in range(3):
        module.up.weight.mul_(1.1)
        module(x)
        cache.clear()
        gc.collect()
        assert read() is not None
    del module
    gc.collect()
    ak.adapter(x, *make_weights(40, 12))
    assert read() is None


@pytest.mark.parametrize("kind", ["require a gradient", "views of such", "trained by a graph", "inference"])
def test_weights_that_are_not_declared_frozen_are_prepared_in_the_graph(
    kind: str, preparations: list[torch.dtype], recording: Recording
) -> None:
    module, x = ak.Adapter(40, 12, init="xavier"), torch.randn(3, 40)
    weights: list[Tensor] = parameters(module)
    if kind == "trained by a graph":
        with recording():
            module(x)
        module.requires_grad_(False)
    elif kind == "inference":
        with torch.inference_mode():
            weights = [w.clone() for w in weights]
    with torch.no_grad():
        if kind == "views of such":
            weights = [w[:] for w in weights]
        ak.adapter(x, *weights)
        preparations.clear()
        with recording():
            ak.adapter(x, *weights)
    assert len(preparations) == 1
    assert not any(e.valid(e.state) for e in cache._pinned.values())
