"""On a GPU: numbers, streams, devices, CUDA graphs, torch.compile, large offsets, compiled variants.

The interpreter shows the same kernels right without one (test_kernels.py); this shows what only hardware can.
"""

import copy

import pytest
import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops.reference import ACTIVATIONS, Weights
from tests.support.gpu import NAMES, assert_equal, check, check_normed, draw, record, value_and_grads
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_table(distribution: str, dtype: torch.dtype) -> None:
    check(*draw(1000, 1024, 64, dtype, distribution))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "d", "r"),
    [
        (1, 4096, 64),
        (37, 576, 16),
        (129, 577, 59),
        (9000, 2048, 32),
        (300, 5120, 128),
        (520, 1024, 256),
        (70, 300, 512),
    ],
)
def test_shapes(T: int, d: int, r: int, dtype: torch.dtype) -> None:
    check(*draw(T, d, r, dtype))
    check(*draw(T, d, r, dtype), x_free=True)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "d", "r"), [(1, 4096, 64), (129, 577, 59), (1000, 1024, 64), (300, 5120, 128)])
def test_fp32_rows_under_autocast(T: int, d: int, r: int, compute: torch.dtype) -> None:
    x, weights, dy = draw(T, d, r, torch.float32)
    true = value_and_grads(x.double(), Weights(*(w.double() for w in weights)), dy.double(), fused=False)
    with torch.autocast("cuda", compute):
        theirs = value_and_grads(x, weights, dy, fused=False)
        for x_free in (False, True):
            ours = value_and_grads(x, weights, dy, x_free=x_free)
            for name, o, t, e in zip(NAMES, ours, theirs, true, strict=True):
                bound = 2 * relative_error(t, e) + 4 * torch.finfo(compute).eps
                assert relative_error(o, e) <= bound, (name, x_free)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "d", "r"), [(1, 4096, 64), (3000, 4096, 64), (70, 577, 20)])
def test_the_norm_that_follows(T: int, d: int, r: int, dtype: torch.dtype) -> None:
    check_normed(*draw(T, d, r, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    check(*draw(200, 512, 64, torch.bfloat16), activation=activation)


def test_tf32_follows_the_setting() -> None:
    x, w, _ = draw(300, 1024, 64, torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        full = ak.adapter(x, *w)
        torch.backends.cuda.matmul.allow_tf32 = True
        short = ak.adapter(x, *w)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert 1e-6 < relative_error(short, full.double()) < 2e-3


def test_mixed_adapters() -> None:
    w = Weights(*(torch.stack(t).cuda() for t in zip(*(make_weights(512, 32) for _ in range(3)), strict=True)))
    x, dy = (torch.randn(6, 100, 512).cuda().bfloat16() for _ in range(2))
    check(x, w, dy, index=torch.tensor([2, 0, -1, 2, 1, 0], device="cuda"))


@pytest.mark.parametrize("x_free", [False, True])
def test_an_adapter_per_row_with_a_gate_and_dropout(x_free: bool) -> None:
    w = Weights(*(torch.stack(t).cuda() for t in zip(*(make_weights(512, 64) for _ in range(8)), strict=True)))
    x, dy = (torch.randn(4, 900, 512).cuda().bfloat16() for _ in range(2))
    index = torch.randint(-1, 8, (4, 900), device="cuda")
    check(x, w, dy, index=index, gate=torch.rand(4, 900, device="cuda"), dropout=0.3, seed=7, x_free=x_free)


def test_two_runs_agree_to_the_bit() -> None:
    args = draw(5000, 1024, 64, torch.bfloat16)
    for a, b in zip(value_and_grads(*args), value_and_grads(*args), strict=True):
        assert torch.equal(a, b)


def test_side_stream() -> None:
    x, w, dy = draw(3000, 1024, 64, torch.bfloat16)
    expected = value_and_grads(x, w, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = value_and_grads(x, w, dy)
    torch.cuda.current_stream().wait_stream(stream)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current() -> None:
    x, w, dy = draw(300, 512, 32, torch.bfloat16)
    there = [t.to("cuda:1") for t in (x, *w, dy)]
    got = value_and_grads(there[0], Weights(*there[1:7]), there[7])
    for g, e in zip(got, value_and_grads(x, w, dy), strict=True):
        assert torch.equal(g.to(x.device), e)


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """One entry per launch from Python, including recorded ones but not replays."""
    from adapterkern.ops.kernels import cache

    made: list[torch.dtype] = []
    prepare = cache.prepare
    monkeypatch.setattr(cache, "prepare", lambda w, dtype: made.append(dtype) or prepare(w, dtype))
    cache.clear()
    return made


def test_cuda_graph_sees_new_weights(preparations: list[torch.dtype]) -> None:
    x, w, dy = draw(300, 512, 32, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, *w)]

    def step() -> list[Tensor]:
        y = ak.adapter(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    graph, captured = record(step)
    assert len(preparations) == 2  # before the recording, and one in it for forward and backward
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(1.25)
        graph.replay()
        assert_equal(captured, step())


def test_make_graphed_callables(preparations: list[torch.dtype]) -> None:
    """Forward and backward are separate graphs: the second reads what the first has prepared."""
    x, _, dy = draw(300, 512, 32, torch.bfloat16)
    module = ak.Adapter(512, 32, init="xavier", device="cuda")
    eager = copy.deepcopy(module)
    graphed = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    assert len(preparations) == 2  # its warm-up and its forward graph
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (graphed, eager)]
    for _ in range(3):
        results = []
        for m, optimizer in zip((graphed, eager), optimizers, strict=True):
            leaf = x.clone().requires_grad_()
            optimizer.zero_grad()
            y = m(leaf)
            y.backward(dy)
            results.append([t.clone() for t in (y, leaf.grad, *(p.grad for p in m.parameters()))])
            optimizer.step()
        assert_equal(*results)
    assert len(preparations) == 2 + 3  # one for each of the eager module's steps


@pytest.mark.parametrize("x_grad", [False, True])
def test_cuda_graph_of_frozen_weights_prepares_none(x_grad: bool, preparations: list[torch.dtype]) -> None:
    from adapterkern.ops.kernels import cache

    x, _, dy = draw(300, 512, 32, torch.bfloat16)
    x.requires_grad_(x_grad)
    module = ak.Adapter(512, 32, init="xavier", device="cuda").requires_grad_(False)

    def run() -> list[Tensor]:
        y = module(x)
        return [y.detach(), *(torch.autograd.grad(y, x, dy) if x_grad else ())]

    graph, captured = record(run)
    assert len(preparations) == 1
    before = [t.clone() for t in run()]
    graph.replay()
    assert_equal(captured, before)
    for factor in (1.25, 0.5):
        for p in module.parameters():
            p.mul_(factor)
        cache.clear()
        junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(16)]  # where freed memory would be
        del junk
        graph.replay()
        assert_equal(captured, before)
        before = [t.clone() for t in run()]
        graph.replay()
        assert_equal(captured, before)


def test_graph_trees_prepare_once_for_forward_and_backward(
    preparations: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkern.ops.kernels import launch

    calls: list[str] = []
    for name in ("adapter_forward", "adapter_backward"):
        function = getattr(launch, name)
        monkeypatch.setattr(
            launch, name, lambda *a, name=name, function=function, **k: calls.append(name) or function(*a, **k)
        )
    x = torch.randn(4, 50, 512, device="cuda", dtype=torch.bfloat16)
    module = ak.Adapter(512, 32, init="xavier", device="cuda")
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert calls.count("adapter_forward") == calls.count("adapter_backward") == len(preparations)
    assert 2 <= len(preparations) < 6  # the warm-up, the recording, then replays


def test_graph_trees_of_frozen_weights_prepare_none(preparations: list[torch.dtype]) -> None:
    x = torch.randn(4, 50, 512, device="cuda", dtype=torch.bfloat16)
    module = ak.Adapter(512, 32, init="xavier", device="cuda").requires_grad_(False)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for factor in (1.25, 0.5):
            expected = module(x)
            preparations.clear()
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                assert torch.equal(compiled(x), expected)
            assert not preparations
            for p in module.parameters():
                p.mul_(factor)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_steps(mode: str) -> None:
    d, dtype = 512, torch.bfloat16
    x = torch.randn(4, 50, d, device="cuda", dtype=dtype)
    losses: list[list[float]] = []
    for compiled in (False, True):
        torch.manual_seed(1)
        module = ak.Adapter(d, 32, init="xavier", device="cuda")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        call = torch.compile(module, mode=mode, fullgraph=True) if compiled else module
        losses.append([])
        for _ in range(6):
            loss = call(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][0] > losses[0][-1]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=0)


def test_offsets_beyond_int32() -> None:
    T, d = 2**31 // 4096 + 100, 4096
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of free device memory")
    _, w, _ = draw(1, d, 16, torch.bfloat16)
    x = torch.empty(T, d, device="cuda", dtype=torch.bfloat16)
    x[:50].normal_()
    x[50:-50] = 0
    x[-50:] = x[:50]
    y = ak.adapter(x, *w)
    assert torch.equal(y[-50:], y[:50])


def test_one_variant_whatever_the_rows() -> None:
    from adapterkern.ops.kernels import forward

    _, w, _ = draw(1, 1280, 48, torch.bfloat16)
    kernel = forward.forward_kernel

    def compiled() -> int:
        return len(kernel.device_caches[torch.cuda.current_device()][0])

    counts = []
    for T in (20000, 16384, 20001):
        ak.adapter(torch.randn(T, 1280, device="cuda", dtype=torch.bfloat16), *w)
        counts.append(compiled())
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_liger_in_the_backbone(dtype: torch.dtype) -> None:
    """The loss and the gradients of the backbone's own modules, to the dtype's rounding."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=512)).to("cuda", dtype)
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=16, init="xavier")).train()
    ids = torch.randint(512, (4, 100), device="cuda")
    results = []
    for liger in (False, True):
        model.liger = liger
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in model.adapter_parameters()])
        results.append((loss.detach(), flat))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert relative_error(results[1][0], results[0][0]) < tolerance
    assert (results[1][1] - results[0][1]).norm() < tolerance * results[0][1].norm()
