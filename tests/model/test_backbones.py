"""Backbones with hooks, compiled or checkpointed layers, experts, or decoders that cannot be cut: right, or refused."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor
from transformers import GenerationConfig

import adapterkern as ak
from tests.support import tiny_run

IDS = torch.randint(1, 128, (3, 10), generator=torch.Generator().manual_seed(1))


def tiny(family: str = "Llama", **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**(sizes | heads | {"eos_token_id": 2} | fields))
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def adapted(llama: Any = None, **config: Any) -> ak.LlamaAdapter:
    config = {"adapter_dim": 4, "layers": [1, 3], "init": "xavier"} | config
    llama = tiny() if llama is None else llama
    torch.manual_seed(1)
    return ak.LlamaAdapter(llama, ak.AdapterConfig(**config)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def hooked(llama: Any) -> Any:
    for layer in llama.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return llama


def test_what_removed_hooks_leave_behind_hides_no_adapter() -> None:
    llama = hooked(tiny())
    remove_hook_from_module(llama, recurse=True)
    assert "forward" in vars(llama.model.layers[0])
    assert torch.equal(logits(adapted(llama)), logits(adapted()))


def test_hooks_may_go_before_the_adapters_do() -> None:
    llama = hooked(tiny())
    model = adapted(llama)
    remove_hook_from_module(llama, recurse=True)
    assert torch.equal(logits(model), logits(adapted()))
    assert torch.equal(logits(model.unload()), logits(tiny()))


def test_a_forward_on_the_instance_is_refused_and_nothing_is_changed() -> None:
    llama = tiny()
    llama.model.layers[2].forward = torch.compile(llama.model.layers[2].forward, backend="eager")
    with pytest.raises(ValueError, match="llama: expected every LlamaDecoderLayer to run its class's forward"):
        adapted(llama)
    del llama.model.layers[2].forward
    assert torch.equal(logits(adapted(llama)), logits(adapted()))


def test_a_decoder_with_a_hook_can_be_run_in_two_calls() -> None:
    llama = tiny()
    accelerate.dispatch_model(llama, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert "_old_forward" in vars(llama.model)
    model = adapted(llama)
    with torch.no_grad():
        assert torch.equal(model.run_suffix(model.run_prefix(IDS)), model.decoder(IDS).last_hidden_state)


@pytest.mark.parametrize("family", ["Granite", "Phi"])
def test_a_decoder_that_cannot_be_cut_is_trained_without_the_cache(family: str) -> None:
    """Granite scales the embeddings, Phi's norm has another name."""

    def model() -> ak.LlamaAdapter:
        return adapted(tiny(family, **({"embedding_multiplier": 12.0} if family == "Granite" else {})))

    with pytest.raises(ValueError, match=f"two calls, but {family}Model does more than run its layers"):
        model().run_prefix(IDS)
    rows, losses = tiny_run.rows(8), []
    for cache in (False, None):
        config = tiny_run.quiet(prefix_cache=cache, max_steps=2, log_every=1)
        result = ak.train(model(), rows, config, tokenizer=tiny_run.tokenizer())
        assert result.prefix_layers == 0
        losses.append([record["loss"] for record in result.history])
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="prefix_cache: expected None or False, because"):
        ak.train(model(), rows, tiny_run.quiet(prefix_cache=True), tokenizer=tiny_run.tokenizer())


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has other mixtures of experts")
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_experts_in_the_backbone(family: str) -> None:
    fields = {"head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    llama = tiny(family, num_local_experts=4, **fields, **({"num_experts": 4} if family == "Qwen3Moe" else {}))
    bare = logits(llama)
    model = adapted(llama, init="identity")
    assert torch.equal(logits(model), bare)
    with torch.no_grad():
        assert torch.equal(model.run_suffix(model.run_prefix(IDS)), model.decoder(IDS).last_hidden_state)
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=4, position="attention"))
    model.set_adapter("other")
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("when", ["before", "after an unload"])
def test_checkpointing_that_was_on_already_recomputes_the_forward_s_adapter(when: str) -> None:
    def gradients(llama: Any) -> list[Tensor]:
        model = adapted(llama).train()
        model.add_adapter("other", ak.AdapterConfig(adapter_dim=4, layers=[1, 3], init="xavier"))
        loss = model(IDS, labels=IDS).loss
        model.set_adapter("other")
        loss.backward()
        return [p.grad for p in model.adapter_parameters("default")]

    llama = tiny()
    if when == "before":
        llama.gradient_checkpointing_enable()
    else:
        first = adapted(llama)
        first.gradient_checkpointing_enable()
        llama = first.unload()
        assert any(getattr(module, "gradient_checkpointing", False) for module in llama.modules())
        llama.train()(IDS, labels=IDS)  # as without adapters
    for got, expected in zip(gradients(llama), gradients(tiny()), strict=True):
        torch.testing.assert_close(got, expected)


def test_recomputing_keeps_the_flags_of_single_adapters() -> None:
    model = adapted().train()
    model.gradient_checkpointing_enable()
    site: Any = model.adapters["default"]
    site["1"][0].fused = False
    model(IDS, labels=IDS).loss.backward()
    assert not site["1"][0].fused


def test_an_adapter_that_does_not_fit_leaves_the_backbone_as_it_was() -> None:
    llama = tiny()
    classes = [type(module) for module in llama.modules()]
    with pytest.raises(ValueError, match="layers"):
        ak.LlamaAdapter(llama, ak.AdapterConfig(layers=[9]), liger=True)
    assert [type(module) for module in llama.modules()] == classes


def test_unload_takes_only_its_own_adapters_off() -> None:
    first = adapted()
    second = adapted(first.unload(), layers=[0])
    expected = logits(second)
    first.unload()
    assert torch.equal(logits(second), expected)


@pytest.mark.parametrize("name", ["training", "_modules", "keys", "__base__"])
def test_a_name_that_a_module_has_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name: expected a non-empty name without dots"):
        adapted().add_adapter(name, ak.AdapterConfig())


def test_loss_and_generation_settings_are_the_backbone_s() -> None:
    model = adapted()
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert model.generate(IDS).shape == (3, 13)
    model.loss_function = lambda **kwargs: torch.tensor(7.0)
    assert model(IDS, labels=IDS).loss == 7


def test_a_state_dict_of_other_names_does_not_replace_an_adapter(tmp_path: Path) -> None:
    """DistributedDataParallel's names have the prefix "module."."""
    model = adapted()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state = {f"module.{key}": p for key, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tensor 1\.0\.down\.bias: expected by its configuration"):
        model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(TypeError, match="save_pretrained: unexpected argument 'nam'"):
        model.save_pretrained(tmp_path, nam="other")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("save", [ak.LlamaAdapter.save_pretrained, ak.LlamaAdapter.save_adapterhub])
def test_no_path_of_this_machine_is_saved(tmp_path: Path, save: Any) -> None:
    tiny().save_pretrained(tmp_path / "somebody" / "backbone")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "somebody" / "backbone")
    save(adapted(llama), tmp_path / "adapter")
    described = next((tmp_path / "adapter").glob("adapter*.json")).read_text()
    assert "somebody" not in described
    assert '"backbone"' in described
