"""ClippedAdamW's arithmetic, on the CPU twin: the element code and the order of summation that the GPU runs."""

import math
import os
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapterkern.optim import ClippedAdamW, backend, backends
from tests.support.optim_oracle import TILE, Oracle, hostile_gradients, parameters, set_grads, worst

SIZES = [0, 1, 3, TILE - 1, TILE, TILE + 1, 65535, 65536, 65537]
needs_extension = pytest.mark.skipif(
    backend("cpu")[0] != "cpu twin", reason=f"the extension is missing: {backend('cpu')[1]}"
)


@pytest.fixture(params=["cpu twin", "torch fused AdamW"])
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The extension, and the fallback that stands in for it."""
    if request.param == "torch fused AdamW":
        monkeypatch.setenv("ADAPTERKERN_FUSED", "0")
    elif backend("cpu")[0] != "cpu twin":
        pytest.skip(f"the extension is missing: {backend('cpu')[1]}")
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("misaligned", [False, True])
def test_two_hundred_steps_stay_as_close_to_float64_as_torch(any_backend: str, misaligned: bool) -> None:
    sizes = [*SIZES, 1_000_000]
    params = parameters(sizes, misaligned=misaligned)
    optimizer, oracle = ClippedAdamW(params, lr=1e-3), Oracle(params)
    reference = parameters(sizes, misaligned=misaligned)
    baseline = torch.optim.AdamW(reference, lr=1e-3, weight_decay=0.01)
    for step in range(200):
        scale = 10.0 ** (step % 7 - 5)  # clipped and unclipped steps alternate
        grads = set_grads(params, step, scale)
        for r, g in zip(reference, grads, strict=True):
            r.grad = g.clone()
        norm = oracle.step(grads)
        optimizer.step()
        tolerance = 1e-7 if any_backend == "cpu twin" else 1e-4  # torch adds a million squares in fp32
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=tolerance)
        nn.utils.clip_grad_norm_(reference, 1.0)
        baseline.step()
    assert worst(params, oracle.params) <= 2 * worst(reference, oracle.params) + 1e-7
    for key, expected in (("exp_avg", oracle.exp_avg), ("exp_avg_sq", oracle.exp_avg_sq)):
        error = worst([optimizer.state[p][key] for p in params], expected)
        assert error <= 2 * worst([baseline.state[p][key] for p in reference], expected) + 1e-7
    assert all(optimizer.state[p]["step"] == 200 for p in params)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, 300)), min_size=1, max_size=20),
    misaligned=st.booleans(),
    max_norm=st.sampled_from([None, math.inf, 1e-3, 1.0, 0.0]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)]),
    maximize=st.booleans(),
)
def test_options_match_the_formula(
    sizes: list[int],
    misaligned: bool,
    max_norm: float | None,
    weight_decay: float,
    betas: tuple[float, float],
    maximize: bool,
) -> None:
    options = {"lr": 1e-2, "betas": betas, "eps": 1e-3, "weight_decay": weight_decay}
    params = parameters(sizes, misaligned=misaligned)
    optimizer = ClippedAdamW(params, max_norm=max_norm, maximize=maximize, **options)
    limit = math.inf if max_norm is None else max_norm
    oracle = Oracle(params, max_norm=limit, sign=-1 if maximize else 1, **options)
    for step in range(4):
        oracle.step(set_grads(params, step))
        optimizer.step()
    assert worst(params, oracle.params) < 1e-6


def test_five_hundred_tensors_and_as_many_groups(any_backend: str) -> None:
    params = parameters([(7 * i) % 61 for i in range(500)])
    groups: list[dict[str, Any]] = [
        {"params": [p], "lr": 1e-3 * (1 + i % 5), "weight_decay": 0.1 * (i % 3)} for i, p in enumerate(params)
    ]
    optimizer = ClippedAdamW(groups)
    oracles = [Oracle([g["params"][0]], lr=g["lr"], weight_decay=g["weight_decay"], max_norm=math.inf) for g in groups]
    for step in range(3):
        grads = set_grads(params, step)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        for oracle, grad in zip(oracles, grads, strict=True):
            oracle.step([grad.double() * min(1.0, 1.0 / (norm + 1e-6))])
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    assert worst(params, [oracle.params[0] for oracle in oracles]) < 1e-6


# ---- the order of summation ----


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums in fp64, or in two fp32 terms, which lie along the first axis."""
    if a.dtype == np.float64:
        return a + b
    hi = a[0] + b[0]
    added = hi - a[0]
    return np.stack([hi, ((a[0] - (hi - added)) + (b[0] - added)) + (a[1] + b[1])])


def fold(lanes: np.ndarray) -> np.ndarray:
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = add(lanes[..., :half], lanes[..., half:])
    return lanes[..., 0]


def fold_tile(rows: np.ndarray) -> np.ndarray:
    lanes = np.zeros_like(rows[0])
    for row in rows:
        lanes = add(lanes, row)
    a, b, c, d = (lanes[..., i::4] for i in range(4))
    return fold(add(add(a, b), add(c, d)))


@np.errstate(over="ignore", invalid="ignore")
def documented_square(grads: list[torch.Tensor]) -> float:
    """The squared norm in the order that clipped_adamw.h documents, in numpy."""
    slots = []
    for grad in grads:
        tiles = max(1, -(-grad.numel() // TILE))
        padded = np.zeros(tiles * TILE, np.float32)
        padded[: grad.numel()] = grad.numpy()
        for tile in padded.reshape(tiles, TILE // 128, 128):
            squares = tile.astype(np.float64) ** 2  # exact
            hi = squares.astype(np.float32)
            terms = fold_tile(np.stack([hi, (squares - hi).astype(np.float32)], axis=1)).astype(np.float64)
            held = 2.0**-90 <= terms.sum() < 2.0**128
            slots.append(terms.sum() if held else fold_tile(squares))
    lanes = np.zeros(256)
    for i, slot in enumerate(slots):
        lanes[i % 256] += slot
    return float(fold(lanes))


def squared_norm(optimizer: ClippedAdamW) -> float:
    assert optimizer._plan is not None
    return optimizer._plan.buckets[0].passes.squared_norm.item()


@needs_extension
def test_norm_follows_the_documented_order_to_the_bit_on_any_number_of_threads() -> None:
    params = parameters([*SIZES, 1_300_000])
    assert backends._C.TILE == TILE
    norms, squares, results = [], [], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            copies = [nn.Parameter(p.detach().clone()) for p in params]
            optimizer = ClippedAdamW(copies)
            grads = set_grads(copies, 0)
            optimizer.step()
            norms.append(optimizer.grad_norm.item())
            squares.append(squared_norm(optimizer))
            results.append(torch.cat([p.detach() for p in copies]))
    finally:
        torch.set_num_threads(before)
    assert set(squares) == {documented_square(grads)}
    assert set(norms) == {float(np.float32(np.sqrt(squares[0])))}
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_extension
@pytest.mark.parametrize("name", hostile_gradients())
def test_the_norm_of_hostile_gradients_is_fp64s(name: str) -> None:
    grad = hostile_gradients()[name]
    exact = math.fsum((grad.double() ** 2).tolist())  # a float's square is exact in fp64
    p = nn.Parameter(torch.zeros_like(grad))
    optimizer = ClippedAdamW([p])
    p.grad = grad
    optimizer.step()
    assert squared_norm(optimizer) == documented_square([grad])
    assert squared_norm(optimizer) == pytest.approx(exact, rel=2.0**-44, abs=0)
    # The terms' error, up to 2⁻³⁶, moves fp32's rounding of the norm only where it lies between two floats.
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(exact), rel=2.0**-23)
    assert optimizer.skipped == 0


def test_a_largest_norm_of_0_is_said_to_leave_nothing() -> None:
    p = nn.Parameter(torch.ones(4))
    with pytest.warns(UserWarning, match=r"^max_norm: 0 leaves nothing of any gradient; None does not clip$"):
        ClippedAdamW([p], max_norm=0)


@needs_extension
def test_moments_follow_the_formula_in_fp32_to_the_bit() -> None:
    """No contraction and no reassociation, so that the CPU's instruction sets and the GPU agree."""
    params = parameters([3 * TILE + 5])
    optimizer = ClippedAdamW(params, betas=(0.9, 0.999), max_norm=0.5)
    m, v = np.zeros(3 * TILE + 5, np.float32), np.zeros(3 * TILE + 5, np.float32)
    a, b, c = np.float32(1 - 0.9), np.float32(0.999), np.float32(1 - 0.999)
    for step in range(5):
        (grad,) = set_grads(params, step)
        optimizer.step()
        norm = math.sqrt(np.square(grad.double().numpy()).sum())  # in another order: its rounding is far below fp32's
        g = grad.numpy() * np.float32(0.5 / (norm + 1e-6))
        m = m + a * (g - m)
        v = b * v + c * (g * g)
        state = optimizer.state[params[0]]
        assert np.array_equal(state["exp_avg"].numpy(), m)
        assert np.array_equal(state["exp_avg_sq"].numpy(), v)


@needs_extension
def test_norm_neither_overflows_nor_underflows() -> None:
    for scale in (3e36, 1e-30):
        params = parameters([1000])
        optimizer = ClippedAdamW(params)
        grads = set_grads(params, 0, scale)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(grads[0].double().norm().item(), rel=1e-6)
        assert optimizer.skipped == 0


# ---- parameter kinds ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("misaligned", [False, True])
def test_low_precision_parameters_keep_an_fp32_master(any_backend: str, dtype: torch.dtype, misaligned: bool) -> None:
    params = parameters(SIZES, dtype, misaligned)
    optimizer, oracle = ClippedAdamW(params, lr=1e-4), Oracle(params, lr=1e-4)
    for step in range(50):
        oracle.step(set_grads(params, step, 0.1))
        optimizer.step()
    masters = [optimizer.state[p]["master"] for p in params]
    assert worst(masters, oracle.params) < (1e-6 if any_backend == "cpu twin" else 1e-5)  # torch rounds 1 - lr·wd
    assert all(torch.equal(p, master.to(dtype)) for p, master in zip(params, masters, strict=True))
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in params)


@needs_extension
def test_stochastic_rounding_is_unbiased_repeatable_and_between_neighbors() -> None:
    def run(seed: int, steps: int) -> torch.Tensor:
        p = nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16))
        optimizer = ClippedAdamW([p], lr=1e-4, weight_decay=0.0, max_norm=None, low_precision="stochastic", seed=seed)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach()

    # Below 1 neighbors are 2⁻⁸ apart. A step of 1e-4 would never move a rounded-to-nearest bf16.
    once = run(0, 1)
    assert set(once.unique().tolist()) == {1.0, 1.0 - 2**-8}
    # Moving with probability 0.0256, 200,000 elements have a mean within 5 standard errors: 5 · 2⁻⁸ · √(0.025/200000).
    assert 1 - once.double().mean().item() == pytest.approx(1e-4, abs=7e-6)
    assert 1 - run(0, 20).double().mean().item() == pytest.approx(2e-3, abs=4e-5)
    assert torch.equal(once, run(0, 1))
    assert not torch.equal(once, run(1, 1))


@needs_extension
def test_stochastic_rounding_follows_the_formula_on_average() -> None:
    params = parameters([3, TILE + 1, 65537], torch.bfloat16, misaligned=True)
    optimizer, oracle = ClippedAdamW(params, lr=1e-3, low_precision="stochastic"), Oracle(params)
    for step in range(20):
        oracle.step(set_grads(params, step, 0.1))
        optimizer.step()
    drift = torch.cat([p.detach().double() - e for p, e in zip(params, oracle.params, strict=True)])
    assert (
        abs(drift.mean().item()) < 2e-4
    )  # rounding to nearest every step loses about 20 · 1e-3 · sign on most elements
    assert drift.std().item() < 3e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_is_its_rounded_master_for_every_bit_pattern(any_backend: str, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (300_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    edges = torch.tensor(
        [0.0, -0.0, 65504, 65519.996, 65520, 65536, 2**-14, 2**-24, 2**-25, 2**-25 * 1.0001, 1e-40, 3.4e38]
    )
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    values = torch.cat([bits.view(torch.float32), edges, -edges, halves, halves * (1 + 2**-11), halves * (1 - 2**-12)])
    values = values[values.isfinite()]
    p = nn.Parameter(torch.zeros_like(values, dtype=dtype))
    optimizer = ClippedAdamW([p], lr=0.0, weight_decay=0.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["master"].copy_(values)
    p.data.copy_(values)  # rounded by torch; a master that rounds to anything else would be replaced
    optimizer.step()
    assert torch.equal(optimizer.state[p]["master"], values)
    assert torch.equal(p, values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_written_into_a_parameter_between_steps_holds(any_backend: str, dtype: torch.dtype) -> None:
    params = parameters(SIZES, dtype)
    optimizer = ClippedAdamW(params, lr=1e-3)
    set_grads(params, 0)
    optimizer.step()
    kept = [optimizer.state[p]["master"].clone() for p in params]
    with torch.no_grad():
        for p in params:  # every third element, as an average swapped in or a loaded state dict
            p[::3] = 100.0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for p, before in zip(params, kept, strict=True):
        before[::3] = 100.0
        assert torch.equal(optimizer.state[p]["master"], before)  # the others keep what bf16 cannot hold
        assert torch.equal(p, before.to(dtype))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_low_precision_gradient_is_read_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    p = nn.Parameter(torch.zeros_like(values))
    optimizer = ClippedAdamW([p], betas=(0.0, 0.999), max_norm=None)
    p.grad = values
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], values.float())


@pytest.mark.parametrize("skip", [False, True])
def test_clear_grads_zeroes_them_in_the_same_pass(any_backend: str, skip: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters([1, TILE + 1], dtype, misaligned=True)
        params.append(nn.Parameter(torch.randn(5, 7).to(dtype)))
        set_grads(params, 0)
        params[-1].grad = torch.randn(7, 5).to(dtype).t()  # strides that are not the parameter's
        if skip:
            params[0].grad[0] = math.nan
        optimizer = ClippedAdamW(params, clear_grads=True)
        before = [p.grad for p in params]
        optimizer.step()
        assert optimizer.skipped == float(skip)
        assert all(p.grad is b and not b.count_nonzero() for p, b in zip(params, before, strict=True))


def test_a_schedule_in_tensors_is_the_schedule_in_floats(any_backend: str) -> None:
    a, b = parameters(SIZES), parameters(SIZES)
    lr, max_norm = torch.tensor(1e-3), torch.tensor(0.5)
    decay = torch.tensor(0.1) if any_backend == "cpu twin" else 0.1
    in_tensors = ClippedAdamW(a, lr=lr, weight_decay=decay, max_norm=max_norm)
    in_floats = ClippedAdamW(b, lr=float(lr), weight_decay=float(decay), max_norm=0.5)
    for step in range(5):
        lr.fill_(1e-3 / (step + 1))
        max_norm.fill_(0.5 + step)
        in_floats.param_groups[0]["lr"], in_floats.max_norm = float(lr), float(max_norm)
        for params, optimizer in ((a, in_tensors), (b, in_floats)):
            set_grads(params, step)
            optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("low_precision", ["master", "stochastic"])
def test_autograd_refuses_a_backward_through_what_a_step_has_overwritten(any_backend: str, low_precision: str) -> None:
    """As with torch.optim."""
    if low_precision == "stochastic" and any_backend != "cpu twin":
        pytest.skip("stochastic rounding needs the extension")
    single, half = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer, other = ClippedAdamW([single, half], low_precision=low_precision, clear_grads=True), nn.Parameter(single)
    single.grad, half.grad = torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    results = [(written * other).sum() for written in (single, half, single.grad)]
    optimizer.step()
    for y in results:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    with torch.inference_mode():
        optimizer.step()


def test_layouts_other_than_contiguous(any_backend: str) -> None:
    p = nn.Parameter(torch.randn(6, 5).t())
    wide = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    params = [p, wide]
    optimizer, oracle = ClippedAdamW(params, lr=1e-3), Oracle(params)
    for step in range(3):
        set_grads(params, step)
        wide.grad = torch.full((), 0.5).expand_as(wide)  # what .sum().backward() leaves: stride 0
        oracle.step([q.grad for q in params])  # type: ignore[misc]  # .grad is set
        optimizer.step()
    assert worst(params, oracle.params) < 1e-6


# ---- gradients that are not finite ----


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_element_anywhere_skips_the_whole_step(any_backend: str, value: float, dtype: torch.dtype) -> None:
    params = parameters([3, TILE + 1, 9000], dtype, misaligned=True)
    optimizer = ClippedAdamW(params)
    set_grads(params, 0)
    optimizer.step()
    for index, position in [(0, 0), (0, 2), (1, 0), (1, 127), (1, TILE - 1), (1, TILE), (2, 5000), (2, 8999)]:
        set_grads(params, 1)
        params[index].grad[position] = value
        before = [t.clone() for p in params for t in (p, *optimizer.state[p].values())]
        optimizer.step()
        after = [t for p in params for t in (p, *optimizer.state[p].values())]
        assert optimizer.skipped == 1
        assert not optimizer.grad_norm.isfinite()
        assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    set_grads(params, 1)
    optimizer.step()
    assert optimizer.skipped == 0
    assert optimizer.state[params[0]]["step"] == 2


def test_error_if_nonfinite(any_backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = ClippedAdamW([p], error_if_nonfinite=True)
    p.grad = torch.tensor([1.0, math.nan, 1.0])
    with pytest.raises(RuntimeError, match="total norm is nan"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


@pytest.mark.slow
def test_import_needs_no_extension() -> None:
    code = (
        "import sys; sys.modules['adapterkern._C'] = None\n"
        "import torch; from adapterkern.optim import ClippedAdamW, backend\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "ClippedAdamW([p]).step(); print(backend('cpu'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert "torch fused AdamW" in run.stdout
    assert "ClippedAdamW on cpu runs on torch fused AdamW" in run.stderr  # the fallback is logged


@pytest.mark.slow
@needs_extension
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are bound on Linux only")
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [])(0)) < 2, reason="needs two cores")
def test_a_step_leaves_its_caller_on_its_core() -> None:
    """A thread that was over before it was bound took the caller along, and two threads of OpenMP were on one core."""
    code = textwrap.dedent("""
        import os, subprocess, sys, torch, adapterkern as ak

        p = torch.nn.Parameter(torch.zeros(64 * 4096))
        p.grad = torch.ones_like(p)
        optimizer = ak.ClippedAdamW([p], lr=1e-3, max_norm=1.0)
        torch.ones(1 << 20).add_(1)  # OpenMP binds its threads; the first step is the likeliest to go wrong
        before = os.sched_getaffinity(0)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in "12"]  # on the caller's core
        try:
            for _ in range(50):
                optimizer.step()
            print(before == os.sched_getaffinity(0), len(before))
        finally:
            for process in busy:
                process.kill()
    """)
    others = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment = others | {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True 1\n"
