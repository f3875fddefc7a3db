"""``LlamaAdapter(llama, None)``: without an adapter it computes what the backbone does; adapters can be added later."""

import inspect
from pathlib import Path

import pytest
import torch

import adapterkern as ak
from adapterkern.training import evaluate, train
from tests.support import tiny_run
from tests.support.tiny_llama import IDS, LEFT_PADDED, adapted, grads, logits, tiny

NEW_TOKENS = {"attention_mask": LEFT_PADDED, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def test_none_is_no_adapter_and_the_default_is_one() -> None:
    default = inspect.signature(ak.LlamaAdapter).parameters["config"].default
    assert default == ak.AdapterConfig()
    assert list(ak.LlamaAdapter(tiny()).adapters) == ["default"]
    model = ak.LlamaAdapter(tiny(), None)
    assert list(model.adapters) == []
    assert model.active_adapter is None


def test_computes_what_the_backbone_does() -> None:
    llama = tiny()
    expected, generated = logits(llama), llama.generate(IDS, **NEW_TOKENS)
    classes = [type(module) for module in llama.modules()]
    model = ak.LlamaAdapter(llama, None)
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(IDS, **NEW_TOKENS), generated)
    assert torch.equal(model.generate(IDS, adapter_names=["__base__"] * 3, **NEW_TOKENS), generated)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.unload() is llama
    assert [type(module) for module in llama.modules()] == classes
    assert torch.equal(logits(llama), expected)


def test_the_prefix_is_the_whole_decoder() -> None:
    model = ak.LlamaAdapter(tiny(), None)
    assert model.prefix_length == 4
    with torch.no_grad():
        expected = model.decoder(IDS, attention_mask=LEFT_PADDED).last_hidden_state
        assert torch.equal(model.run_suffix(model.run_prefix(IDS, LEFT_PADDED), LEFT_PADDED), expected)


def test_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = ak.LlamaAdapter(tiny(), None)
    total = sum(p.numel() for p in model.base.parameters())
    assert model.get_nb_trainable_parameters() == (0, total)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == f"trainable params: 0 || all params: {total:,} || trainable%: 0.0000\n"
    model.add_adapter("a", ak.AdapterConfig())  # not active
    assert model.get_nb_trainable_parameters() == (0, total)
    with pytest.raises(ValueError, match="model: expected an active adapter, got none"):
        train(model, tiny_run.rows(16), tiny_run.quiet(), tokenizer=tiny_run.tokenizer())


def test_what_needs_an_adapter_says_so(tmp_path: Path) -> None:
    model = ak.LlamaAdapter(tiny(), None)
    for call in (
        model.adapter_parameters,
        model.adapter_config,
        lambda: model.set_adapter("default"),
        lambda: model.delete_adapter("default"),
        lambda: model.save_pretrained(tmp_path),
        lambda: model.save_adapterhub(tmp_path),
        lambda: model.push_to_hub("me/name"),
    ):
        with pytest.raises(ValueError, match=r"name: expected one of the model's adapters \(it has none\), got"):
            call()
    with pytest.raises(
        ValueError, match=r"adapter_names: expected some of the model's adapters \(it has none\), __base__, got 'a'"
    ):
        model(IDS, adapter_names=["a"] * 3)
    assert not list(tmp_path.iterdir())
    model.add_adapter("a", ak.AdapterConfig())
    with pytest.raises(ValueError, match="name: expected one of a, got None"):
        model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="config: expected an AdapterConfig, got None"):
        model.add_adapter("b", None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_that_is_added_later_is_as_one_from_the_beginning(checkpointing: bool) -> None:
    first = adapted().train()
    model = ak.LlamaAdapter(tiny(), None).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert not model(IDS, labels=IDS).loss.requires_grad
    model.add_adapter("later", first.adapter_config())
    model.adapters["later"].load_state_dict(first.adapters["default"].state_dict())
    with torch.no_grad():
        assert torch.equal(logits(model), logits(tiny()))  # not active yet
    model.set_adapter("later")
    assert all(map(torch.equal, grads(model), grads(first)))


def test_a_saved_adapter_can_be_loaded_into_it(tmp_path: Path) -> None:
    first = adapted()
    first.save_pretrained(tmp_path)
    model = ak.LlamaAdapter(tiny(), None).eval()
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    assert torch.equal(logits(model), logits(first))


def test_a_head_trained_on_it_is_one_trained_beside_disabled_adapters() -> None:
    rows, config = tiny_run.rows(16), tiny_run.quiet(train_adapters=False)
    heads, scores = [], []
    for model in (tiny_run.model(), ak.LlamaAdapter(tiny_run.model().unload(), None)):
        result = train(model, rows, config, tokenizer=tiny_run.tokenizer())
        heads.append(tiny_run.weights(None, result.head))
        scores.append(evaluate(model, rows, config, tokenizer=tiny_run.tokenizer(), head=result.head)["loss"])
    assert tiny_run.same_bits(*heads)
    assert scores[0] == scores[1]
