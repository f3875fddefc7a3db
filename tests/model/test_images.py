"""Models that read images: adapters in their text decoder, images through forward, generate and training."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import adapterkern as ak
from tests.support import families, tiny_run

pytestmark = families.LISTED
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "pad_token_id": 0, "sliding_window": 8}
IMAGE = 100  # the token that stands for a part of an image


def gemma3() -> Any:
    """Four tokens per image of 4 patches."""
    vision = SIZES | {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE, initializer_range=0.2
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # which begins as 0
    return model


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (2, 12))
    ids[:, 2:6] = IMAGE
    kinds = (ids == IMAGE).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": kinds,
        "pixel_values": torch.randn(2, 3, 8, 8),
    }


@pytest.mark.parametrize("position", ["layer", "attention", "parallel-mlp"])
def test_images_pass_through(position: Any, tmp_path: Path) -> None:
    llama, inputs = gemma3(), batch()
    with torch.no_grad():
        bare = llama(**inputs).logits
        blind = llama(**inputs | {"pixel_values": inputs["pixel_values"] + 1}).logits
    assert not torch.equal(bare, blind)
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(4, position, layers=[0, 2])).eval()
    assert [p.shape[-1] for p in model.adapter_parameters()][:2] == [32, 32]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, bare)
    optimizer = ak.ClippedAdamW(model.adapter_parameters(), lr=1e-2)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    losses = []
    for _ in range(4):
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = ak.LlamaAdapter.from_pretrained(gemma3(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        made = [m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (loaded, model)]
    assert torch.equal(*made)
    assert torch.equal(model.unload()(**inputs).logits, bare)


def test_it_trains_on_texts_alone() -> None:
    """The text decoder alone computes what the whole model does of a text; the prefix is cached."""
    rows = [{"input_ids": row.tolist()} for row in torch.randint(3, 99, (8, 10), generator=torch.Generator())]
    losses = []
    for cache in (False, None):
        model = ak.LlamaAdapter(gemma3(), ak.AdapterConfig(4, layers=[2]))
        config = tiny_run.quiet(task="causal-lm", prefix_cache=cache, max_steps=2, log_every=1)
        losses.append([record["loss"] for record in ak.train(model, rows, config).history])
    torch.testing.assert_close(*losses)
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        states = model.decoder(ids, use_cache=False).last_hidden_state
        assert torch.equal(states, model.base.model(ids, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("position", ["layer", "parallel-attention"])
def test_adapters_for_the_text_alone(position: Any, tmp_path: Path) -> None:
    inputs, image = batch(), (batch()["input_ids"] == IMAGE)[..., None]
    config = ak.AdapterConfig(4, position, layers=[0, 2], text_only=True)
    model, plain = (ak.LlamaAdapter(gemma3(), c) for c in (config, dataclasses.replace(config, text_only=False)))
    for one in (model, plain):
        families.draw(one)
    plain.eval().fused = False
    for module in plain.adapters.modules():
        if isinstance(module, ak.Adapter):
            module.up.register_forward_hook(lambda _, __, out: out.masked_fill(image, 0))
    outcomes = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        outcomes.append([p.grad.clone() for p in model.adapter_parameters()])
    assert tiny_run.same_bits(*outcomes)
    model.eval().save_pretrained(tmp_path)
    loaded = ak.LlamaAdapter.from_pretrained(gemma3(), tmp_path).eval()
    assert loaded.adapter_config().text_only
    with torch.no_grad():
        expected = plain(**inputs).logits
        for one in (model, loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(one(**inputs).logits, expected)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
        later = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} | {
            "token_type_ids": (tokens == IMAGE).long(),
            "pixel_values": inputs["pixel_values"],
        }
        chosen = model(**later).logits[:, 11:-1].index_fill(2, torch.tensor([IMAGE]), -torch.inf).argmax(-1)
        assert torch.equal(chosen, tokens[:, 12:])
        with pytest.raises(ValueError, match="text_only: expected input_ids, got inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 2, 32))
        with pytest.raises(ValueError, match="text_only: expected False of an adapter that is mixed"):
            model(**inputs, adapter_names=["default", "__base__"])
        assert torch.equal(model.unload()(**inputs).logits, gemma3()(**inputs).logits)
    with pytest.raises(ValueError, match="text_only: expected False for LlamaForCausalLM, which does not read images"):
        tiny_run.model(text_only=True)
