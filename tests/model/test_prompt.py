"""Gated prompts: what their equation says, on attentions of several kinds, equal to PEFT's, and as adapters."""

import copy
import gc
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

import adapterkern as ak
from adapterkern.model import low_rank, prompt
from adapterkern.model.prompt import PromptedAttention
from adapterkern.training.compiled import check_compile
from tests.support import families, tiny_run
from tests.support.runs import check_learned
from tests.support.tiny_llama import IDS, LEFT_PADDED, draw, grads, logits, tiny

PROMPT: dict[str, Any] = {"kind": "prompt", "prompt_length": 5, "layers": [1, 3]}


def prompted(llama: Any = None, **config: Any) -> ak.LlamaAdapter:
    """With open gates, of both signs."""
    model = ak.LlamaAdapter(llama or tiny(), ak.AdapterConfig(**PROMPT | config))
    draw_open(model)
    return model.eval()


def draw_open(model: ak.LlamaAdapter, name: str | None = None) -> None:
    for p in model.adapter_parameters(name):
        nn.init.normal_(p, std=2.0)


# The equation


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


def heads_of(attention: Any, x: Tensor) -> list[Tensor]:
    """q, k and v (B, heads, L, head_dim), before RoPE."""
    if hasattr(attention, "qkv_proj"):
        sizes = [attention.head_dim * n for n in (4, 2, 2)]
        parts = attention.qkv_proj(x).split(sizes, -1)
    else:
        parts = [getattr(attention, f"{name}_proj")(x) for name in "qkv"]
    split = [part.unflatten(-1, (-1, attention.head_dim)) for part in parts]
    for place, name in enumerate(("q_norm", "k_norm")):
        split[place] = getattr(attention, name, nn.Identity())(split[place])
    return [part.transpose(1, 2) for part in split]


def by_hand(attention: Any, prompt: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """The attention's output: every step written out, for causal attention of 4 heads on 2 of keys."""
    q, k, v = heads_of(attention, hidden)
    q, k = rotated(q, *rotation), rotated(k, *rotation)
    _, k_prompt, v_prompt = heads_of(attention, prompt.embeddings[None])
    scale, length = 1 / math.sqrt(attention.head_dim), hidden.shape[1]
    outputs = []
    for head in range(4):
        scores = scale * q[:, head] @ k[:, head // 2].mT
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        out = scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, head // 2]
        gated = (scale * q[:, head] @ k_prompt[:, head // 2].mT).softmax(-1) @ v_prompt[:, head // 2]
        outputs.append(out + prompt.gate * gated)
    result: Tensor = attention.o_proj(torch.cat(outputs, -1))
    return result


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi3"])  # plain; with norms of q and k; with one projection
def test_computes_its_equation(family: str, attn: str) -> None:
    """In fp64, with grouped queries: output and gradients of each attention."""
    model = prompted(tiny(family, attn_implementation=attn)).double()
    seen: dict[int, tuple[Any, Tensor]] = {}
    for index in (1, 3):
        attention = model.layers[index].self_attn

        def keep(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            seen[index] = kwargs, output[0]

        attention.register_forward_hook(keep, with_kwargs=True)
    model(IDS)
    for index, (given, output) in seen.items():
        prompt: Any = model.adapters["default"][str(index)]
        attention = model.layers[index].self_attn
        with model.disable_adapter():  # by hand it is
            expected = by_hand(attention, prompt, given["hidden_states"], given["position_embeddings"])
        loose = 1 if attn == "sdpa" else 1e5  # eager's softmax is in fp32
        torch.testing.assert_close(output, expected, rtol=1e-11 * loose, atol=1e-13 * loose)
        weight = torch.linspace(-1, 1, output.numel()).view_as(output).double()
        parameters = [prompt.embeddings, prompt.gate]
        got, right = (
            torch.autograd.grad((o * weight).sum(), parameters, retain_graph=True) for o in (output, expected)
        )
        torch.testing.assert_close(got, right, rtol=1e-10 * loose, atol=1e-12 * loose)
        assert all(gradient.any() for gradient in got)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_is_peft_s_adaption_prompt(family: str, tmp_path: Path) -> None:
    """Output, gradients and generated tokens; and through files, both ways."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = prompted(tiny(family), layers=[-2, -1])
    model.save_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(model), logits(tiny(family)), atol=1e-3)
    theirs(input_ids=IDS, attention_mask=LEFT_PADDED, labels=IDS).loss.backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    prompt = "base_model.model.model.layers.{}.self_attn.adaption_{}"
    expected = [
        g for i in (2, 3) for g in (gradients[prompt.format(i, "prompt")][0], gradients[prompt.format(i, "gate")])
    ]
    torch.testing.assert_close(grads(model), expected, rtol=1e-5, atol=1e-7)
    told = {"attention_mask": LEFT_PADDED, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **told), theirs.generate(input_ids=IDS, **told))

    theirs.save_pretrained(tmp_path / "theirs")
    again = ak.LlamaAdapter.from_peft(tiny(family), tmp_path / "theirs").eval()
    assert torch.equal(logits(again), logits(model))
    assert again.adapter_config() == model.adapter_config()


# As an adapter


def test_starts_unchanged_and_goes_without_a_trace() -> None:
    llama = tiny()
    before, classes = logits(llama), [type(module) for module in llama.modules()]
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(**PROMPT))
    assert torch.equal(logits(model), before)
    assert [tuple(p.shape) for p in model.adapter_parameters()] == [(5, 32), (1,)] * 2
    assert model.get_nb_trainable_parameters()[0] == 2 * (5 * 32 + 1) == model.adapter_config().num_params(32, 4)
    assert model.prefix_length == 1
    draw_open(model)
    changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    with torch.no_grad(), model.skipping(1):
        skipped = logits(model)
        gate: Any = model.adapters["default"]["1"].gate
        open_gate = gate.clone()
        gate.zero_()
    assert torch.equal(logits(model), skipped)
    with torch.no_grad():
        gate.copy_(open_gate)
    model.add_adapter("other", ak.AdapterConfig(kind="prompt", layers=[1]))
    model.delete_adapter("other")
    assert torch.equal(logits(model), changed)
    assert torch.equal(logits(model.reference()), before)
    assert torch.equal(logits(model.reference("default")), changed)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(other), changed)
    assert copy.deepcopy(model.layers[1].self_attn.config).hidden_size == 32
    model.delete_adapter("default")
    assert torch.equal(logits(model), before)
    assert [type(module) for module in model.unload().modules()] == classes


@pytest.mark.parametrize("scaled", [False, True])
def test_keys_are_kept_with_the_cache_of_a_text_until_something_changes(
    scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, make = prompted(bias_scale=scaled), [], PromptedAttention._keys_and_values
    monkeypatch.setattr(
        PromptedAttention, "_keys_and_values", lambda self, *given: calls.append(self) or make(self, *given)
    )
    told = {"max_new_tokens": 6, "do_sample": False, "attention_mask": LEFT_PADDED}
    tokens = model.generate(IDS, **told)
    assert len(calls) == 2  # once for each layer
    assert torch.equal(model.generate(IDS, use_cache=False, **told), tokens)
    assert len(calls) == 2 + 2 * 6

    def following(cache: Any) -> Tensor:
        """The logits of one more token, on a copy of the KV cache."""
        with torch.no_grad():
            return model(IDS[:, -1:], past_key_values=cache).logits

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    del calls[:]
    before = following(cache)
    assert not calls
    for changed in (
        model.adapter_parameters()[0],
        model.get_parameter("base.model.layers.1.self_attn.v_proj.weight"),
        model.adapter_parameters()[-1],
    ):
        cache.crop(-1)
        with torch.no_grad():
            changed.mul_(1.5)
        after = following(cache)
        cache.crop(-1)
        prompt._kept.clear()
        assert torch.equal(following(cache), after)  # made anew
        assert not torch.equal(after, before)
        before = after
    cache.crop(-1)
    model(IDS[:, -1:], past_key_values=cache).logits.sum().backward()
    assert all(p.grad is not None for p in model.adapter_parameters())
    del cache
    gc.collect()
    assert not prompt._kept


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
def test_compiles_to_one_graph(scaled: bool) -> None:
    model = prompted(bias_scale=scaled)
    with torch.no_grad():
        whole = torch.compile(model.decoder, backend="eager", fullgraph=True)
        hidden = whole(IDS, attention_mask=LEFT_PADDED).last_hidden_state
        assert torch.equal(hidden, model.decoder(IDS, attention_mask=LEFT_PADDED).last_hidden_state)


def test_recomputed_layers_give_the_same_gradients() -> None:
    model = prompted()
    expected = grads(model)
    model.gradient_checkpointing_enable()
    assert tiny_run.same_bits(grads(model.train()), expected)


def test_a_batch_mixes_prompts_and_bottlenecks() -> None:
    """Each row, its gradients and what is generated for it, as alone; weights are those of gates."""
    configs: dict[str, dict[str, Any]] = {
        "long": {"prompt_length": 7, "layers": [1, 2]},
        "other": {"layers": [1, 3]},
        "plain": {"kind": "bottleneck", "prompt_length": 10, "adapter_dim": 4, "layers": [1, 3]},
    }
    model = prompted().double()
    for name, config in configs.items():
        model.add_adapter(name, ak.AdapterConfig(**PROMPT | config))
        draw_open(model, name) if name != "plain" else draw(model, name)
    model.double().eval()
    names = ["other", "plain", "long", "default", "__base__", "default"]
    ids = torch.cat([IDS, IDS])
    told = {"max_new_tokens": 3, "do_sample": False, "use_cache": True}
    mixed, generated = model(ids, adapter_names=names).logits, model.generate(ids, adapter_names=names, **told)
    mixed.square().sum().backward()
    found = {name: [p.grad.clone() for p in model.adapter_parameters(name)] for name in model.adapters}
    model.zero_grad()
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else torch.enable_grad():
            alone = model(ids[row : row + 1]).logits
            tokens = model.generate(ids[row : row + 1], **told)[0]
        assert torch.equal(tokens, generated[row, : len(tokens)])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-10, atol=1e-12)
        if name != "__base__":
            alone.square().sum().backward()
    for name in model.adapters:
        torch.testing.assert_close(found[name], [p.grad for p in model.adapter_parameters(name)], rtol=1e-9, atol=1e-11)

    index, weight = torch.tensor([[0, 1]]), torch.tensor([[0.25, -2.0]], dtype=torch.float64)
    with torch.no_grad():
        with model.mixing(["default", "other"], index, weight):
            two = model(ids[:1]).logits
        for name, factor in (("default", 0.25), ("other", -2.0)):
            for gate in model.adapter_parameters(name)[1::2]:
                gate.mul_(factor)
        with model.mixing(["default", "other"], index):
            torch.testing.assert_close(two, model(ids[:1]).logits, rtol=1e-10, atol=1e-12)


def test_trains_resumes_saves_and_loads(tmp_path: Path) -> None:
    """With the layers below the first prompt cached, and the embeddings of new tokens beside it in another run."""
    fields = PROMPT | {"adapter_dim": 64}
    _, run = check_learned(tmp_path / "run", **fields)
    with pytest.raises(ValueError, match=r"the run was begun with .*, not"):
        run(tiny_run.model(), resume=True)

    both = tiny_run.model(**fields, modules_to_save=["embed_tokens"])
    both.save_pretrained(tmp_path / "both")
    again = ak.LlamaAdapter.from_pretrained(tiny_run.model().unload(), tmp_path / "both")
    assert tiny_run.same_bits(tiny_run.weights(again), tiny_run.weights(both))
    assert both.prefix_length == 0


# Sizes and refusals


def test_a_budget_decides_the_length(caplog: pytest.LogCaptureFixture) -> None:
    config = ak.AdapterConfig(kind="prompt", every=2, max_params=1000).resolve(32, 4)
    assert (config.prompt_length, config.num_params(32, 4)) == (15, 2 * (15 * 32 + 1))
    assert "max_params=1,000: chose prompt_length=15, 962 parameters in 2 prompts" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "prefix"}, "kind: expected one of bottleneck, prompt, got 'prefix'"),
        ({"kind": "prompt", "adapter_dim": 8}, "adapter_dim: expected 64 with kind='prompt', .* got 8"),
        ({"kind": "prompt", "position": "attention"}, "position: expected 'layer' with kind='prompt'"),
        ({"kind": "prompt", "depth": 2}, "depth: expected 1 with kind='prompt'"),
        ({"kind": "prompt", "init": "svd"}, "init: expected 'identity' with kind='prompt'"),
        ({"kind": "prompt", "eps": 1e-6}, "eps: expected 1e-05 with kind='prompt'"),
        ({"kind": "prompt", "x_free": True}, "x_free: expected False with kind='prompt'"),
        ({"prompt_length": 4}, "prompt_length: expected 10 with kind='bottleneck', .* got 4"),
        ({"kind": "prompt", "prompt_length": 1025}, "prompt_length: expected an integer from 1 to 1024, got 1025"),
        (
            {"kind": "prompt", "prompt_length": 4, "max_params": 9},
            "max_params: expected max_params or prompt_length, not both: a budget decides the length",
        ),
    ],
)
def test_fields_of_another_kind_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ak.AdapterConfig(**fields)


def test_a_budget_for_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="max_params: expected at least 132, the size of 4 prompts of prompt_length=1"):
        ak.LlamaAdapter(tiny(), ak.AdapterConfig(kind="prompt", max_params=131))


class Deaf(modeling_llama.LlamaAttention):
    """Asks for its function, and does not pass on what it does not know."""

    __module__ = modeling_llama.__name__

    def forward(self, *args: Any, gated_prompt: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_backbones_that_run_no_prompt_are_refused_and_left_as_they_were() -> None:
    deaf = tiny()
    for layer in deaf.model.layers:
        layer.self_attn.__class__ = Deaf
    asks = "kind: .*expected an attention that asks for its function by its configuration"
    for llama, message in (
        (deaf, f"{asks}, and passes on what it does not know for 'prompt', got Deaf"),
        (families.tiny("XGLMForCausalLM"), f"{asks} for 'prompt', got XGLMAttention"),
        (
            families.tiny("Qwen3NextForCausalLM"),
            "kind: expected layers .* name those that have it by layers",
        ),
    ):
        classes = [type(module) for module in llama.modules()]
        model = ak.LlamaAdapter(llama, None)
        with pytest.raises(ValueError, match=message):
            model.add_adapter("default", ak.AdapterConfig(kind="prompt"))
        assert not model.adapters
        assert [type(module) for module in model.unload().modules()] == classes


def test_what_prompts_do_not_go_with_is_refused(tmp_path: Path) -> None:
    model = prompted()
    for refused, message in (
        (lambda: model.save_adapterhub(tmp_path), "kind: expected bottleneck for AdapterHub's adapters, got prompt"),
        (lambda: low_rank.init_from_weights(model, {1: torch.eye(32)}), "kind: expected 'bottleneck' .* matrices"),
        (lambda: model.mixing(["default"], lambda x: (IDS, None)), "kind: expected 'bottleneck' .* a router chooses"),
        (lambda: check_compile(model), "compile: expected frozen layers, got layer 1 with gated prompts"),
        (
            lambda: model.add_adapter("more", ak.AdapterConfig(layers=[0], modules_to_save=["self_attn"])),
            r"modules_to_save: expected no attention that runs gated prompts, got 'model.layers.1.self_attn'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    copies = ak.LlamaAdapter(tiny(), ak.AdapterConfig(layers=[0], modules_to_save=["self_attn"]))
    with pytest.raises(ValueError, match="modules_to_save: expected no LlamaAttention that is to run gated prompts"):
        copies.add_adapter("prompts", ak.AdapterConfig(**PROMPT))
    assert list(copies.adapters) == ["default"]
    assert list(model.adapters) == ["default"]
    model.add_adapter("first", ak.AdapterConfig(**PROMPT | {"layers": [0]}))  # whose attention is no copy's


def test_accelerate_s_hooks_run_the_prompts(caplog: pytest.LogCaptureFixture) -> None:
    """Weights that are loaded for each call, attached before and after the adapter."""
    accelerate = pytest.importorskip("accelerate")
    expected = logits(prompted())
    hooked = accelerate.cpu_offload(tiny(), execution_device="cpu")
    with caplog.at_level(logging.ERROR):
        model = prompted(hooked)
        assert torch.equal(logits(model), expected)
    late = prompted()
    accelerate.cpu_offload(late.base, execution_device="cpu")
    assert torch.equal(logits(late), expected)
