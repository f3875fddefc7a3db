"""Dropout in an adapter's bottleneck: when it drops, and that one batch, one flag and one file do not change what."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops import operator
from adapterkern.ops.dropout import Drop
from tests.support import tiny_run

IDS = torch.randint(3, 100, (3, 7), generator=torch.Generator().manual_seed(1))


def call(module: ak.Adapter, x: Tensor, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [p for p in module.parameters() if p.requires_grad])]


def test_it_drops_while_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "prefers_eager", lambda *_: False)  # such small inputs as these
    module, x = ak.Adapter(32, 10, init="xavier", dropout=0.4), torch.randn(2, 5, 32)
    assert "dropout=0.4" in repr(module)
    fused = call(module, x)
    module.fused = False
    for got, expected in zip(fused, call(module, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    mask = Drop(0.4, torch.randint(2**63 - 1, (1,))).mask(10, 10, torch.float32).view(2, 5, 10)
    by_hand = x + module.up(torch.nn.functional.silu(module.down(module.norm(x))) * mask)
    torch.testing.assert_close(fused[0], by_hand)
    assert not torch.equal(call(module, x, seed=1)[0], fused[0])

    plain = x + module.up(torch.nn.functional.silu(module.down(module.norm(x))))
    before = torch.get_rng_state()
    torch.testing.assert_close(module.eval()(x), plain)
    torch.testing.assert_close(module.train().requires_grad_(False)(x), plain)
    assert torch.equal(torch.get_rng_state(), before)


def logits(model: ak.LlamaAdapter, **how: Any) -> Tensor:
    torch.manual_seed(0)
    return model(IDS, **how).logits


def test_a_frozen_adapter_drops_nothing_beside_one_that_is_trained() -> None:
    model = tiny_run.model(init="xavier", layers=(1, 3), dropout=0.5)
    model.add_adapter("other", ak.AdapterConfig(8, layers=(1, 3), init="xavier", dropout=0.5))
    for p in model.adapter_parameters("default"):
        p.requires_grad_(False)
    model.train()
    mixed = [model(IDS, adapter_names=["default", "other", "other"]).logits for _ in range(2)]
    torch.testing.assert_close(mixed[0][0], mixed[1][0])
    assert not torch.allclose(mixed[0][1], mixed[1][1], atol=1e-3)
    with model.mixing(["default", "other"], torch.tensor([0, 1, 1])):  # which is kept for several forwards
        model(IDS)
        for name in ("default", "other"):
            for p in model.adapter_parameters(name):
                p.requires_grad_(name == "default")
        mixed = [model(IDS).logits for _ in range(2)]
    torch.testing.assert_close(mixed[0][1], mixed[1][1])
    assert not torch.allclose(mixed[0][0], mixed[1][0], atol=1e-3)


def test_what_is_added_has_the_mode_of_the_model_and_what_is_loaded_drops_nothing(tmp_path: Path) -> None:
    config = ak.AdapterConfig(8, layers=(1, 3), init="xavier", dropout=0.5)
    model = tiny_run.model(init="xavier", layers=(1, 3), dropout=0.5)
    model.save_pretrained(tmp_path)
    model.eval()
    model.add_adapter("added", config)
    model.load_adapter(tmp_path, "loaded")
    for name in ("added", "loaded"):
        model.set_adapter(name)
        assert torch.equal(model(IDS).logits, model(IDS).logits)
    again = ak.LlamaAdapter.from_pretrained(model.unload().train(), tmp_path)
    assert not any(module.training for module in again.modules())
    again.train().add_adapter("other", config)
    assert all(module.training for module in again.modules())


def test_a_mixed_batch_drops_as_a_plain_one() -> None:
    model = tiny_run.model(init="xavier", layers=(1, 3), dropout=0.5).train()
    plain = logits(model)
    torch.testing.assert_close(logits(model, adapter_names=["default"] * 3), plain)
    model.add_adapter("other", ak.AdapterConfig(8, layers=(1, 3), init="xavier"))
    model.train()
    mixed = logits(model, adapter_names=["default", "other", "__base__"])
    model.eval()
    steady = logits(model, adapter_names=["default", "other", "__base__"])
    assert not torch.allclose(mixed[0], steady[0], atol=1e-3)
    torch.testing.assert_close(mixed[1:], steady[1:])  # adapters of another rate are another group


def test_a_recomputed_layer_drops_as_its_forward_did() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_run.model(init="xavier", dropout=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.adapter_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_file_keeps_the_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_run.model(init="xavier", dropout=0.25)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapterkern.json").read_text())["adapter"]["dropout"] == 0.25
    loaded = ak.LlamaAdapter.from_pretrained(model.unload(), tmp_path)
    assert loaded.adapters["default"]["2"][0].dropout == 0.25
    loaded.save_adapterhub(tmp_path / "hub")
    assert "dropout: the file has none" in caplog.text
    old = {name: value for name, value in ak.AdapterConfig().to_dict().items() if name != "dropout"}
    assert ak.AdapterConfig.from_dict(old).dropout == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropout": 1}, r"dropout: expected a number in \[0, 1\), got 1"),
        ({"dropout": 0.1, "kind": "prompt"}, "dropout: expected 0.0 with kind='prompt'"),
        ({"lora_dropout": 0.1}, "lora_dropout.*dropout"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ak.AdapterConfig(**fields)
