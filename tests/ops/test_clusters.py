"""The kernels by clusters, run on the host in random order (tests/ops/host_cluster), against fp64."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapterkern.ops.kernels import clusters
from adapterkern.ops.kernels.clusters import Pass
from adapterkern.ops.kernels.norm import Following
from adapterkern.ops.kernels.rows import Routing
from adapterkern.ops.kernels.weights import padded_adapter_dim
from adapterkern.ops.reference import ACTIVATIONS, Weights, adapter_eager, adapter_forward, rms_norm
from tests.support import host_cluster
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error

FLOOR = 4 * torch.finfo(torch.bfloat16).eps
# A mean of 15 deviations is just below the bound up to which rows go into the products unchanged.
TABLE = {
    **DISTRIBUTIONS,
    "constant 6e4": lambda x: torch.full_like(x, 6e4),
    "mean 15 sigma": lambda x: x + 15,
    "one block's mean 1000 sigma": lambda x: torch.cat([x[:, :64] + 1000, x[:, 64:]], 1),
    "squares that overflow": lambda x: 1e18 * (x + 3),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return host_cluster.build(tmp_path_factory.mktemp("host"))


@pytest.fixture(autouse=True)
def on_host(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(clusters, "_C", host)
    clusters.capacity.cache_clear()
    yield
    clusters.capacity.cache_clear()


Result = tuple[Tensor, ...]


def run(
    host: ModuleType, x: Tensor, weights: Weights, index: Tensor | None = None, *, narrow: bool = True, seed: int = 0,
    ignored: int = -1, activation: str = "silu", save: bool = True, weight: Tensor | None = None,
) -> Any:  # fmt: skip
    """y, z, mean and rstd by the door that a GPU's tensors take. ``weights`` are (n, …) with an index.

    With the ``weight`` of a norm that reads y, its n and 1/rms come last.
    """
    host.set(narrow, seed, ignored)
    clusters.capacity.cache_clear()
    prepared = host_cluster.prepared(weights if index is not None else Weights(*(w[None] for w in weights)))
    of = Routing(len(x), len(x) if index is None else len(x) // len(index), index)
    assert clusters.fit(x, prepared, of, None)
    r = weights.down_weight.shape[-2]
    how: dict[str, Any] = {"r": r, "eps": 1e-5, "activation": activation, "save": save}
    if weight is None:
        return clusters.forward(x, of, prepared, **how)
    n, rstd = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty(len(x)) if save else None
    following = Following(weight, n, rstd, 1e-6)
    made = clusters.forward(x, of, prepared, following=following, **how)
    return *made, n, rstd


def exact(x: Tensor, weights: Weights, activation: str = "silu") -> Result:
    return adapter_forward(x.double(), Weights(*(w.double() for w in weights)), activation=activation)


def same(a: Result, b: Result) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


@pytest.mark.parametrize("distribution", TABLE)
def test_error_table(host: ModuleType, distribution: str) -> None:
    x, weights = TABLE[distribution](torch.randn(70, 240, dtype=torch.float64)).bfloat16(), make_weights(240, 20)
    true = exact(x, weights)
    eager = adapter_eager(x, Weights(*(w.bfloat16() for w in weights)))
    y, z, mean, rstd = run(host, x, weights)
    assert relative_error(y, true[0]) <= 2 * relative_error(eager, true[0]) + FLOOR
    assert relative_error(z, true[1]) <= 8e-3
    assert ((mean - true[2]) * true[3]).abs().max() <= 1e-3
    assert relative_error(rstd, true[3]) <= 1e-4


def test_what_is_not_finite_stays_in_its_row(host: ModuleType) -> None:
    x, weights = torch.randn(70, 240).bfloat16(), make_weights(240, 20)
    clean = run(host, x, weights)[0]
    x[5, 100], x[9, 0], x[66] = float("nan"), float("inf"), float("-inf")
    y = run(host, x, weights, seed=1)[0]
    others = [row for row in range(70) if row not in (5, 9, 66)]
    assert torch.equal(y[others], clean[others])
    assert not y[[5, 9, 66]].isfinite().all(1).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(host: ModuleType, activation: str) -> None:
    x, weights = 3 * torch.randn(33, 128).bfloat16(), make_weights(128, 16)
    y = run(host, x, weights, activation=activation)[0]
    assert relative_error(y, exact(x, weights, activation)[0]) <= FLOOR


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 200),
    units=st.integers(1, 40),
    r=st.integers(1, 128),
    gap=st.sampled_from([0, 8, 24]),
    seed=st.integers(0, 1000),
    save=st.booleans(),
)
def test_any_shape_and_order(host: ModuleType, rows: int, units: int, r: int, gap: int, seed: int, save: bool) -> None:
    d = 16 * units
    assume(clusters.shape(d, host.cluster_columns(Pass.FORWARD, padded_adapter_dim(r))) is not None)
    torch.manual_seed(0)
    x, weights = torch.randn(rows, d + gap).bfloat16()[:, :d], make_weights(d, r)
    got = run(host, x, weights, seed=seed, save=save)
    true = exact(x, weights)
    error = (got[0].double() - true[0]).norm() / true[0].norm()
    assert error <= FLOOR
    assert all((t is not None) == save for t in got[1:])
    if save:
        assert same(got, run(host, x.contiguous(), weights, seed=seed + 1))


@pytest.mark.parametrize(("d", "r"), [(4096, 64), (4096, 128), (1024, 32), (576, 16)])
def test_the_configurations_that_a_gpu_gets(host: ModuleType, d: int, r: int) -> None:
    x, weights = torch.randn(150, d).bfloat16(), make_weights(d, r)
    x[40] += 100
    got, true = run(host, x, weights, narrow=False), exact(x, weights)
    assert relative_error(got[0], true[0]) <= FLOOR
    assert relative_error(got[1], true[1]) <= FLOOR
    assert same(got, run(host, x, weights, narrow=False, seed=1))


def check_normed(made: Any, plain: Any, weight: Tensor) -> None:
    """n and 1/rms are of the very y that a call without the norm stores, and all else is that call's."""
    *others, n, rstd = made
    assert same(*([t for t in of if t is not None] for of in (others, plain)))
    true, true_rstd = rms_norm(plain[0].double(), weight.double(), 1e-6)
    assert relative_error(n, true) <= torch.finfo(torch.bfloat16).eps / 2
    if rstd is not None:
        torch.testing.assert_close(rstd.double(), true_rstd[:, 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_table_of_the_norm(host: ModuleType, distribution: str) -> None:
    x, weights = (
        DISTRIBUTIONS[distribution](torch.randn(70, 240, dtype=torch.float64)).bfloat16(),
        make_weights(240, 20),
    )
    check_normed(run(host, x, weights, weight=torch.ones(240)), run(host, x, weights), torch.ones(240))


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 300),
    units=st.integers(1, 40),
    r=st.integers(1, 128),
    seed=st.integers(0, 1000),
    save=st.booleans(),
)
def test_any_shape_and_order_with_the_norm(
    host: ModuleType, rows: int, units: int, r: int, seed: int, save: bool
) -> None:
    d = 16 * units
    assume(clusters.shape(d, host.cluster_columns(Pass.FORWARD, padded_adapter_dim(r))) is not None)
    torch.manual_seed(0)
    x, weights, weight = torch.randn(rows, d).bfloat16(), make_weights(d, r), torch.randn(d)
    made = run(host, x, weights, seed=seed, save=save, weight=weight)
    check_normed(made, run(host, x, weights, save=save), weight)
    if save:
        assert same(made, run(host, x, weights, seed=seed + 1, weight=weight))


@pytest.mark.parametrize(("d", "r"), [(4096, 64), (1024, 128), (576, 16)])
def test_the_configurations_with_the_norm_that_a_gpu_gets(host: ModuleType, d: int, r: int) -> None:
    x, weights, weight = torch.randn(300, d).bfloat16(), make_weights(d, r), torch.randn(d)
    x[40] += 100
    made, plain = (run(host, x, weights, narrow=False, weight=w) for w in (weight, None))
    check_normed(made, plain, weight)


def test_what_is_not_finite_stays_in_its_row_of_the_norm(host: ModuleType) -> None:
    x, weights, weight = torch.randn(200, 240).bfloat16(), make_weights(240, 20), torch.randn(240)
    clean = run(host, x, weights, weight=weight)[4]
    x[5, 100], x[9, 0], x[166] = float("nan"), float("inf"), float("-inf")
    n = run(host, x, weights, seed=1, weight=weight)[4]
    others = [row for row in range(200) if row not in (5, 9, 166)]
    assert torch.equal(n[others], clean[others])
    assert n[[5, 9, 166]].isnan().any(1).all()


def grouped(rows_each: int, index: list[int]) -> tuple[Tensor, Weights, Tensor]:
    weights = Weights(*(torch.stack(w) for w in zip(*(make_weights(240, 20) for _ in range(3)), strict=True)))
    x = torch.randn(rows_each * len(index), 240)
    x[5::60] += 40  # shifted
    return x.bfloat16(), weights, torch.tensor(index)


# An adapter that changes within a cluster's rows, from tile to tile, and sequences without one in a row.
GROUPS = {
    "long": (37, [0, 0, 2, -1, 1, 1, 0, 2, 1]),
    "short": (32, [0, 1, 2, -1, -1, -1, -1, -1, -1, 2, 1, 0, 1, 2] * 2),
}


@pytest.mark.parametrize("name", GROUPS)
def test_an_adapter_per_sequence(host: ModuleType, name: str) -> None:
    rows_each, adapters = GROUPS[name]
    x, weights, index = grouped(rows_each, adapters)
    got = run(host, x, weights, index)
    for i, e in enumerate(adapters):
        rows = slice(i * rows_each, (i + 1) * rows_each)
        if e < 0:
            assert torch.equal(got[0][rows], x[rows])
            assert not any(t[rows].any() for t in got[1:])
        else:
            alone = run(host, x[rows], Weights(*(w[e] for w in weights)), seed=e)
            assert same(tuple(t[rows] for t in got), alone)


NAMES = "x", "norm_weight", "norm_bias", "down_weight", "down_bias", "up_weight", "up_bias"
ALL = True, True, True, True, True


def run_backward(
    host: ModuleType, dy: Tensor, x: Tensor, weights: Weights, *, narrow: bool = True, seed: int = 0, ignored: int = -1,
    activation: str = "silu", with_dx: bool = True, wanted: Any = ALL,
) -> Any:  # fmt: skip
    """dx and the clusters' sums, of what the forward keeps in bf16."""
    host.set(narrow, seed, ignored)
    clusters.capacity.cache_clear()
    prepared = host_cluster.prepared(Weights(*(w[None] for w in weights)))
    _, z, mean, rstd = exact(x, weights, activation)
    kept = z.bfloat16(), mean.float(), rstd.float()
    assert clusters.fit_backward(dy, x, kept[0], prepared, None)
    dx = torch.empty_like(dy) if with_dx else None
    how = {"r": weights.down_weight.shape[0], "activation": activation}
    return (dx, *clusters.backward(dy, x, *kept, prepared, dx, wanted, **how))


def gradients(result: Result, weights: Weights) -> Result:
    """What backward.py's last kernel makes of the clusters' sums."""
    dx, *sums = result
    r, d = weights.down_weight.shape
    g, s, q, u, dbias = (t.double().sum((0, 1)) for t in sums)
    g, s, u, dbias = (g - q[:, None])[:r, :d], s[:r], u[:r, :d], dbias[:d]
    gamma, beta, down, *_ = (w.double() for w in weights)
    return dx, (g * down).sum(0), s @ down, g * gamma + s[:, None] * beta, s, u.T, dbias


def true_gradients(dy: Tensor, x: Tensor, weights: Weights, dtype: torch.dtype, activation: str = "silu") -> Result:
    """By autograd, of fp64 from the definition, of bf16 from eager PyTorch."""
    tensors = [t.detach().to(dtype).requires_grad_() for t in (x, *weights)]
    y = adapter_eager(tensors[0], Weights(*tensors[1:]), activation=activation)
    return torch.autograd.grad(y, tensors, dy.to(dtype))


def assert_within_the_budget(dy: Tensor, x: Tensor, weights: Weights, got: Result, activation: str = "silu") -> None:
    true = true_gradients(dy, x, weights, torch.float64, activation)
    eager = true_gradients(dy, x, weights, torch.bfloat16, activation)
    for name, ours, theirs, right in zip(NAMES, gradients(got, weights), eager, true, strict=True):
        assert relative_error(ours, right) <= 2 * relative_error(theirs, right) + FLOOR, name


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_table_of_the_backward(host: ModuleType, distribution: str) -> None:
    x = DISTRIBUTIONS[distribution](torch.randn(70, 240, dtype=torch.float64)).bfloat16()
    weights, dy = make_weights(240, 20), torch.randn(70, 240).bfloat16()
    assert_within_the_budget(dy, x, weights, run_backward(host, dy, x, weights))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_backward(host: ModuleType, activation: str) -> None:
    x, dy, weights = 3 * torch.randn(33, 128).bfloat16(), torch.randn(33, 128).bfloat16(), make_weights(128, 16)
    assert_within_the_budget(dy, x, weights, run_backward(host, dy, x, weights, activation=activation), activation)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 200),
    units=st.integers(1, 40),
    r=st.integers(1, 64),
    gap=st.sampled_from([0, 8, 24]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_order_of_the_backward(
    host: ModuleType, rows: int, units: int, r: int, gap: int, seed: int
) -> None:
    d = 16 * units
    assume(clusters.shape(d, host.cluster_columns(Pass.BACKWARD, padded_adapter_dim(r))) is not None)
    torch.manual_seed(0)
    x, dy, weights = torch.randn(rows, d + gap).bfloat16()[:, :d], torch.randn(rows, d).bfloat16(), make_weights(d, r)
    x[rows // 2] += 100  # shifted
    got = run_backward(host, dy, x, weights, seed=seed)
    true = true_gradients(dy, x, weights, torch.float64)
    for name, ours, right in zip(NAMES, gradients(got, weights), true, strict=True):
        assert (ours.double() - right).norm() <= FLOOR * right.norm(), name
    again = run_backward(host, dy, x.contiguous(), weights, seed=seed + 1)
    assert same(gradients(got, weights), gradients(again, weights))


@pytest.mark.parametrize(("d", "r"), [(4096, 64), (1024, 32), (576, 16)])
def test_the_configurations_of_the_backward_that_a_gpu_gets(host: ModuleType, d: int, r: int) -> None:
    x, dy, weights = torch.randn(150, d).bfloat16(), torch.randn(150, d).bfloat16(), make_weights(d, r)
    got = run_backward(host, dy, x, weights, narrow=False)
    assert_within_the_budget(dy, x, weights, got)
    assert same(got[:1], run_backward(host, dy, x, weights, narrow=False, seed=1)[:1])


# Enough rows that each buffer has several tiles, and blocks with fewer columns than they have room for.
@pytest.mark.parametrize(
    ("rows", "d", "r", "narrow"), [(700, 240, 20, True), (700, 576, 16, False), (500, 528, 64, False)]
)
def test_what_is_not_finite_stays_in_its_row_of_the_backward(
    host: ModuleType, rows: int, d: int, r: int, narrow: bool
) -> None:
    x, dy, weights = torch.randn(rows, d).bfloat16(), torch.randn(rows, d).bfloat16(), make_weights(d, r)
    clean = run_backward(host, dy, x, weights, narrow=narrow)
    assert_within_the_budget(dy, x, weights, clean)
    bad = [5, 9, rows - 3]
    x[bad[0], 100], dy[bad[1], 0], x[bad[2]] = float("nan"), float("inf"), float("-inf")
    dx = run_backward(host, dy, x, weights, narrow=narrow, seed=1)[0]
    others = [row for row in range(rows) if row not in bad]
    assert torch.equal(dx[others], clean[0][others])
    assert not dx[bad].isfinite().all(1).any()


def test_only_what_is_wanted_is_stored(host: ModuleType) -> None:
    x, dy, weights = torch.randn(70, 240).bfloat16(), torch.randn(70, 240).bfloat16(), make_weights(240, 20)
    full = gradients(run_backward(host, dy, x, weights), weights)
    nothing = run_backward(host, dy, x, weights, wanted=(False,) * 5)
    assert torch.equal(nothing[0], full[0])
    assert not any(t is not None for t in nothing[1:])
    without_dx = run_backward(host, dy, x, weights, with_dx=False)
    assert without_dx[0] is None
    assert same(gradients(without_dx, weights)[1:], full[1:])


BARRIER = re.compile(r"\b(wait|wait_for_blocks|wait_read|fence_async|sync_warp|sync_threads|sync_cluster)\(")
# A warp's instructions meet on the host, which is what these wait for; and no block's memory goes away there.
UNSEEN = {
    "sync_warp();  // before others of the warp read the bias",
    "sync_warp();  // the cluster's barrier takes whole warps",
    "sync_warp();  // every lane has seen the phase",
    "sync_warp();  // every lane has seen the phase, and has written its zeros",
    "sync_warp();  // every lane has seen the phases, and has written",
    "sync_cluster();  // no block ends while another may still write into its shared memory",
    "sync_cluster();  // no block ends while another may still read its shared memory",
}


def barriers_that_can_be_left_out(host: ModuleType, kernel: Path, cases: list[Callable[..., Result]]) -> set[str]:
    """Each barrier of a kernel in turn: in no order of events that is tried does anything then end otherwise."""
    right = [case() for case in cases]
    lines = kernel.read_text().splitlines()
    barriers = {n: line.strip() for n, line in enumerate(lines, 1) if BARRIER.search(line.partition("//")[0])}
    assert len(barriers) > 15

    def noticed(line: int) -> bool:
        have_it = set(range(len(cases)))
        for seed in range(40):
            for i in sorted(have_it):
                try:
                    if not same(cases[i](seed=seed, ignored=line), right[i]):
                        return True
                except RuntimeError:
                    return True
                if not host.reached():
                    have_it.remove(i)
        return False

    return {text for n, text in barriers.items() if text not in UNSEEN and not noticed(n)}


@pytest.mark.slow
def test_no_barrier_can_be_left_out(host: ModuleType) -> None:
    calls: list[Any] = [grouped(*GROUPS[name]) for name in GROUPS]
    calls.append((torch.randn(600, 512).bfloat16(), make_weights(512, 16)))  # of which one reducing warp has no rows
    cases: list[Callable[..., Result]] = [partial(run, host, *call) for call in calls]
    x, weights = torch.randn(600, 240).bfloat16(), make_weights(240, 16)
    cases.append(partial(run, host, x, weights, weight=torch.randn(240)))  # its buffers are used again
    assert not barriers_that_can_be_left_out(host, host_cluster.FORWARD, cases)


@pytest.mark.slow
def test_no_barrier_of_the_backward_can_be_left_out(host: ModuleType) -> None:
    def case(T: int, d: int, r: int, **how: Any) -> Result:
        torch.manual_seed(0)
        x, dy, weights = torch.randn(T, d).bfloat16(), torch.randn(T, d).bfloat16(), make_weights(d, r)
        dx, *others = gradients(run_backward(host, dy, x, weights, **how), weights)
        return (dx, *others)

    cases = [partial(case, 300, 240, 20), partial(case, 600, 512, 16)]
    assert not barriers_that_can_be_left_out(host, host_cluster.BACKWARD, cases)


@pytest.mark.parametrize("early", [False, True])
def test_launches_are_early_where_other_kernels_are(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    monkeypatch.setattr(clusters, "has_early_launches", lambda device: early)
    x, weights = torch.randn(40, 32).bfloat16(), make_weights(32, 16)
    run(host, x, weights)
    assert host.was_early() == early
    run_backward(host, x, x, weights)
    assert host.was_early() == early


def test_what_the_kernel_does_not_compute(host: ModuleType) -> None:
    x, weights = torch.randn(64, 256).bfloat16(), Weights(*(w[None] for w in make_weights(256, 16)))
    prepared, plain = host_cluster.prepared(weights), Routing(64, 64, None)
    host.set(False, 0, -1)
    assert clusters.fit(x, prepared, plain)
    assert not clusters.fit(x.half(), prepared, plain)
    assert not clusters.fit(x, prepared, plain, x)
    assert not clusters.fit(x, prepared, Routing(64, 16, torch.zeros(4, dtype=torch.int64)))
    assert not clusters.fit(x, prepared, Routing(64, 64, torch.arange(64), torch.tensor([0, 64])))
    assert not clusters.fit(torch.randn(64, 260).bfloat16()[:, :256], prepared, plain)
    assert all(clusters.shape(d, 512) is not None for d in range(16, 8193, 16))
    assert next(d for d in range(16, 4097, 16) if clusters.shape(d, 256) is None) == 2064
    assert clusters.shape(8192, 512) == clusters.Shape(16, 512)
    assert clusters.shape(8208, 512) is None
    assert clusters.shape(577, 512) is None
    assert clusters.shape(4096, 0) is None


def test_what_the_backward_does_not_compute(host: ModuleType) -> None:
    x, dy, z = torch.randn(64, 256).bfloat16(), torch.randn(64, 256).bfloat16(), torch.randn(64, 16).bfloat16()
    prepared = {r: host_cluster.prepared(Weights(*(w[None] for w in make_weights(256, r)))) for r in (16, 128)}
    host.set(False, 0, -1)
    assert clusters.fit_backward(dy, x, z, prepared[16], None)
    assert not clusters.fit_backward(dy.float(), x, z, prepared[16], None)
    assert not clusters.fit_backward(dy, x.half(), z, prepared[16], None)
    assert not clusters.fit_backward(dy, x, z, prepared[16], x)
    assert not clusters.fit_backward(dy, x, z.float(), prepared[16], None)
    assert not clusters.fit_backward(dy, x, z, prepared[128], None)
