"""Adapters on quantized backbones: adapters keep fp32, the backbone its bytes, the residual stream its dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import adapterkern as ak

IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone in fp32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1))
    path = tmp_path_factory.mktemp("backbone")
    llama.save_pretrained(path)
    return path


def nf4(saved: Path, dtype: torch.dtype) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return LlamaForCausalLM.from_pretrained(saved, quantization_config=how, dtype=dtype, device_map="cpu")


def int8(saved: Path, dtype: torch.dtype) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    how = BitsAndBytesConfig(load_in_8bit=True)
    return LlamaForCausalLM.from_pretrained(saved, quantization_config=how, dtype=dtype, device_map="cpu")


def weight_only(saved: Path, dtype: torch.dtype) -> Any:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    llama = LlamaForCausalLM.from_pretrained(saved, dtype=dtype)
    quantize_(llama.model, Int8WeightOnlyConfig())
    return llama


def values(module: torch.nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weights (out, in) that a layer represents."""
    if type(module) is torch.nn.Linear:
        return module.weight if type(module.weight) is torch.nn.Parameter else module.weight.dequantize()
    return module(torch.eye(module.in_features, dtype=dtype)).T


def raw(weight: Any) -> Tensor:
    """A weight's bytes; for a torchao tensor its dequantized values."""
    return weight.data if hasattr(weight, "quant_state") or hasattr(weight, "SCB") else weight.dequantize()


def plain(llama: Any, saved: Path, dtype: torch.dtype) -> Any:
    """The same backbone with ordinary weights that have the same values."""
    copy = LlamaForCausalLM.from_pretrained(saved, dtype=dtype)
    with torch.no_grad():
        for name, module in copy.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(values(llama.get_submodule(name), dtype))
    return copy


def adapted(llama: Any) -> ak.LlamaAdapter:
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=8))
    torch.manual_seed(0)
    for p in model.adapter_parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def grads(model: ak.LlamaAdapter) -> list[Tensor]:
    model(IDS, labels=IDS).loss.backward()
    return [p.grad.clone() for p in model.adapter_parameters()]


# The bound is on ‖difference‖/‖gradient‖ against the dequantized weights: int8 also quantizes its input, and
# bf16 rounds.
CASES = [
    (nf4, torch.float32, 1e-5),
    (nf4, torch.bfloat16, 3e-2),
    (int8, torch.float32, 3e-2),
    (weight_only, torch.float32, 1e-5),
    (weight_only, torch.bfloat16, 3e-2),
]


@pytest.mark.parametrize(("quantize", "dtype", "tolerance"), CASES)
def test_learns_on_a_quantized_backbone(saved: Path, quantize: Any, dtype: torch.dtype, tolerance: float) -> None:
    llama = quantize(saved, dtype)
    weight = llama.model.layers[0].mlp.up_proj.weight
    before = raw(weight).clone()
    with torch.no_grad():
        llama.eval()(IDS)
    model = adapted(llama)
    with torch.no_grad(), model.disable_adapter():
        bare = model(IDS).logits
    assert {p.dtype for p in model.adapter_parameters()} == {torch.float32}
    states = model.decoder(IDS, output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {dtype}

    expected = grads(adapted(plain(llama, saved, dtype)))
    for got, other in zip(grads(model), expected, strict=True):
        assert (got - other).norm() <= tolerance * other.norm() + 1e-8

    optimizer = ak.ClippedAdamW(model.adapter_parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert torch.equal(raw(weight), before)
    with torch.no_grad():
        assert torch.equal(model.unload()(IDS).logits, bare)


def test_trainer_takes_it_and_its_adapter_fits_the_full_backbone(saved: Path, tmp_path: Path) -> None:
    """Trainer refuses a quantized model without added parameters."""
    model = adapted(nf4(saved, torch.float32))
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    how = {"output_dir": str(tmp_path), "max_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    transformers.Trainer(model, transformers.TrainingArguments(**how), train_dataset=rows).train()
    model.save_pretrained(tmp_path / "adapter")
    full = ak.LlamaAdapter.from_pretrained(LlamaForCausalLM.from_pretrained(saved), tmp_path / "adapter")
    for p, q in zip(model.adapter_parameters(), full.adapter_parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("quantize", "dtype"), [case[:2] for case in CASES[::2]])
def test_a_reference_shares_the_quantized_weights(saved: Path, quantize: Any, dtype: torch.dtype) -> None:
    model = adapted(quantize(saved, dtype)).eval()
    with torch.no_grad():
        on = model(IDS).logits
        with model.disable_adapter():
            off = model(IDS).logits
        for reference, expected in ((model.reference(), off), (model.reference("default"), on)):
            assert torch.equal(reference(IDS).logits, expected)
            assert {id(p) for p in model.base.parameters()} <= {id(p) for p in reference.parameters()}
