"""Batches that mix adapters: each sequence gets what its adapter alone gives, in forward, backward and generate."""

import copy
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import adapterkern as ak
from tests.support.tiny_llama import IDS, LEFT_PADDED, NAMES, draw, mixed, tiny

MODEL = mixed()
UNFUSED = mixed(fused=False)


def alone(model: ak.LlamaAdapter, run: Callable[[slice], Tensor], names: list[str | None]) -> Tensor:
    """``run`` over one sequence at a time, with that sequence's adapter the active one."""
    results = []
    for row, name in enumerate(names):
        if name is None:
            with model.disable_adapter():
                results.append(run(slice(row, row + 1)))
        else:
            model.set_adapter(name)
            results.append(run(slice(row, row + 1)))
    model.set_adapter("default")
    return torch.cat(results)


def named(index: list[int]) -> list[str | None]:
    return [None if i < 0 else NAMES[i] for i in index]


def gradients(model: ak.LlamaAdapter, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss with another weight for every logit."""
    model.zero_grad()
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(5))
    (logits * direction).sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.adapters.named_parameters()
    }


@hypothesis.given(index=st.lists(st.integers(-1, 3), min_size=3, max_size=3), fused=st.booleans())
@hypothesis.settings(max_examples=25)
def test_each_sequence_as_if_alone_with_its_adapter(index: list[int], fused: bool) -> None:
    model = MODEL if fused else UNFUSED

    def run(rows: slice = slice(None)) -> Tensor:
        return model(IDS[rows], attention_mask=LEFT_PADDED[rows]).logits

    expected = alone(model, run, named(index))
    expected_gradients = gradients(model, expected)
    with model.mixing(NAMES, torch.tensor(index)):
        got = run()
    torch.testing.assert_close(got, expected)
    for name, gradient in gradients(model, got).items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=name)


def test_minus_one_is_the_backbone_to_the_bit() -> None:
    with torch.no_grad(), MODEL.disable_adapter():
        expected = MODEL(IDS).logits
    for names in (NAMES, []):
        with torch.no_grad(), MODEL.mixing(names, torch.full((3,), -1)):
            assert torch.equal(MODEL(IDS).logits, expected)
    with torch.no_grad(), MODEL.mixing(NAMES, torch.tensor([0, 1, 2])), MODEL.disable_adapter():
        assert MODEL.prefix_length == 4
        assert torch.equal(MODEL(IDS).logits, expected)


def test_adapters_of_no_sequence_get_zeros_and_others_nothing() -> None:
    model = mixed()
    with model.mixing(["b", "c"], torch.tensor([0, -1, 0])):
        model(IDS).logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.adapter_parameters("b"))
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.adapter_parameters("c"))
    assert all(p.grad is None for name in ("a", "d", "default") for p in model.adapter_parameters(name))


@pytest.mark.parametrize("fused", [True, False])
def test_weighted_choices_against_the_layers_by_hand(fused: bool) -> None:
    """Two choices per sequence, weights with a gradient: the residual streams between the layers, written out."""
    configs = {name: {"adapter_dim": r, "layers": [1, 3]} for name, r in (("a", 4), ("b", 4), ("c", 6))}
    model = mixed(configs=configs, fused=fused)
    index = torch.tensor([[0, 2], [1, -1], [2, 2]])
    weight = torch.tensor([[0.7, 0.3], [1.5, 2.0], [0.25, -0.5]], dtype=torch.float64, requires_grad=True)
    with model.mixing(["a", "b", "c"], index, weight):
        got = model(IDS).logits
    got_gradients = gradients(model, got) | {"weight": weight.grad.clone()}

    def by_hand(layer: int, x: Tensor) -> Tensor:
        rows = []
        for b in range(3):
            row = x[b]
            for k in range(2):
                if index[b, k] >= 0:
                    one: Any = model.adapters["abc"[index[b, k]]][str(layer)]
                    row = row + weight[b, k] * (one(x[b]) - x[b])
            rows.append(row)
        return torch.stack(rows)

    hooks = [model.layers[n].register_forward_hook(lambda _m, _args, out, n=n: by_hand(n, out)) for n in (1, 3)]
    with model.disable_adapter():
        expected = model(IDS).logits
    for hook in hooks:
        hook.remove()
    weight.grad = None
    torch.testing.assert_close(got, expected)
    expected_gradients = gradients(model, expected) | {"weight": weight.grad}
    for name, gradient in got_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=name)
    with torch.no_grad(), model.mixing(["a", "b", "c"], index), model.mixing(["a", "b", "c"], index[:, 0]):
        inner = model(IDS).logits
    with torch.no_grad(), model.mixing(["a", "b", "c"], index[:, :1], torch.ones(3, 1)):
        torch.testing.assert_close(model(IDS).logits, inner)  # weight 1 is no weight


@pytest.mark.parametrize("fused", [True, False])
def test_bf16_autocast_as_alone(fused: bool) -> None:
    model = mixed(torch.float32, fused=fused)

    def run(rows: slice = slice(None)) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(IDS[rows]).logits.float()

    expected = alone(model, run, ["a", None, "d"])
    with model.mixing(NAMES, torch.tensor([0, -1, 3])):
        got = run()
    assert ((got - expected).norm() / expected.norm()).item() < 0.02  # bf16 has 8 bits; rounding depends on the batch
    assert all(g.isfinite().all() for g in gradients(model, got).values())


def test_a_mixture_trains_after_inference() -> None:
    """Autograd cannot save tensors that were made under inference_mode."""
    model = mixed()
    with model.mixing(NAMES, torch.tensor([0, -1, 3])):
        with torch.inference_mode():
            expected = model(IDS).logits
        logits = model(IDS).logits
        assert torch.equal(logits, expected)
        assert any(g.abs().max() > 0 for g in gradients(model, logits).values())


def test_a_low_precision_backbone_keeps_its_dtype() -> None:
    model = ak.LlamaAdapter(tiny().to(torch.bfloat16))
    with model.mixing(["default"], torch.tensor([[0, -1]] * 3), torch.ones(3, 2)):
        assert model(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("index", [[0, -1, 2], [3, 1, 0]])
def test_checkpointing_recomputes_the_forward_s_mixture(index: list[int]) -> None:
    model = mixed().train()

    def run(checkpointing: bool) -> dict[str, Tensor]:
        if checkpointing:
            model.gradient_checkpointing_enable()
        with model.mixing(NAMES, torch.tensor(index), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)):
            logits = model(IDS).logits
        with model.mixing(["default"], torch.tensor([0])):  # another mixture, and another batch, at backward time
            return gradients(model, logits)

    expected = run(False)
    assert any(g.abs().max() > 0 for g in expected.values())
    for name, gradient in run(True).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)


def test_generate_with_cache_and_beams_as_alone() -> None:
    model, mask = MODEL, torch.ones_like(IDS)
    kwargs = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for more in ({}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):

        def run(rows: slice, more: dict[str, Any] = more) -> Tensor:
            return model.generate(IDS[rows], attention_mask=mask[rows], **kwargs, **more)

        expected = alone(model, run, ["a", None, "c"])
        got = model.generate(IDS, attention_mask=mask, adapter_names=["a", "__base__", "c"], **kwargs, **more)
        assert torch.equal(got, expected)
        with model.mixing(["c", "a"], torch.tensor([1, -1, 0])):
            assert torch.equal(model.generate(input_ids=IDS, attention_mask=mask, **kwargs, **more), expected)
    assert not torch.equal(run(slice(1, 2)), expected[2:4])  # the active adapter generates other tokens


def test_generate_sees_new_weights_in_its_next_call() -> None:
    model = mixed()
    kwargs = {"adapter_names": ["a", "a", "b"], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    first = model.generate(IDS, **kwargs)
    with model.mixing(["a", "b"], torch.tensor([0, 0, 1])):
        assert torch.equal(model.generate(IDS, **{**kwargs, "adapter_names": None}), first)
        for name in ("a", "b"):
            draw(model, name)
        assert not torch.equal(model.generate(IDS, **{**kwargs, "adapter_names": None}), first)


def test_adapter_names_of_a_forward() -> None:
    with torch.no_grad():
        got = MODEL(IDS, attention_mask=LEFT_PADDED, adapter_names=["d", "__base__", "d"]).logits
        with MODEL.mixing(NAMES, torch.tensor([3, -1, 3])):
            assert torch.equal(MODEL(IDS, attention_mask=LEFT_PADDED).logits, got)
        bare = MODEL(IDS, adapter_names=["__base__"] * 3).logits
        with MODEL.disable_adapter():
            assert torch.equal(MODEL(IDS).logits, bare)


@pytest.mark.parametrize(
    ("names", "length"), [(["a"], 2), (["a", "b"], 2), (["b"], 3), (["c", "b"], 1), (["d"], 4), ([], 4)]
)
def test_prefix_and_suffix_are_the_decoder(names: list[str], length: int) -> None:
    index = torch.arange(3) % (len(names) + 1) - 1
    with torch.no_grad(), MODEL.mixing(names, index):
        assert MODEL.prefix_length == length
        expected = MODEL.decoder(IDS, attention_mask=LEFT_PADDED).last_hidden_state
        got = MODEL.run_suffix(MODEL.run_prefix(IDS, LEFT_PADDED), LEFT_PADDED)
        assert torch.equal(got, expected)
    with torch.no_grad(), MODEL.mixing(["a", "c"], index):
        shorter = MODEL.run_prefix(IDS, LEFT_PADDED)
    with torch.no_grad(), MODEL.mixing(names, index):
        if length >= 1:
            assert torch.equal(MODEL.run_suffix(shorter, LEFT_PADDED, start=1), expected)


def test_the_active_adapter_comes_back() -> None:
    model = mixed()
    before = model(IDS).logits
    with pytest.raises(ValueError, match="got 2"), model.mixing(["a"], torch.tensor([0, 0])):
        model(IDS)
    assert torch.equal(model(IDS).logits, before)
    with model.mixing(["a"], torch.tensor([0, 0, 0])):
        other = copy.deepcopy(model)
        draw(model, "a")
        assert not torch.allclose(other(IDS).logits, model(IDS).logits)  # a copy mixes its own adapters


@pytest.mark.parametrize(
    ("names", "index", "weight", "error", "message"),
    [
        (["a", "x"], torch.zeros(3).long(), None, ValueError, "names: expected some of default, a, b, c, d, got 'x'"),
        (["a", "a"], torch.zeros(3).long(), None, ValueError, "names: expected none twice, got ['a', 'a']"),
        (["a"], [0, 0, 0], None, TypeError, "index: expected a torch.Tensor of dtype int64 or int32, got list"),
        (["a"], torch.zeros(3), None, TypeError, "int64 or int32, got torch.float32"),
        (["a"], torch.zeros(3, 2, 1, 1).long(), None, ValueError, "index: expected shape (B,) or (B, K) with K >= 1"),
        (["a"], torch.zeros(3, 0).long(), None, ValueError, "index: expected shape (B,) or (B, K) with K >= 1"),
        (["a"], torch.tensor([0, 1, 0]), None, ValueError, "index: expected values from -1 to 0, got 0 to 1"),
        (["a"], torch.tensor([0, -2, 0]), None, ValueError, "index: expected values from -1 to 0, got -2 to 0"),
        (["a"], torch.zeros(3).long(), torch.ones(3, 1), ValueError, "weight: expected shape (3,) on cpu like index"),
        (["a"], torch.zeros(3).long(), torch.ones(3).long(), TypeError, "weight: expected a torch.Tensor of a float"),
    ],
)
def test_refuses_what_does_not_fit(names: Any, index: Any, weight: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)), MODEL.mixing(names, index, weight):
        pass


def test_refuses_a_batch_of_another_size() -> None:
    two = ["a", "b"]
    with pytest.raises(
        ValueError, match="adapter_names: expected one entry for each of the batch's 3 sequences, got 2"
    ):
        MODEL(IDS, adapter_names=two)
    with pytest.raises(ValueError, match="adapter_names: expected one entry for each of 3 prompts, got 2"):
        MODEL.generate(IDS, adapter_names=two, max_new_tokens=1)
    with pytest.raises(ValueError, match="adapter_names: expected one entry for each of 4 prompts, got 2"):
        MODEL.generate(IDS[:1].expand(4, -1), adapter_names=two, max_new_tokens=1)  # a multiple does not count as beams
    with pytest.raises(ValueError, match=r"adapter_names: expected some of default, a, b, c, d, __base__, got 'z'"):
        MODEL(IDS, adapter_names=["a", "z", "a"])
