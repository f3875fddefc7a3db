"""``model.reference()``: the same parameters, without adapters or with a frozen copy of one."""

from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from tests.support.tiny_llama import IDS, adapted, draw, grads, logits, tiny


def ids_of(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


def test_the_backbone_without_adapters_and_without_memory() -> None:
    model = adapted()
    reference = model.reference()
    assert type(reference) is type(tiny())
    assert torch.equal(logits(reference), logits(tiny()))
    assert ids_of(reference) == ids_of(model.base)
    buffers = {b.data_ptr() for b in model.base.buffers()}
    assert {b.data_ptr() for b in reference.buffers()} == buffers
    assert set(reference.state_dict()) == set(tiny().state_dict())
    assert {id(m) for m in reference.modules()}.isdisjoint(id(m) for m in model.modules())


def test_a_copy_of_an_adapter_stays_as_it_is() -> None:
    model = adapted()
    before = logits(model)
    reference = model.reference("default")
    assert ids_of(reference.base) == ids_of(model.base)
    assert not any(p.requires_grad for p in reference.parameters())
    with model.disable_adapter():  # the reference has its own adapters, and its own blocks
        assert torch.equal(logits(reference), before)
    draw(model)
    model.delete_adapter("default")
    assert torch.equal(logits(reference), before)
    whole: Any = reference  # as SFTTrainer and its kin call it
    assert torch.equal(whole.base_model(IDS).last_hidden_state, whole.base.model(IDS).last_hidden_state)


def test_what_is_done_to_a_reference_does_not_reach_the_model() -> None:
    model = adapted().train()
    model.gradient_checkpointing_enable()
    expected = grads(model)
    for reference in (model.reference(), model.reference("default")):
        assert not any(m.training for m in reference.modules())
        assert all(m.training for m in model.modules())
        reference.requires_grad_(False).eval().to(torch.device("cpu"))
        reference.config.use_cache = False
        reference.get_input_embeddings().register_forward_hook(lambda *_: torch.zeros(3, 10, 32))
        prepared = accelerate.Accelerator(cpu=True).prepare_model(reference, evaluation_mode=True)
        assert torch.isfinite(logits(prepared)).all()
    assert model.config.use_cache
    assert model.checkpoints_activations
    for got, e in zip(grads(model), expected, strict=True):
        assert torch.equal(got, e)


def test_a_parameter_that_is_trained_is_copied() -> None:
    llama = tiny()
    model = adapted(llama)
    model.lm_head.weight.requires_grad_(True)
    reference = model.reference()
    before = logits(reference)
    model.lm_head.weight.data.mul_(2)
    assert torch.equal(logits(reference), before)
    reference.requires_grad_(False)
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_modules_that_are_saved_with_an_adapter(tied: bool) -> None:
    model = adapted(tiny(tie_word_embeddings=tied), modules_to_save=["embed_tokens"])
    before = logits(model)
    bare: Any = model.reference()
    reference: Any = model.reference("default")
    assert torch.equal(logits(bare), logits(tiny(tie_word_embeddings=tied)))
    assert torch.equal(logits(reference), before)
    draw(model)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(reference), before)
    assert torch.equal(logits(reference.unload()), logits(bare))
    assert not torch.equal(logits(model), logits(bare))


@pytest.mark.parametrize("offload", [False, True])
def test_under_accelerate_s_hooks(offload: bool) -> None:
    llama = tiny()
    expected = logits(tiny())
    if offload:
        accelerate.cpu_offload(llama, torch.device("cpu"))
    else:
        where = {"model": "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(llama, where, main_device="cpu", force_hooks=True)
    model = adapted(llama)
    with_adapter = logits(model)
    assert torch.equal(logits(model.reference()), expected)
    assert torch.equal(logits(model.reference("default")), with_adapter)
    assert torch.equal(logits(model), with_adapter)


def test_names_and_unload() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="name: expected one of default, got 'x'"):
        model.reference("x")
    model.unload()
    with pytest.raises(RuntimeError, match="unload"):
        model.reference()
