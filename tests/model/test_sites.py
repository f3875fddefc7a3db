"""position="attention" against each family's layer written by hand, with the site between its two sums."""

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import adapterkern as ak
from adapterkern.model.config import POSITIONS
from adapterkern.model.sites import NoSiteError, halves
from tests.support import families, tiny_run
from tests.support.families import IDS, tiny

pytestmark = families.LISTED
Site = Callable[[Tensor], Tensor]


def pre_norm(layer: Any, h: Tensor, attend: Site, site: Site) -> Tensor:
    u = site(h + attend(layer.input_layernorm(h)))
    out = layer.mlp(layer.post_attention_layernorm(u))
    return u + (out[0] if isinstance(out, tuple) else out)  # GPT-OSS's experts also return their scores


def llama4(layer: Any, h: Tensor, attend: Site, site: Site) -> Tensor:
    u = site(h + attend(layer.input_layernorm(h)))
    out = layer.feed_forward(layer.post_attention_layernorm(u))
    return u + (out[0] if layer.is_moe_layer else out).view(u.shape)


def gemma2(layer: Any, h: Tensor, attend: Site, site: Site) -> Tensor:
    u = site(h + layer.post_attention_layernorm(attend(layer.input_layernorm(h))))
    return u + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(u)))


def olmo2(layer: Any, h: Tensor, attend: Site, site: Site) -> Tensor:
    u = site(h + layer.post_attention_layernorm(attend(h)))
    return u + layer.post_feedforward_layernorm(layer.mlp(u))


def glm4(layer: Any, h: Tensor, attend: Site, site: Site) -> Tensor:
    u = site(h + layer.post_self_attn_layernorm(attend(layer.input_layernorm(h))))
    return u + layer.post_mlp_layernorm(layer.mlp(layer.post_attention_layernorm(u)))


def granite(layer: Any, h: Tensor, attend: Site, site: Site) -> Tensor:
    u = site(h + attend(layer.input_layernorm(h)) * layer.residual_multiplier)
    return u + layer.mlp(layer.post_attention_layernorm(u)) * layer.residual_multiplier


def parallel(layer: Any, h: Tensor, attend: Site, site: Site) -> Tensor:
    normed = layer.input_layernorm(h)
    return site(h + attend(normed)) + layer.mlp(normed)


def doge(layer: Any, h: Tensor, attend: Site, site: Site) -> Tensor:
    attended = attend(layer.input_layernorm(h))
    u = site(layer.input_residual * h + attended)
    out = layer.mlp(layer.post_attention_layernorm(u))
    return layer.post_attention_residual * u + out


def post_norm(layer: Any, h: Tensor, attend: Site, site: Site) -> Tensor:
    n = layer.input_layernorm(h)
    attended = attend(n)  # first, for the order in which gradients are added
    u = layer.post_attention_layernorm(site(n * layer.attn_alpha_factor + attended * layer.attn_beta_factor))
    return u * layer.mlp_alpha_factor + layer.mlp(u) * layer.mlp_beta_factor


REFERENCES: dict[str, Callable[[Any, Tensor, Site, Site], Tensor]] = {
    **dict.fromkeys(("Llama", "Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Qwen3Next"), pre_norm),
    **dict.fromkeys(("Gemma2", "Gemma3"), gemma2),
    "Olmo2": olmo2,
    "Glm4": glm4,
    "Granite": granite,
    **dict.fromkeys(("Cohere2", "Phi"), parallel),
    "Doge": doge,
    "MiniMax": post_norm,
    "Llama4": llama4,
}
FIELDS = {"Granite": {"residual_multiplier": 0.3}, "MiniMax": {"full_attn_alpha_factor": 0.7}}


def reference(forward: Any, layer: Any, site: Site, hidden: Tensor, **kwargs: Any) -> Tensor:
    """The layer's forward with ``site`` in it."""

    def attend(x: Tensor) -> Tensor:
        if hasattr(layer, "linear_attn"):
            return layer.linear_attn(
                hidden_states=x, cache_params=kwargs["past_key_values"], attention_mask=kwargs["attention_mask"]
            )
        return layer.self_attn(hidden_states=x, **kwargs)[0]

    return forward(layer, hidden, attend, site)


def adapted(name: str, **changes: Any) -> ak.LlamaAdapter:
    llama = tiny(name, **changes)
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(4, "attention", layers=[1, len(llama.model.layers) - 1])).eval()
    families.draw(model)
    return model


@pytest.mark.parametrize("family", REFERENCES)
def test_it_is_between_attention_and_feed_forward(family: str) -> None:
    name, fields = f"{family}ForCausalLM", FIELDS.get(family, {})
    model, bare = adapted(name, **fields), tiny(name, **fields).requires_grad_(False)
    sites: Any = model.adapters["default"]
    for index in sites:
        layer = bare.model.layers[int(index)]
        layer.__dict__["forward"] = functools.partial(reference, REFERENCES[family], layer, sites[index])
    outcomes = []
    for llama in (model, bare):
        model.zero_grad()
        logits = llama(IDS, use_cache=False).logits
        logits.float().square().sum().backward()
        outcomes.append([logits.detach(), *(p.grad.clone() for p in model.adapter_parameters())])
    assert tiny_run.same_bits(*outcomes)
    assert all(gradient.any() for gradient in outcomes[0])

    with torch.no_grad():
        for p in model.adapter_parameters():
            p.zero_()
        nothing, own = (llama(IDS, use_cache=False).logits for llama in (model, tiny(name, **fields)))
    if family == "Phi":  # which sums in another order
        torch.testing.assert_close(nothing, own)
    else:
        assert torch.equal(nothing, own)


def by_hand(adapters: Any, residual: Tensor, x: Tensor) -> Tensor:
    """He et al. 2022, equation of a parallel adapter, with each adapter's own scale."""
    for a in adapters:
        residual = residual + a.scale * a.up(F.gelu(a.down(a.norm(x))))
    return residual


@pytest.mark.parametrize("family", ["Llama", "Granite", "Gemma2", "Cohere2"])
@pytest.mark.parametrize("position", ["parallel-attention", "parallel-mlp"])
def test_parallel_adapters(family: str, position: Any, tmp_path: Path) -> None:
    name, fields = f"{family}ForCausalLM", FIELDS.get(family, {})
    how: dict[str, Any] = {"depth": 2, "activation": "gelu", "scale": 0.5, "layer_norm": family != "Llama"}
    how |= {"learned_scale": family == "Granite"}
    model = ak.LlamaAdapter(tiny(name, **fields), ak.AdapterConfig(4, position, layers=[1, 3], **how)).eval()
    families.draw(model)
    model.set_scale(0.5)
    assert model.prefix_length == 1
    bare, sites = tiny(name, **fields).requires_grad_(False), model.adapters["default"]

    def forward(adapters: Any, layer: Any, hidden: Tensor, attend: Site, _: Site) -> Tensor:
        if position == "parallel-attention":
            return REFERENCES[family](layer, hidden, attend, lambda u: by_hand(adapters, u, hidden))
        between: list[Tensor] = []
        out = REFERENCES[family](layer, hidden, attend, lambda u: between.append(u) or u)
        return by_hand(adapters, out, between[0])

    for index, adapters in sites.items():
        layer = bare.model.layers[int(index)]
        layer.__dict__["forward"] = functools.partial(reference, functools.partial(forward, adapters), layer, None)
    outcomes = []
    for llama in (model, bare):
        model.zero_grad()
        logits = llama(IDS, use_cache=False).logits
        logits.float().square().mean().backward()
        outcomes.append([logits.detach(), *(p.grad.clone() for p in model.adapter_parameters())])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert all(gradient.any() for gradient in outcomes[0])
    model.save_pretrained(tmp_path)
    loaded = ak.LlamaAdapter.from_pretrained(tiny(name, **fields), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS, use_cache=False).logits, outcomes[0][0])
        for p in model.adapter_parameters():
            p.zero_()
        assert torch.equal(model(IDS).logits, tiny(name, **fields)(IDS).logits)


@torch.no_grad()
def test_a_batch_mixes_all_positions() -> None:
    """By name, with weights, and chosen from the stream; with one scale and with several."""
    model = ak.LlamaAdapter(tiny("LlamaForCausalLM"), None).eval()
    for number, position in enumerate(POSITIONS):
        for scale in (1.0, 0.25):
            name = f"{position} {scale}".replace(".", " ")
            model.add_adapter(name, ak.AdapterConfig(4, position, layers=[1, 2 + number % 2], scale=scale))
            families.draw(model, name)
    names = list(model.adapters)
    ids = IDS[:1].expand(len(names), -1)
    alone = []
    for name in names:
        model.set_adapter(name)
        alone.append(model(ids[:1]).logits[0])
    torch.testing.assert_close(list(model(ids, adapter_names=names).logits), alone)
    index = torch.arange(len(names))
    for given in (index, lambda x: (index[: len(x)], None)):
        with model.mixing(names, given):
            torch.testing.assert_close(list(model(ids).logits), alone)
    tokens = model.generate(ids, adapter_names=names, max_new_tokens=4, do_sample=False)
    for row, name in zip(tokens, names, strict=True):
        model.set_adapter(name)
        assert torch.equal(row, model.generate(ids[:1], max_new_tokens=4, do_sample=False)[0])


def test_what_parallel_adapters_cannot_do() -> None:
    with pytest.raises(ValueError, match="x_free: expected False with position='parallel-mlp'"):
        ak.AdapterConfig(position="parallel-mlp", x_free=True)
    with pytest.raises(ValueError, match="position: expected 'layer' for NemotronHBlock, got 'parallel-mlp', but no "):
        ak.LlamaAdapter(tiny("NemotronHForCausalLM"), ak.AdapterConfig(position="parallel-mlp"))


@pytest.mark.parametrize("family", ["Gemma2", "Cohere2"])
def test_what_layers_are_put_through(family: str) -> None:
    """Checkpointed, copied, pickled, mixed, with a cache, cut at the prefix, fused or not, and unloaded."""
    name = f"{family}ForCausalLM"
    model = adapted(name)
    logits, gradients = [], []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad.clone() for p in model.adapter_parameters()])
    assert tiny_run.same_bits(*gradients)
    model.gradient_checkpointing_disable()
    model.eval()
    with torch.no_grad():
        for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            logits.append(made(IDS).logits)
        assert tiny_run.same_bits(logits, logits[:1] * 3)
        model.fused = False
        torch.testing.assert_close(model(IDS).logits, logits[0])
        model.fused = True
        torch.testing.assert_close(model.run_suffix(model.run_prefix(IDS)), model.decoder(IDS).last_hidden_state)
        model.add_adapter("after", ak.AdapterConfig(adapter_dim=4, layers=[1]))
        families.draw(model, "after")
        mixed = model(IDS, adapter_names=["default", "after", "__base__"]).logits
        torch.testing.assert_close(mixed[0], logits[0][0])
        model.set_adapter("after")
        torch.testing.assert_close(mixed[1], model(IDS).logits[1])
        model.set_adapter("default")
        tokens = [model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)]
        assert torch.equal(*tokens)
        assert not torch.equal(tokens[0], tiny(name).generate(IDS, max_new_tokens=6, do_sample=False))
        assert torch.equal(model.unload()(IDS).logits, tiny(name)(IDS).logits)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("NemotronH", "no feed-forward network follows its attention"),
        ("StableLm", "it adds attention to the stream under a condition"),
        ("Gemma3n", "after attention it passes on laurel_output, predictions beside attn_gated"),
        ("LongcatFlash", "it runs self_attn more than once"),
    ],
)
def test_layers_without_such_a_place_are_refused(family: str, why: str) -> None:
    llama = tiny(f"{family}ForCausalLM")
    message = f"position: expected 'layer' for {type(llama.model.layers[0]).__name__}, got 'attention', but {why}"
    with pytest.raises(ValueError, match=message):
        ak.LlamaAdapter(llama, ak.AdapterConfig(position="attention"))
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(4))
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", ak.AdapterConfig(position="attention"))


def test_what_is_not_the_class_s_own_forward_is_not_cut() -> None:
    own = transformers.models.llama.modeling_llama.LlamaDecoderLayer

    class Wrapped(own):  # type: ignore[misc, valid-type]
        @torch.no_grad()
        def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
            return hidden_states

    class Delegates(own):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return super().forward(hidden_states, **kwargs)

    namespace: dict[str, Any] = {"nn": nn}
    exec("class NoSource(nn.Module):\n def forward(self, h, mask): return h", namespace)
    for cls, why in (
        (Wrapped, "its forward is wrapped by torch"),
        (Delegates, "its forward is not a plain method"),
        (namespace["NoSource"], "its forward has no source"),
    ):
        found = halves(cls)
        assert isinstance(found, NoSiteError)
        assert str(found) == why
