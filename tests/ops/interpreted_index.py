"""The index of mixed adapters, interpreted: when it is checked and sorted once for all sites of a model.

Run by test_kernels.py.
"""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapterkern as ak
from adapterkern.model.mixing import Mixture
from adapterkern.ops import index as indices
from adapterkern.ops.kernels import cache
from tests.support.interpreted import Recording, assert_equal, parameters, value_and_grads
from tests.support.numerics import make_weights

pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")


class Operations(TorchDispatchMode):
    """The names of the operations that run inside, and "sort" for each sorting in the backward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        sort = cache._sorted
        monkeypatch.setattr(cache, "_sorted", lambda index, n: self.names.append("sort") or sort(index, n))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    def of_an_index(self) -> list[str]:
        names = {"ge", "lt", "bitwise_and", "__and__", "all", "_assert_async", "index", "repeat_interleave", "sort"}
        found, self.names = [name for name in self.names if name in names], []
        return found


def mixture(index: Tensor, sites: int = 2) -> Mixture:
    config = ak.AdapterConfig(adapter_dim=12, layers=tuple(range(sites)))
    adapters = {
        name: nn.ModuleDict({str(n): nn.Sequential(ak.Adapter(40, 12, init="xavier")) for n in range(sites)})
        for name in "ab"
    }
    return Mixture(adapters, dict.fromkeys(adapters, config), index)


@pytest.mark.parametrize("index", [[1, 0, -1, 1], [[1, 0], [0, -1], [-1, 1], [1, 1]]], ids=["one choice", "two"])
def test_a_mixture_looks_at_its_index_and_sorts_it_once(index: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 5, 40, requires_grad=True)
    with Operations(monkeypatch) as operations:
        mixed = mixture(torch.tensor(index))
        assert set(operations.of_an_index()) >= {"ge", "lt", "all"}
        seen = []
        for site in ("0", "1", "0"):
            run = mixed.at(site, "layer")
            assert run is not None
            run(x).sum().backward()
            seen.append(operations.of_an_index())
    choices = torch.tensor(index).dim()
    assert seen == [["index"] + ["sort"] * choices, [], []]


def test_a_mixture_s_results_are_the_operator_s_to_the_bit() -> None:
    index = torch.tensor([1, 0, -1, 1])
    mixed, x = mixture(index), torch.randn(4, 5, 40)
    for site in ("0", "1", "1"):
        run = mixed.at(site, "layer")
        assert run is not None
        modules = [adapters[site][0] for adapters in mixed._adapters]
        stacked = [torch.stack(same) for same in zip(*map(parameters, modules), strict=True)]
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        leaves = [leaf, *(p for m in modules for p in parameters(m))]
        dx, *grads = torch.autograd.grad(y.square().sum(), leaves)
        pairs = [torch.stack(pair) for pair in zip(grads[:6], grads[6:], strict=True)]
        assert_equal([y.detach(), dx, *pairs], value_and_grads(x, stacked, 2 * y.detach(), index=index))


@pytest.mark.parametrize("before", [False, True])
def test_a_mixture_compiles_without_a_graph_break(before: bool) -> None:
    mixed, x = mixture(torch.tensor([1, 0, -1, 1])), torch.randn(4, 5, 40)

    def run(x: Tensor) -> Tensor:
        for site in ("0", "1"):
            x = mixed.at(site, "layer")(x)  # type: ignore[misc]
        return x

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    if before:
        run(x)
    got = compiled(x)
    assert len(mixed._choices) == before  # a compiled graph's results are its own
    assert torch.equal(got, run(x))


def test_beams_have_an_index_of_their_own() -> None:
    index = torch.tensor([1, -1])
    mixed = mixture(index)
    beams = mixed.generating(2)
    x = torch.randn(2, 3, 40)
    for _ in range(2):
        for batch, times, of in ((x, 1, mixed), (x.repeat_interleave(3, 0), 3, beams)):
            run = of.at("0", "layer")
            assert run is not None
            modules = [adapters["0"][0] for adapters in mixed._adapters]
            stacked = [torch.stack(same) for same in zip(*map(parameters, modules), strict=True)]
            assert torch.equal(run(batch), ak.adapter(batch, *stacked, index=index.repeat_interleave(times)))


def test_an_index_of_somebody_else_is_looked_at_and_sorted_every_time() -> None:
    """Its version does not count what a replay or another library's kernel writes."""
    x, dy = torch.randn(2, 4, 5, 40)
    w = [torch.stack([t, t + 0.1]) for t in make_weights(40, 12)]
    index = torch.tensor([1, 0, -1, 1])
    value_and_grads(x, w, dy, index=index)
    version = index._version
    index.data.copy_(torch.tensor([0, 1, 1, -1]))
    assert index._version == version
    assert_equal(value_and_grads(x, w, dy, index=index), value_and_grads(x, w, dy, index=torch.tensor([0, 1, 1, -1])))
    index.data[0] = 2
    with pytest.raises(ValueError, match="index: expected values from -1 to 1, got -1 to 2"):
        ak.adapter(x, *w, index=index)


def test_what_is_vouched_for_is_not_what_is_written_later() -> None:
    index = indices.vouch(torch.tensor([1, 0]), 2)
    assert indices.vouched(index[1:], 2) is indices.vouched(index, 3) is not None
    assert indices.vouched(index, 1) is None
    assert indices.vouched(index.clone(), 2) is None
    index[0] = 7
    assert indices.vouched(index, 2) is None
    with torch.inference_mode():
        inside = indices.vouch(torch.tensor([1, 0]), 2)
        assert indices.vouched(inside, 2) is not None
    del index, inside
    gc.collect()
    assert any(entry.storage.expired() for entry in indices._vouched.values())
    kept = indices.vouch(torch.tensor([0]), 1)
    assert indices.vouched(kept, 1) is not None
    assert not any(entry.storage.expired() for entry in indices._vouched.values())


def test_a_recording_keeps_nothing_of_an_index_and_finds_what_was_made_before(
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixed, x = mixture(torch.tensor([1, 0, -1, 1])), torch.randn(4, 5, 40, requires_grad=True)
    run = mixed.at("0", "layer")
    assert run is not None
    before = len(indices._vouched)
    with recording():
        expected = run(x)
    assert not mixed._choices
    assert len(indices._vouched) == before
    run(x).sum().backward()
    (made,) = mixed._choices.values()
    entry = indices.vouched(made, 2)
    assert entry is not None
    kept = dict(entry.sorted)
    with recording(), Operations(monkeypatch) as operations:
        y = run(x)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert operations.of_an_index() == ["sort"]  # again: a graph must not read what the table may drop
    assert len(kept) == 1
    assert entry.sorted == kept
