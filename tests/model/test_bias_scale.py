"""LLaMA-Adapter V2: bias and scale of linear layers, gates of heads, norms; its equations, and as an adapter."""

import copy
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import adapterkern as ak
from adapterkern.model.decoder import first_layers
from adapterkern.model.linears import BiasScale
from adapterkern.training.compiled import check_compile
from adapterkern.training.parallel.frozen import cast_once
from tests.support import families, tiny_run
from tests.support.runs import check_learned
from tests.support.tiny_llama import IDS, LEFT_PADDED, draw, grads, logits, tiny

V2: dict[str, Any] = {
    **{"kind": "prompt", "prompt_length": 5, "prompt_gate": "head", "layers": [1, 3], "bias_scale": True},
    "modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"],
}
BIASED = {"attention_bias": True, "mlp_bias": True}
WIDTHS = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 48, "up_proj": 48, "down_proj": 32}


def drawn(llama: Any = None, **config: Any) -> ak.LlamaAdapter:
    model = ak.LlamaAdapter(llama or tiny(), ak.AdapterConfig(**{"adapter_dim": 4, "layers": [1, 3]} | config))
    draw(model)
    draw_scales(model)
    return model.eval()


def draw_scales(model: ak.LlamaAdapter, name: str = "default") -> None:
    for module in model.adapters[name].modules():
        if isinstance(module, BiasScale):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.scale, 0.5, 1.5)


# The equation


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def by_hand(weights: dict[str, Tensor], learned: dict[str, Tensor], adapted: tuple[int, ...]) -> Tensor:
    """The logits of LLaMA with LLaMA-Adapter V2: 4 layers, 4 heads of 8 channels on 2 of keys."""
    length, size = IDS.shape[1], 8
    angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(name: str, x: Tensor) -> Tensor:
        return normed(x, learned[f"modules_to_save.model.{name}.weight"])

    def linear(layer: int, name: str, x: Tensor) -> Tensor:
        y = x @ weights[f"model.layers.{layer}.{name}.weight"].mT
        if layer not in adapted:
            return y
        bias, scale = (learned[f"bias_scale.{layer}.{name}.{what}"] for what in ("bias", "scale"))
        return scale * (y + bias)

    def heads(x: Tensor) -> Tensor:
        split = x.unflatten(-1, (-1, size)).transpose(-2, -3)
        return split.repeat_interleave(4 // split.shape[-3], -3)

    def rotated(x: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1) * sin

    h = weights["model.embed_tokens.weight"][IDS]
    for layer in range(4):
        x = norm(f"layers.{layer}.input_layernorm", h)
        q, k, v = (heads(linear(layer, f"self_attn.{name}_proj", x)) for name in "qkv")
        scores = rotated(q) @ rotated(k).mT / math.sqrt(size)
        out = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        if layer in adapted:
            prompt, gate = learned[f"{layer}.embeddings"], learned[f"{layer}.gate"]
            k_prompt, v_prompt = (heads(linear(layer, f"self_attn.{name}_proj", prompt)) for name in "kv")
            attended = (rotated(q) @ k_prompt.mT / math.sqrt(size)).softmax(-1) @ v_prompt
            out = out + gate[:, None, None] * attended
        h = h + linear(layer, "self_attn.o_proj", out.transpose(1, 2).flatten(2))
        x = norm(f"layers.{layer}.post_attention_layernorm", h)
        gated = nn.functional.silu(linear(layer, "mlp.gate_proj", x)) * linear(layer, "mlp.up_proj", x)
        h = h + linear(layer, "mlp.down_proj", gated)
    return norm("norm", h) @ weights["lm_head.weight"].mT


def test_is_llama_adapter_v2() -> None:
    """In fp32: logits, and the gradients of all that it learns. At the start it is the backbone, to the bit."""
    llama = tiny(initializer_range=0.1)
    bare, weights = logits(llama), dict(llama.state_dict())
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(**V2)).eval()
    assert torch.equal(logits(model), bare)
    draw_scales(model)
    for key, p in model.adapters["default"].named_parameters():
        if "bias_scale" not in key:
            nn.init.normal_(p, *((1, 0.1) if "norm" in key else (0, 1)))
    learned = dict(model.adapters["default"].named_parameters())
    per_layer = 5 * 32 + 4 + 2 * sum(WIDTHS.values())  # prompt, gates, bias and scale
    assert sum(p.numel() for p in learned.values()) == 2 * per_layer + 9 * 32
    got, expected = model(IDS).logits, by_hand(weights, learned, (1, 3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    weight = torch.linspace(-1, 1, got.numel()).view_as(got)
    found, right = (torch.autograd.grad((y * weight).sum(), list(learned.values())) for y in (got, expected))
    largest = max(gradient.abs().max().item() for gradient in right)
    for key, one, other in zip(learned, found, right, strict=True):
        assert other.any(), key
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * largest)


def folded(model: ak.LlamaAdapter, *names: str, sites: tuple[int, ...] = (1, 3)) -> Any:
    """Another backbone, whose own linear layers have these adapters' biases and scales in their weights."""
    llama = tiny(**BIASED)
    llama.load_state_dict(model.base.state_dict(), strict=False)
    with torch.no_grad():
        for p in (p for name, p in llama.named_parameters() if name.endswith("_proj.bias")):
            p.zero_()
        for name in names:
            for path, module in model.adapters[name]["bias_scale"].named_modules():
                if isinstance(module, BiasScale) and int(path.partition(".")[0]) in sites:
                    linear: Any = llama.get_submodule(f"model.layers.{path}")
                    linear.weight.mul_(module.scale[:, None])
                    linear.bias.add_(module.bias).mul_(module.scale)
    return llama


def without(model: ak.LlamaAdapter, llama: Any, *names: str) -> ak.LlamaAdapter:
    """These adapters on that backbone, without their biases and scales."""
    plain = ak.LlamaAdapter(llama, None)
    for name in names:
        plain.add_adapter(name, ak.AdapterConfig(adapter_dim=4, layers=[1, 3]))
        plain.adapters[name].load_state_dict(model.adapters[name].state_dict(), strict=False)
    plain.set_adapter(list(names))
    return plain.eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_scales_of_bottlenecks_of_stacks_and_of_skipped_sites() -> None:
    """Each as a backbone that has them in its weights; fused and not; and goes without a trace."""
    model = drawn(bias_scale=True)
    bare = logits(tiny())
    close(logits(model), expected := logits(without(model, folded(model, "default"), "default")))
    assert (expected - bare).abs().max() > 0.1
    model.fused = False
    close(logits(model), expected)
    model.fused = True
    model.add_adapter("second", ak.AdapterConfig(adapter_dim=4, layers=[1, 3], bias_scale=True))
    draw(model, "second")
    draw_scales(model, "second")
    close(logits(model), expected)
    model.set_adapter(["default", "second"])
    close(logits(model), logits(without(model, folded(model, "default", "second"), "default", "second")))
    model.set_adapter("default")
    with model.skipping(1):
        plain = without(model, folded(model, "default", sites=(3,)), "default")
        with plain.skipping(1):
            close(logits(model), logits(plain))
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    changed = logits(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model.reference("default")):
        assert torch.equal(logits(other), changed)
    assert torch.equal(logits(model.reference()), bare)
    twin = copy.deepcopy(model)
    twin.delete_adapter("default")
    assert torch.equal(logits(model), changed)
    model.delete_adapter("default")
    model.set_adapter("second")  # which keeps its own
    assert not torch.allclose(logits(model), bare, atol=0.1)
    for one in (model, twin):
        one.delete_adapter("second")
        assert torch.equal(logits(one), bare)
        assert [type(module) for module in one.unload().modules()] == [type(module) for module in tiny().modules()]


def test_a_student_of_the_first_layers_leaves_its_teacher_alone() -> None:
    llama = tiny()
    bare = logits(llama)
    drawn(first_layers(llama, 2), layers=[0, 1], bias_scale=True)
    assert torch.equal(logits(llama), bare)


def test_only_layers_with_sites_change() -> None:
    """So that those below are a prefix that can be cached; and gradient checkpointing gives the same bits."""
    model = drawn(bias_scale=True)
    assert model.prefix_length == 1  # the first site's own layer is not below it
    with torch.no_grad():
        whole = model.decoder(input_ids=IDS, attention_mask=LEFT_PADDED, use_cache=False).last_hidden_state
        prefix = model.run_prefix(IDS, LEFT_PADDED)
        torch.testing.assert_close(model.run_suffix(prefix, LEFT_PADDED), whole)
    expected = grads(model)
    model.gradient_checkpointing_enable()
    assert tiny_run.same_bits(grads(model.train()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_near_one_counts_in_16_bits(dtype: torch.dtype) -> None:
    """And the backward keeps the linear layer's result as it is."""
    module, out = BiasScale(64), torch.randn(8, 64).to(dtype).requires_grad_()
    nn.init.constant_(module.scale, 1 + 2**-10)
    nn.init.constant_(module.bias, 0.25)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(out)
    right = module.scale.double() * (out.double() + module.bias.double())
    assert y.dtype == dtype
    assert torch.equal(y, right.to(dtype))
    assert [t.dtype for t in kept if t.numel() > 64] == [dtype]
    y.sum().backward()
    torch.testing.assert_close(module.bias.grad, torch.full((64,), 8 * (1 + 2**-10)))
    torch.testing.assert_close(module.scale.grad, (out.float() + 0.25).sum(0).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_linear_layers_of_quantized_weights(kind: str, tmp_path: Path) -> None:
    """Each gives s · (W·x + b) of what it gave, and its scale gets a gradient."""
    tiny(initializer_range=0.2).save_pretrained(tmp_path)
    llama: Any
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        llama = LlamaForCausalLM.from_pretrained(tmp_path)
        quantization.quantize_(llama.model, quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "nf4" else {"load_in_8bit": True}
        llama = LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32, device_map="cpu"
        )
    model = drawn(llama, bias_scale=True)
    assert len([m for m in model.adapters["default"].modules() if isinstance(m, BiasScale)]) == 2 * len(WIDTHS)
    x = torch.randn(2, 3, 32)
    linear: Any = model.layers[1].self_attn.k_proj
    learned: Any = model.adapters["default"]["bias_scale"]
    learned = learned.get_submodule("1.self_attn.k_proj")
    with torch.no_grad():
        got = linear(x)
        with model.disable_adapter():
            torch.testing.assert_close(got, learned.scale * (linear(x) + learned.bias))
    assert all(g.any() for g in grads(model))


def test_frozen_weights_are_cast_once_for_autocast() -> None:
    model, linear = drawn(bias_scale=True), "model.layers.1.self_attn.q_proj"
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
        with cast_once(model.base):
            assert torch.equal(logits(model), expected)
            assert vars(model.base.get_submodule(linear))["_cast_copies"]
        assert torch.equal(logits(model), expected)


# As part of an adapter


def test_trains_resumes_saves_and_loads(tmp_path: Path) -> None:
    """With the prefix cached; its vectors do not decay; and mixtures of gates of heads are each row's own."""
    fields = {key: value for key, value in V2.items() if key != "modules_to_save"} | {"adapter_dim": 64}
    model, run = check_learned(tmp_path / "run", **fields)
    saved = load_file(tmp_path / "run" / "adapterkern.safetensors")
    assert saved["bias_scale.1.mlp.down_proj.scale"].shape == saved["bias_scale.1.mlp.down_proj.bias"].shape == (32,)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "y = s · (W · x + b) in each linear layer of these layers" in card
    assert f"{sum(p.numel() for p in model.adapter_parameters()):,} parameters" in card
    with pytest.raises(ValueError, match=r"the run was begun with bias_scale=True, not False"):
        run(tiny_run.model(**fields | {"bias_scale": False}), resume=True)
    small = tiny(num_hidden_layers=4, intermediate_size=40)
    with pytest.raises(ValueError, match=r"bias_scale\.1\.mlp\.\w+\.\w+: expected \(40,\) of floating point"):
        ak.LlamaAdapter.from_pretrained(small, tmp_path / "run")


def test_gates_of_heads_mix_and_go_to_peft_if_they_are_equal(tmp_path: Path) -> None:
    model = drawn(kind="prompt", prompt_length=3, prompt_gate="head", layers=[2, 3], adapter_dim=64)
    model.add_adapter("other", ak.AdapterConfig(kind="prompt", prompt_length=3, layers=[2, 3]))
    draw(model, "other")
    names = ["other", "default", "__base__"]
    with torch.no_grad():
        mixed = model(IDS, adapter_names=names).logits
        for row, name in enumerate(names[:2]):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row : row + 1], model(IDS[row : row + 1]).logits)
        model.set_adapter("default")
        with pytest.raises(ValueError, match=r"prompt_gate: expected one gate for each layer .* differ at layer 2"):
            model.save_peft(tmp_path)
        for layer in ("2", "3"):
            gate: Any = model.adapters["default"][layer].gate
            gate.fill_(0.5)
        model.save_peft(tmp_path)
        assert torch.equal(logits(ak.LlamaAdapter.from_peft(tiny(), tmp_path).eval()), logits(model))


# Sizes and refusals


@pytest.mark.parametrize(
    ("fields", "size", "beside"),
    [
        ({"kind": "prompt", "prompt_gate": "head", "bias_scale": True}, ("prompt_length", 32, 1), 448 + 3),
        ({"bias_scale": True}, ("adapter_dim", 65, 96), 448),
    ],
)
def test_a_budget_counts_them(fields: dict[str, Any], size: tuple[str, int, int], beside: int) -> None:
    name, each, rest = size
    count = 2 * (beside + rest + 3 * each)
    model = ak.LlamaAdapter(tiny(), ak.AdapterConfig(layers=[1, 3], max_params=count + 1, **fields))
    assert getattr(model.adapter_config(), name) == 3
    assert model.get_nb_trainable_parameters()[0] == count
    with pytest.raises(ValueError, match=f"max_params: expected at least {2 * (beside + rest + each):,}, .* got 900"):
        ak.LlamaAdapter(tiny(), ak.AdapterConfig(layers=[1, 3], max_params=900, **fields))


def test_what_they_do_not_go_with_is_refused(tmp_path: Path) -> None:
    model = drawn(bias_scale=True, modules_to_save=["input_layernorm"])
    model.add_adapter("plain", ak.AdapterConfig(adapter_dim=4))
    for refused, message in (
        (lambda: ak.AdapterConfig(bias_scale=True, text_only=True), "bias_scale: expected False with text_only=True"),
        (lambda: ak.AdapterConfig(prompt_gate="head"), "prompt_gate: expected 'layer' with kind='bottleneck'"),
        (
            lambda: model(IDS, adapter_names=["default", "plain", "plain"]),
            "bias_scale: expected False .* mixed .* True",
        ),
        (lambda: model.save_adapterhub(tmp_path), "bias_scale: expected False for AdapterHub's adapters, got True"),
        (
            lambda: check_compile(drawn(bias_scale=True)),
            r"compile: expected frozen layers, got layer 1 with bias and scale \(bias_scale\) of an adapter",
        ),
        (
            lambda: model.add_adapter("more", ak.AdapterConfig(modules_to_save=["self_attn"])),
            "modules_to_save: expected no linear layer that learns bias and scale, got 'model.layers.1.self_attn'",
        ),
        (
            lambda: ak.LlamaAdapter(tiny(), ak.AdapterConfig(bias_scale=True, modules_to_save=["q_proj"])),
            "modules_to_save: expected no linear layer that is to learn bias and scale, got 'self_attn.q_proj'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    with pytest.raises(NotImplementedError, match="merge_and_unload"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="bias_scale: expected None for PEFT's AdaptionPrompt, got True"):
        drawn(kind="prompt", layers=[2, 3], adapter_dim=64, bias_scale=True).save_peft(tmp_path)
    assert list(model.adapters) == ["default", "plain"]


def test_names_what_gets_none(caplog: pytest.LogCaptureFixture) -> None:
    """A router may derive from a linear layer, and another module may read a linear layer's weights."""
    with caplog.at_level(logging.WARNING):
        for name in ("Llama4ForCausalLM", "LongcatFlashForCausalLM"):
            llama = families.tiny(name)
            bare = logits(llama)
            assert torch.equal(logits(ak.LlamaAdapter(llama, ak.AdapterConfig(bias_scale=True)).eval()), bare)
    first, *_, last = (record.message for record in caplog.records if record.message.startswith("bias_scale"))
    assert "feed_forward.experts (Llama4TextExperts), feed_forward.router (Llama4Router): no linear layer" in first
    assert "mlp.router.classifier (Linear): not run for a few tokens" in last
