"""Backbones that call their layers, or are called, with arguments in other orders than LLaMA's."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import adapterkern as ak
from adapterkern.model.decoder import argument_names
from tests.support.tiny_llama import tiny

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
LLAMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GEMMA4 = {
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 8,
}
XGLM = {"vocab_size": 128, "d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4}
# class, config, fields: Gemma 4 and XGLM call layers with more than the stream by position; in the others, labels or
# another argument stand elsewhere than in LlamaForCausalLM
OTHER_ORDERS = [
    ("Gemma4ForCausalLM", "Gemma4TextConfig", LLAMA | GEMMA4),
    ("XGLMForCausalLM", "XGLMConfig", XGLM),
    ("MoshiForCausalLM", "MoshiConfig", LLAMA | {"head_dim": 8, "ffn_dim": 64}),
    ("EuroBertForSequenceClassification", "EuroBertConfig", LLAMA | {"num_labels": 2}),
    ("ModernBertForSequenceClassification", "ModernBertConfig", LLAMA | {"cls_token_id": 1, "sep_token_id": 2}),
]


def backbone(cls: str, config: str, fields: dict[str, Any]) -> Any:
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**fields)).eval()


@pytest.mark.parametrize(("cls", "config", "fields"), OTHER_ORDERS, ids=[row[0] for row in OTHER_ORDERS])
def test_adapters_run_as_hooks_on_the_layers_would_do(cls: str, config: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(1)
    without_head = ak.AdapterConfig(adapter_dim=4, layers=[1, 3], modules_to_save=[])
    model = ak.LlamaAdapter(backbone(cls, config, fields), without_head).eval()
    for p in model.adapter_parameters():
        nn.init.normal_(p, std=0.3)
    bare = backbone(cls, config, fields)
    without = bare(IDS).logits
    sites: Any = model.adapters["default"]

    def run(layer: str, output: Any) -> Any:
        if isinstance(output, tuple):
            return (sites[layer](output[0]), *output[1:])
        return sites[layer](output)

    for index in (1, 3):
        bare.model.layers[index].register_forward_hook(lambda _m, _args, out, i=str(index): run(i, out))
    expected = bare(IDS, MASK)
    assert not torch.equal(bare(IDS).logits, without)
    labels = IDS if "CausalLM" in cls else torch.tensor([0, 1])
    for arguments, named in (((IDS, MASK), {}), ((), {"input_ids": IDS, "attention_mask": MASK})):
        assert torch.equal(model(*arguments, **named).logits, expected.logits)
    loss = model(IDS, labels=labels).loss
    assert torch.equal(loss, bare(IDS, labels=labels).loss)
    loss.backward()
    assert all(p.grad is not None for p in model.adapter_parameters())


@pytest.mark.parametrize(("cls", "config", "fields"), OTHER_ORDERS[1:], ids=[row[0] for row in OTHER_ORDERS[1:]])
def test_every_argument_may_be_given_by_its_position(cls: str, config: str, fields: dict[str, Any]) -> None:
    model = ak.LlamaAdapter(backbone(cls, config, fields), ak.AdapterConfig(adapter_dim=4)).eval()
    labels = IDS if "CausalLM" in cls else torch.tensor([0, 1])
    names = list(inspect.signature(model.base.forward).parameters)
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    by_position = [given.get(name) for name in names[: names.index("labels") + 1]]
    assert torch.equal(model(*by_position).loss, model(**given).loss)


def test_the_signature_is_the_backbone_s_and_our_names() -> None:
    for cls, config, fields in (*OTHER_ORDERS[1:], ("LlamaForCausalLM", "LlamaConfig", LLAMA)):
        base = backbone(cls, config, fields)
        theirs = list(inspect.signature(base.forward).parameters)
        model = ak.LlamaAdapter(base)
        ours = list(inspect.signature(model.forward).parameters)
        assert [name for name in ours if name not in ("adapter_names", "kwargs")] == [
            name for name in theirs if name != "kwargs"
        ]
        assert "adapter_names" in ours
        assert isinstance(model, ak.LlamaAdapter)
        assert type(model).__name__ == cls


@pytest.mark.parametrize("position", ["layer", "attention"])
def test_a_layer_takes_its_arguments_by_position(position: str) -> None:
    model = ak.LlamaAdapter(tiny(), ak.AdapterConfig(adapter_dim=4, layers=[0], position=position))
    for p in model.adapter_parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 5, 32)
    cos_sin = model.decoder.rotary_emb(x, torch.arange(5)[None])
    layer: Any = model.layers[0]
    named = layer(hidden_states=x, position_embeddings=cos_sin)
    names = argument_names(type(tiny().model.layers[0]))
    given = {"hidden_states": x, "position_embeddings": cos_sin}
    last = names.index("position_embeddings") if "position_embeddings" in names else 0
    by_position = [given.get(name) for name in names[: last + 1]]
    rest = {} if last else {"position_embeddings": cos_sin}
    assert torch.equal(layer(*by_position, **rest), named)


def test_a_layer_that_returns_no_stream_says_so() -> None:
    class Layer(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return {"stream": hidden_states}

    llama = tiny()
    llama.model.layers[0] = Layer()
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(layers=[1]))
    with pytest.raises(TypeError, match=r"llama: expected Layer to return the residual stream.*got dict"):
        model(IDS)


@pytest.mark.parametrize("value", [AttributeError("no such field"), NotImplementedError("not here"), None])
def test_a_configuration_without_a_width_is_refused(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden_size(config: Any) -> object:
        if isinstance(value, Exception):
            raise value
        return value

    llama = tiny()
    classes = [type(module) for module in llama.modules()]
    monkeypatch.setattr(type(llama.config), "hidden_size", property(hidden_size))
    with pytest.raises(TypeError, match=r"llama: expected an integer config\.hidden_size, got"):
        ak.LlamaAdapter(llama)
    assert [type(module) for module in llama.modules()] == classes
