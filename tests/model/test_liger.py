"""``liger=True`` where its kernels do not run: what it changes, restores and refuses. See also interpreted_liger.py."""

import importlib.util
import logging
import pickle

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import adapterkern as ak
from adapterkern.model import liger

IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def test_on_a_cpu_the_backbone_s_own_modules_run_and_a_log_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    expected = ak.LlamaAdapter(llama()).train()(IDS, labels=IDS)
    liger._runs.cache_clear()
    with caplog.at_level(logging.INFO, "adapterkern"):
        got = ak.LlamaAdapter(llama(), liger=True).train()(IDS, labels=IDS)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.logits, expected.logits)
    assert [(r.levelname, r.message) for r in caplog.records if r.message.startswith("liger")] == [
        ("WARNING", "liger on cpu in torch.float32 runs the backbone's own modules (ADAPTERKERN_FUSED=1)")
    ]


def test_one_model_s_modules_change_their_class_and_get_it_back() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    base, other = llama(), ak.LlamaAdapter(llama())
    before = [type(module) for module in base.modules()]
    keys = list(base.state_dict())
    model = ak.LlamaAdapter(base, liger=True)
    changed = [m for m in base.modules() if isinstance(m, liger.Fused)]
    assert sorted(type(m).__name__ for m in changed) == 2 * ["LlamaAttention"] + 2 * ["LlamaMLP"] + 5 * ["LlamaRMSNorm"]
    assert not any(isinstance(m, liger.Fused) for m in other.modules())
    assert list(base.state_dict()) == keys
    model.liger = True  # once more changes nothing
    model.liger = False
    assert not any(isinstance(m, liger.Fused) for m in base.modules())
    model.liger = True
    assert [type(module) for module in model.unload().modules()] == before


def test_pickles_and_references_keep_the_modules() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    model = ak.LlamaAdapter(llama(), liger=True).eval()
    expected = model(IDS).logits
    for other in (pickle.loads(pickle.dumps(model)), model.reference("default")):
        assert [type(m) for m in other.base.modules()] == [type(m) for m in model.base.modules()]
        assert torch.equal(other(IDS).logits, expected)
        other.liger = False
        assert not any(isinstance(m, liger.Fused) for m in other.modules())
    assert any(isinstance(m, liger.Fused) for m in model.modules())


def test_refuses_what_it_has_nothing_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8, num_key_value_heads=4))
    gelu = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    if importlib.util.find_spec("liger_kernel") is not None:
        with pytest.raises(ValueError, match=r"liger: expected a backbone of type llama, .*, got 'gemma'"):
            ak.LlamaAdapter(gemma, liger=True)
        with pytest.raises(ValueError, match="liger: expected a backbone whose hidden_act is 'silu', got 'gelu'"):
            ak.LlamaAdapter(gelu, liger=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        ak.LlamaAdapter(llama(), liger=True)
