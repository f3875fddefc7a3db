"""What an adapter adds: its scale, with and without LayerNorm, to x or to a residual; built, saved, mixed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkern as ak
from adapterkern import cli
from adapterkern.model.config import adapter_num_params
from adapterkern.ops import operator
from adapterkern.training.run.matching import check_adapter
from adapterkern.training.run.results import CheckpointError
from tests.support.numerics import relative_error
from tests.support.tiny_llama import IDS, LEFT_PADDED, adapted, grads, logits, mixed

ALL: dict[str, Any] = {"layer_norm": False, "scale": 2.5, "learned_scale": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [{}, {"scale": 0.3}, {"layer_norm": False}, ALL], ids=str)
def test_the_operator_and_the_modules_agree(
    parts: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "prefers_eager", lambda *_: False)  # such small inputs as these
    module = ak.Adapter(32, 8, init="xavier", **parts)
    x, residual, dy = torch.randn(3, 2, 5, 32).to(dtype)

    def run(fused: bool, module: ak.Adapter = module, low: torch.dtype = dtype) -> list[Tensor]:
        module.fused = fused
        leaves = [t.detach().to(low, copy=True).requires_grad_() for t in (x, residual)]
        y = module(*leaves)
        return [y, *torch.autograd.grad(y, [*leaves, *module.parameters()], dy.to(low))]

    exact = run(False, copy.deepcopy(module).double(), torch.float64)
    for fused, stock, true in zip(run(True), run(False), exact, strict=True):
        assert fused.dtype == stock.dtype
        assert relative_error(fused, true) <= 8 * torch.finfo(dtype).eps
    scale = float(torch.as_tensor(module.scale).detach())
    by_hand = residual + scale * module.up(torch.nn.functional.silu(module.down(module.norm(x.float()))))
    assert relative_error(run(True)[0], by_hand) <= 2 * torch.finfo(dtype).eps


def test_parts_of_a_module() -> None:
    assert not [name for name, _ in ak.Adapter(8, 2, layer_norm=False).named_parameters() if "norm" in name]
    learned = ak.Adapter(8, 2, scale=2, learned_scale=True, dtype=torch.bfloat16)
    assert (learned.scale.shape, learned.scale.dtype, learned.scale.item()) == ((1,), torch.float32, 2.0)
    learned.set_scale(3)
    assert learned.state_dict()["scale"].item() == 3
    assert "learned scale" in repr(learned)
    plain = ak.Adapter(8, 2)
    assert "scale" not in repr(plain)
    plain.scale = 0.5
    assert "scale=0.5" in repr(plain)
    count = sum(p.numel() for p in ak.Adapter(40, 7, **ALL).parameters())
    assert count == adapter_num_params(40, 7, layer_norm=False, learned_scale=True)
    with pytest.raises(ValueError, match="x_free: expected False with a residual"):
        ak.Adapter(8, 2, x_free=True)(torch.ones(2, 8), torch.ones(2, 8))


@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_scaled_model_is_one_of_scaled_weights(layer_norm: bool) -> None:
    plain = adapted(layer_norm=layer_norm)
    for learned in (False, True):
        model = adapted(layer_norm=layer_norm, scale=2.5, learned_scale=learned)
        for key, p in model.adapters.named_parameters():
            if not key.endswith("scale"):
                divided = plain.adapters.get_parameter(key).detach() / (2.5 if ".up." in key else 1)
                p.data.copy_(divided)
        model.set_scale(2.5)
        torch.testing.assert_close(logits(model), logits(plain))
    assert len(grads(model)) == len(grads(plain)) + 2  # a scale at each site
    assert model.adapter_config().num_params(32, 4) == sum(p.numel() for p in model.adapter_parameters())


def test_a_scale_is_saved_where_it_is_set(tmp_path: Path) -> None:
    model = adapted(**ALL, layers=[2])
    model.save_pretrained(tmp_path / "learned")
    model.set_scale(-1)
    loaded = ak.LlamaAdapter.from_pretrained(adapted().unload(), tmp_path / "learned")
    saved = json.loads((tmp_path / "learned" / "adapterkern.json").read_text())["adapter"]
    assert {name: saved[name] for name in ALL} == ALL
    assert loaded.adapters["default"]["2"][0].scale.item() != -1

    fixed = adapted(scale=2.0)
    expected = logits(fixed)
    fixed.set_scale(0.0)
    torch.testing.assert_close(logits(fixed), logits(fixed.base))
    fixed.set_scale(4.0)
    fixed.save_pretrained(tmp_path / "fixed")
    loaded = ak.LlamaAdapter.from_pretrained(adapted().unload(), tmp_path / "fixed")
    assert torch.equal(logits(loaded), logits(fixed))
    assert "y = x + 4 · (W_up" in (tmp_path / "fixed" / "README.md").read_text()
    loaded.set_scale(2.0)
    torch.testing.assert_close(logits(loaded), expected)

    fixed.adapters["default"]["1"][0].scale = 0.5
    with pytest.raises(ValueError, match=r"scale: expected 4\.0 in all adapters .*, got 0\.5 at 1\.0; set_scale"):
        fixed.save_pretrained(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
    with pytest.raises(ValueError, match=r"scale: expected a number in \(-inf, inf\), got inf"):
        fixed.set_scale(float("inf"))


def test_a_configuration_of_before_has_the_defaults() -> None:
    fields = ak.AdapterConfig().to_dict()
    old = {name: value for name, value in fields.items() if name not in ALL}
    assert ak.AdapterConfig.from_dict(old) == ak.AdapterConfig()
    backbone = {"hidden_size": 32, "num_hidden_layers": 4}
    began = {name: value for name, value in ak.AdapterConfig().resolve(32, 4).to_dict().items() if name not in ALL}
    check_adapter(Path("run"), began, backbone, ak.AdapterConfig())
    with pytest.raises(CheckpointError, match=r"scale=1\.0, not 2\.0"):
        check_adapter(Path("run"), began, backbone, ak.AdapterConfig(scale=2))


CONFIGS = {
    "plain": {"adapter_dim": 4, "layers": [1, 3]},
    "scaled": {"adapter_dim": 4, "layers": [1, 3], "scale": -2.0},
    "learned": {"adapter_dim": 4, "layers": [1, 3], "learned_scale": True},
    "raw": {"adapter_dim": 4, "layers": [3], "layer_norm": False, "scale": 3.0},
    "raw too": {"adapter_dim": 4, "layers": [1, 3], "layer_norm": False},
}


@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_mixes_scales_and_norms(fused: bool) -> None:
    model = mixed(configs=CONFIGS, fused=fused)
    names = ["scaled", "plain", "raw", "learned", "raw too"]
    ids, mask = IDS[[0, 1, 2, 0, 1]], LEFT_PADDED[[0, 1, 2, 0, 1]]
    direction = torch.randn(5, 10, 128, dtype=torch.float64)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}

    alone: dict[str, Tensor] = {}
    for row, name in enumerate(names):
        model.set_adapter(name)
        out = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
        alone |= gradients((out * direction[row]).sum())
        with torch.no_grad():
            got = model(ids, attention_mask=mask, adapter_names=names).logits[row]
        torch.testing.assert_close(got, out[0].detach(), rtol=1e-9, atol=1e-9)
    together = gradients((model(ids, attention_mask=mask, adapter_names=names).logits * direction).sum())
    assert together.keys() == alone.keys()
    assert [name for name in alone if name.endswith("scale")] == ["learned.1.0.scale", "learned.3.0.scale"]
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-8, atol=1e-8)


def test_the_budget_counts_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["budget", "--model-config", "llama-7b", "--max-params", "8e6", "--no-layer-norm"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    dim, total = next((int(row[2]), int(row[3].replace(",", ""))) for row in rows if row[:2] == ["2", "16"])
    assert total == 16 * adapter_num_params(4096, dim, layer_norm=False) <= 8_000_000
    assert total + 16 * 8193 > 8_000_000
