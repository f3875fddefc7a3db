"""Threads that share a model: each runs the adapters that it asked for."""

import contextlib
import copy
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkern as ak
from tests.support.tiny_llama import IDS, LEFT_PADDED, adapted, draw, grads, logits, tiny


def two_adapters() -> ak.LlamaAdapter:
    model = adapted()
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=4))
    draw(model, "other")
    return model


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(functions)

    def run(n: int) -> None:
        try:
            results[n] = functions[n]()
        except BaseException as error:
            results[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def by_names(model: Any, *names: str) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: model(IDS, attention_mask=LEFT_PADDED, adapter_names=names).logits)


def meet(model: ak.LlamaAdapter, threads: int) -> None:
    """Each thread's forward waits for the others' at the first layer: by then all blocks are open."""
    barrier = threading.Barrier(threads, timeout=30)

    def wait(*_: Any) -> None:
        barrier.wait()

    model.layers[0].register_forward_pre_hook(wait)


def bare(model: ak.LlamaAdapter) -> Tensor:
    with model.disable_adapter():
        return logits(model)


def test_forwards_that_overlap_do_not_mix_modules_that_are_saved_with_an_adapter() -> None:
    model = adapted(modules_to_save=["lm_head"])
    on, off = logits(model), bare(model)
    meet(model, 2)
    together = in_threads(lambda: logits(model), lambda: bare(model))
    assert torch.equal(together[0], on)
    assert torch.equal(together[1], off)


def test_forwards_that_overlap_do_not_mix_adapters() -> None:
    model = two_adapters()
    ways = [
        by_names(model, "default", "default", "default"),
        by_names(model, "other", "__base__", "other"),
        by_names(model, "__base__", "__base__", "__base__"),
        lambda: logits(model),
        lambda: bare(model),
    ]
    alone = [way() for way in ways]
    meet(model, len(ways))
    for expected, got in zip(alone, in_threads(*ways), strict=True):
        assert torch.equal(got, expected)
    assert model.active_adapter == "default"


def test_generate_in_threads() -> None:
    model = two_adapters()
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def generate(name: str) -> Tensor:
        return model.generate(IDS, adapter_names=[name] * len(IDS), **how)

    names = ("default", "other", "__base__")
    alone = [generate(name) for name in names]
    assert not torch.equal(alone[0], alone[2])
    meet(model, len(names))
    for expected, got in zip(alone, in_threads(*(lambda n=n: generate(n) for n in names)), strict=True):
        assert torch.equal(got, expected)


def test_a_layer_is_recomputed_as_it_ran_in_whichever_thread() -> None:
    """On a GPU autograd runs a backward in a thread of its own."""
    model = two_adapters().train()
    expected = grads(model)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    loss = model(IDS, attention_mask=LEFT_PADDED, labels=IDS).loss
    with model.disable_adapter():
        model.set_adapter("other")
        assert in_threads(loss.backward) == [None]
    for p, e in zip(model.adapter_parameters("default"), expected, strict=True):
        assert torch.equal(p.grad, e)


def test_settings_are_the_model_s_in_all_threads() -> None:
    model = two_adapters()
    without, with_other = bare(model), by_names(model, "other", "other", "other")()
    model.set_adapter("other")
    assert torch.allclose(in_threads(lambda: logits(model))[0], logits(model))
    model.disable_adapters()
    assert model.active_adapters() == []
    assert torch.equal(in_threads(lambda: logits(model))[0], without)
    assert torch.equal(by_names(model, "other", "other", "other")(), without)
    model.enable_adapters()
    assert model.active_adapters() == ["other"]
    assert torch.equal(by_names(model, "other", "other", "other")(), with_other)


def test_a_copy_that_is_made_inside_a_block_is_in_none() -> None:
    model = two_adapters()
    with model.disable_adapter():
        other = copy.deepcopy(model)
        assert torch.equal(logits(model), bare(other))
        assert not torch.equal(logits(model), logits(other))


def test_blocks_that_overlap_within_a_thread_are_an_error() -> None:
    """As asyncio tasks make them that await inside, and generators that are resumed by another thread."""
    model = two_adapters()
    first, second = model.disable_adapter(), model.disable_adapter()
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="expected a block to end in the thread that began it"):
        first.__exit__(None, None, None)
    with contextlib.suppress(RuntimeError):
        second.__exit__(None, None, None)

    def stream() -> Iterator[int]:
        with model.disable_adapter():
            yield 1

    tokens = stream()
    next(tokens)
    (error,) = in_threads(lambda: next(tokens))
    assert isinstance(error, RuntimeError)
    assert "end in the thread that began it" in str(error)


def test_replicas_of_data_parallel_run_their_own_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs; here two replicas on the CPU, with copies of the parameters."""

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.clone() for t in tensors] for _ in devices]

    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    model = adapted()
    on, off = logits(model), bare(model)
    first, second = replicate.replicate(model, [0, 1])
    for got in in_threads(lambda: logits(first), lambda: logits(second)):
        assert torch.equal(got, on)
    first(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.adapter_parameters())
    with model.disable_adapter():
        (third,) = replicate.replicate(model, [0])
        assert torch.equal(in_threads(lambda: logits(third))[0], off)
    draw(model)
    assert torch.equal(in_threads(lambda: logits(second))[0], on)  # a copy
    assert not torch.equal(logits(model), on)
    (other,) = replicate.replicate(adapted(modules_to_save=["lm_head"]), [0])
    with pytest.raises(NotImplementedError, match=r"modules_to_save: expected none under nn\.DataParallel"):
        logits(other)


@pytest.mark.slow
def test_blocks_around_and_within_compiled_code() -> None:
    model = ak.LlamaAdapter(tiny(num_hidden_layers=1), ak.AdapterConfig(adapter_dim=4)).eval()
    draw(model)
    names = ["default", "__base__", "default"]
    expected = [logits(model), bare(model), by_names(model, *names)()]
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)

    def off() -> Tensor:
        with model.disable_adapter():
            return logits(compiled)

    for _ in range(2):
        got = [logits(compiled), off(), by_names(compiled, *names)()]
        for one, e in zip(got, expected, strict=True):
            torch.testing.assert_close(one, e)
    with model.disable_adapter():
        torch.testing.assert_close(in_threads(lambda: logits(compiled))[0], expected[0])
    torch.compiler.reset()
