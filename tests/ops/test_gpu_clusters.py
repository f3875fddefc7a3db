"""The kernels by clusters on a GPU that has them: right, the same in each run, and in the place of Triton's.

The host shows the same kernels right in any order of events (test_clusters.py); this shows what only hardware can.
"""

from typing import Any

import pytest
import torch

import adapterkern as ak
from adapterkern.ops import adapter_and_norm, choice
from adapterkern.ops.reference import ACTIVATIONS, Weights
from tests.support.gpu import assert_equal, check, check_normed, draw, record
from tests.support.numerics import DISTRIBUTIONS, make_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each launch by clusters, negative of a backward."""
    from adapterkern.ops.kernels import clusters

    for kernel in clusters.Pass:
        found, why_not = clusters.capacity(kernel, 64, 4096, torch.device("cuda", torch.cuda.current_device()))
        if not found:
            pytest.skip(f"{kernel.name}: {why_not}")
    made: list[int] = []
    forward, backward = clusters.forward, clusters.backward

    def counted(x: torch.Tensor, *args: Any, **how: Any) -> Any:
        made.append(len(x))
        return forward(x, *args, **how)

    def counted_backward(dy: torch.Tensor, *args: Any, **how: Any) -> Any:
        made.append(-len(dy))
        return backward(dy, *args, **how)

    monkeypatch.setattr(clusters, "forward", counted)
    monkeypatch.setattr(clusters, "backward", counted_backward)
    monkeypatch.setattr(choice, "runs_clusters", lambda device: True)
    return made


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_table(distribution: str, launches: list[int]) -> None:
    check(*draw(1000, 1024, 64, BF16, distribution))
    assert {1000, -1000} <= set(launches)


@pytest.mark.parametrize(
    ("T", "d", "r"),
    [
        (1, 4096, 64),
        (64, 4096, 64),
        (8192, 4096, 64),
        (37, 576, 16),
        (9000, 2048, 32),
        (9000, 576, 16),  # blocks with fewer columns than they have room for, and buffers used again
        (9000, 3072, 59),
        (300, 4096, 128),
        (500, 3072, 59),
        (300, 5120, 64),
        (70, 8192, 20),
    ],
)
def test_shapes(T: int, d: int, r: int, launches: list[int]) -> None:
    check(*draw(T, d, r, BF16))
    assert T in launches
    assert (-T in launches) == (r <= 64 and d <= 4096)  # the others' backward is Triton's


@pytest.mark.parametrize(("T", "d", "r"), [(1, 4096, 64), (9000, 4096, 64), (9000, 576, 16), (300, 4096, 128)])
def test_the_norm_that_follows(T: int, d: int, r: int, launches: list[int]) -> None:
    check_normed(*draw(T, d, r, BF16))
    assert T in launches


def test_many_norms_agree_to_the_bit(launches: list[int]) -> None:
    x, w, _ = draw(5000, 4096, 64, BF16)
    weight = torch.randn(4096, device="cuda")
    first = adapter_and_norm(x, *w, weight)
    for run in range(100):
        adapter_and_norm(x[: 1 + 97 * run % 5000], *w, weight)
        assert_equal(adapter_and_norm(x, *w, weight), first)
    assert len(launches) == 201


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, launches: list[int]) -> None:
    check(*draw(200, 512, 64, BF16), activation=activation)
    assert {200, -200} <= set(launches)


def test_mixed_adapters(launches: list[int]) -> None:
    w = Weights(*(torch.stack(t).cuda() for t in zip(*(make_weights(512, 32) for _ in range(3)), strict=True)))
    x, dy = (torch.randn(9, 100, 512).cuda().bfloat16() for _ in range(2))
    check(x, w, dy, index=torch.tensor([2, 0, -1, 2, 1, 0, -1, -1, 1], device="cuda"))
    assert launches


def test_many_runs_agree_to_the_bit(launches: list[int]) -> None:
    """Each with other numbers of rows before it, so that the clusters are never in step in the same way."""
    x, w, _ = draw(5000, 4096, 64, BF16)
    first = ak.adapter(x, *w)
    for run in range(200):
        ak.adapter(x[: 1 + 97 * run % 5000], *w)
        assert torch.equal(ak.adapter(x, *w), first)
    assert len(launches) == 401


def test_many_backwards_agree_to_the_bit(launches: list[int]) -> None:
    x, w, dy = draw(5000, 4096, 64, BF16)
    tensors = [t.requires_grad_() for t in (x, *w)]
    y = ak.adapter(x, *w)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    for run in range(100):
        rows = 1 + 97 * run % 5000
        some = x.detach()[:rows].requires_grad_()
        torch.autograd.grad(ak.adapter(some, *w), [some, *w], dy[:rows])
        assert_equal(torch.autograd.grad(y, tensors, dy, retain_graph=True), first)
    assert launches.count(-5000) == 101


def test_cuda_graph(launches: list[int]) -> None:
    x, w, _ = draw(300, 4096, 64, BF16)
    graph, captured = record(lambda: [ak.adapter(x, *w)])
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert_equal(captured, [ak.adapter(x, *w)])
    assert launches


def test_offsets_beyond_int32(launches: list[int]) -> None:
    T, d = 2**31 // 4096 + 100, 4096
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of free device memory")
    _, w, _ = draw(1, d, 16, BF16)
    x = torch.zeros(T, d, device="cuda", dtype=BF16)
    x[:50].normal_()
    x[-50:] = x[:50]
    y = ak.adapter(x, *w)
    assert torch.equal(y[-50:], y[:50])
    assert launches == [T]
