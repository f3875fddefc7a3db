"""ClippedAdamW's CUDA kernels: against the CPU twin, in graphs, on other streams, without a host sync."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from adapterkern.optim import ClippedAdamW, backend
from tests.support.optim_oracle import TILE, Oracle, parameters, set_grads, worst

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if backend("cuda")[0] != "cuda kernels":
    pytest.skip(f"needs the extension's CUDA kernels: {backend('cuda')[1]}", allow_module_level=True)

SIZES = [0, 1, 3, TILE - 1, TILE, TILE + 1, 65535, 65536, 65537, 1_000_000]


def to_cuda(params: list[nn.Parameter], misaligned: bool = False) -> list[nn.Parameter]:
    """Copies on the GPU; `misaligned` ones again start one element off every vector boundary."""
    offset = int(misaligned)
    moved = []
    for p in params:
        memory = torch.empty(p.numel() + offset, dtype=p.dtype, device="cuda")
        memory[offset:].copy_(p.detach())
        moved.append(nn.Parameter(memory[offset:]))
    return moved


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Makes any wait for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "bf16 master", "fp16 master", "bf16 stochastic"])
def test_the_gpu_runs_the_twins_arithmetic(kind: str, misaligned: bool) -> None:
    dtype = {"bf16 master": torch.bfloat16, "fp16 master": torch.float16, "bf16 stochastic": torch.bfloat16}.get(kind)
    on_cpu = parameters(SIZES, dtype or torch.float32, misaligned)
    on_gpu = to_cuda(on_cpu, misaligned)
    options = {"lr": 1e-3, "low_precision": "stochastic" if kind == "bf16 stochastic" else "master", "seed": 3}
    twin, optimizer = ClippedAdamW(on_cpu, **options), ClippedAdamW(on_gpu, **options)
    for step in range(20):
        for p, g in zip(on_gpu, set_grads(on_cpu, step), strict=True):
            p.grad = g.cuda()
        twin.step()
        optimizer.step()
        assert optimizer.grad_norm.item() == twin.grad_norm.item()  # to the bit
    tolerance = 2e-2 if kind == "bf16 stochastic" else 1e-6  # an ulp in a bias correction may flip a random rounding
    for p, q in zip(on_gpu, on_cpu, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key].cpu(), twin.state[q][key])
    same = torch.cat([(p.cpu() == q).float() for p, q in zip(on_gpu, on_cpu, strict=True)])
    assert worst([p.cpu() for p in on_gpu], [q.detach().double() for q in on_cpu]) < tolerance
    assert same.mean() > 0.9


def test_more_tensors_and_groups_than_one_launch_holds() -> None:
    params = parameters([(37 * i) % 5000 for i in range(1300)])
    on_gpu = to_cuda(params)
    optimizer = ClippedAdamW([{"params": [p], "lr": 1e-3 * (1 + i % 7)} for i, p in enumerate(on_gpu)])
    twin = ClippedAdamW([{"params": [p], "lr": 1e-3 * (1 + i % 7)} for i, p in enumerate(params)])
    for step in range(3):
        for p, g in zip(on_gpu, set_grads(params, step), strict=True):
            p.grad = g.cuda()
        optimizer.step()
        twin.step()
        assert optimizer.grad_norm.item() == twin.grad_norm.item()
    assert worst([p.cpu() for p in on_gpu], [q.detach().double() for q in params]) < 1e-6


@pytest.mark.parametrize("sizes", [[3 * TILE + 5, 7], [1_000_000] * 9, [(37 * i) % 5000 for i in range(1300)]])
def test_an_early_launch_changes_no_bit(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [to_cuda(parameters(sizes, seed=10 + step)) for step in range(10)]
    results = []
    for early in "01":
        monkeypatch.setenv("ADAPTERKERN_EARLY_LAUNCH", early)
        params = to_cuda(parameters(sizes))
        optimizer = ClippedAdamW(params, lr=1e-2, clear_grads=True)
        for given in grads:  # back to back: no wait between the steps
            for p, g in zip(params, given, strict=True):
                p.grad = g.detach().clone()
            optimizer.step()
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*results)


def test_two_hundred_steps_against_float64() -> None:
    params = to_cuda(parameters(SIZES))
    optimizer, oracle = ClippedAdamW(params, lr=1e-3), Oracle([p.cpu() for p in params])
    for step in range(200):
        norm = oracle.step([g.cpu() for g in set_grads(params, step, 10.0 ** (step % 7 - 5))])
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    assert worst([p.cpu() for p in params], oracle.params) < 2e-6  # 1.01e-6 on an H100: its expm1f and division


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_written_into_a_parameter_between_steps_holds(dtype: torch.dtype) -> None:
    params = to_cuda(parameters(SIZES, dtype))
    optimizer = ClippedAdamW(params, lr=1e-3)
    set_grads(params, 0)
    optimizer.step()
    kept = [optimizer.state[p]["master"].clone() for p in params]
    with torch.no_grad():
        for p in params:
            p[::3] = 100.0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    for p, before in zip(params, kept, strict=True):
        before[::3] = 100.0
        assert torch.equal(optimizer.state[p]["master"], before)
        assert torch.equal(p, before.to(dtype))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_bad_gradient_skips_the_step_and_clears(value: float) -> None:
    params = to_cuda(parameters(SIZES))
    optimizer = ClippedAdamW(params, clear_grads=True)
    set_grads(params, 0)
    optimizer.step()
    for index, position in [(1, 0), (5, TILE), (9, 999_999)]:
        grads = set_grads(params, 1)
        grads[index][position] = value
        before = [t.clone() for p in params for t in (p, *optimizer.state[p].values())]
        optimizer.step()
        after = [t for p in params for t in (p, *optimizer.state[p].values())]
        assert optimizer.skipped == 1
        assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
        assert not any(g.any() for g in grads)


def test_no_step_waits_for_the_device(no_sync: None) -> None:
    params = [nn.Parameter(torch.randn(300, 70, device="cuda")) for _ in range(40)]
    lr, weight_decay = torch.full((), 1e-3, device="cuda"), torch.full((), 0.1, device="cuda")
    optimizer = ClippedAdamW(params, lr=lr, weight_decay=weight_decay, max_norm=torch.ones((), device="cuda"))
    for _ in range(3):  # the first one makes the state and the plan
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.grad_norm  # noqa: B018
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(sum(p.sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()


def test_a_step_is_two_launches() -> None:
    params = to_cuda(parameters([1000] * 96))
    optimizer = ClippedAdamW(params)
    set_grads(params, 0)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, kernels


def test_a_captured_step_follows_the_schedule_and_the_gradients() -> None:
    inputs = [torch.randn(32, 64, device="cuda") for _ in range(7)]
    rates = [1e-2 / (1 + step) for step in range(7)]
    model = nn.Linear(64, 64, device="cuda")
    control = copy.deepcopy(model)

    reference = ClippedAdamW(control.parameters())
    for x, rate in zip(inputs, rates, strict=True):
        reference.param_groups[0]["lr"] = rate
        reference.zero_grad()
        control(x).square().mean().backward()
        reference.step()

    x, lr = torch.empty_like(inputs[0]), torch.empty((), device="cuda")
    optimizer = ClippedAdamW(model.parameters(), lr=lr, clear_grads=True)

    def whole_step() -> None:
        model(x).square().mean().backward()
        optimizer.step()

    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    for step, (batch, rate) in enumerate(zip(inputs, rates, strict=True)):
        x.copy_(batch)
        lr.fill_(rate)
        if step < 3:  # eager on a side stream first, as capture requires
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                whole_step()
            torch.cuda.current_stream().wait_stream(stream)
            continue
        if step == 3:
            with torch.cuda.graph(graph):  # records, runs nothing
                whole_step()
        graph.replay()
    assert optimizer.grad_norm.item() == pytest.approx(reference.grad_norm.item(), rel=1e-5)
    for p, q in zip(model.parameters(), control.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"] == reference.state[q]["step"] == 7


def test_a_step_on_another_stream_is_ordered_there() -> None:
    params = to_cuda(parameters([1_000_000]))
    optimizer, oracle = ClippedAdamW(params, lr=1e-3), Oracle([p.cpu() for p in params])
    stream = torch.cuda.Stream()
    grads = torch.zeros(1_000_000, device="cuda")
    params[0].grad = grads
    value = torch.randn(1_000_000, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        grads.copy_(value)
        optimizer.step()
    stream.synchronize()
    oracle.step([value.cpu()])
    assert worst([p.cpu() for p in params], oracle.params) < 1e-6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_several_devices_share_one_norm() -> None:
    params = [nn.Parameter(torch.randn(5000, device=f"cuda:{i}")) for i in range(2)]
    optimizer, oracle = ClippedAdamW(params, lr=1e-3), Oracle([p.cpu() for p in params])
    for step in range(3):
        norm = oracle.step([g.cpu() for g in set_grads(params, step)])
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm)
    assert worst([p.cpu() for p in params], oracle.params) < 1e-6
