"""An adapter knows its backbone's weights, however they are loaded."""

import json
import logging
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import LlamaForCausalLM

import adapterkern as ak
from adapterkern.model.digest import differ, weights_digest
from tests.model.test_quantized import int8, nf4, saved, weight_only
from tests.support.tiny_llama import adapted, tiny

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "runs"
__all__ = ["saved"]  # the fixture of a backbone's folder


def plain(saved: Path, dtype: torch.dtype) -> Any:
    return LlamaForCausalLM.from_pretrained(saved, dtype=dtype)


def offloaded(saved: Path, dtype: torch.dtype) -> Any:
    llama = plain(saved, dtype)
    accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    return llama


LOADED = [(plain, torch.float32), (plain, torch.bfloat16), (nf4, torch.float32), (nf4, torch.bfloat16)]
LOADED += [(int8, torch.bfloat16), (weight_only, torch.float32), (offloaded, torch.float32), (plain, torch.float16)]


@pytest.mark.parametrize(("load", "dtype"), LOADED)
def test_is_the_same_however_it_is_loaded_and_another_is_not(saved: Path, load: Any, dtype: torch.dtype) -> None:
    trained_on = weights_digest(plain(saved, torch.float32))
    now = weights_digest(load(saved, dtype))
    assert now["exact"] is not None
    assert not differ(trained_on, now)
    assert not differ(now, weights_digest(load(saved, dtype)))
    other = load(saved, dtype)
    norm = other.model.norm if load is not offloaded else None
    if norm is None:
        other.model.norm._hf_hook.weights_map["weight"].mul_(1.5)
    else:
        with torch.no_grad():
            norm.weight.mul_(1.5)
    assert differ(now, weights_digest(other))
    if dtype is not torch.float16:  # its rounding is not bf16's, so it is compared with fp16 only
        assert differ(trained_on, weights_digest(other))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj", "model.layers.0.input_layernorm", "model.embed_tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_tensor_counts(name: str, dtype: torch.dtype) -> None:
    other = tiny().to(dtype)
    with torch.no_grad():
        other.get_submodule(name).weight.mul_(1.5)
    assert differ(weights_digest(tiny()), weights_digest(other))


def test_is_the_one_that_old_checkpoints_hold() -> None:
    found = weights_digest(LlamaForCausalLM.from_pretrained(GOLDEN / "backbone"))["exact"]
    held = json.loads((GOLDEN / "classification/checkpoints/step-00000004/state.json").read_text())
    assert held["backbone"]["weights"] == found


def test_loading_warns_of_another_backbone_and_strict_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama = tiny()
    llama.config.name_or_path = "someone/base"
    adapted(llama).save_pretrained(tmp_path)
    ak.LlamaAdapter.from_pretrained(tiny(), tmp_path, strict=True)
    assert not caplog.records
    instruct = tiny()
    instruct.config.name_or_path = "someone/instruct"
    with torch.no_grad():
        instruct.model.layers[0].mlp.up_proj.weight.add_(0.1)
    message = "saved for the backbone someone/base, and loaded on one of other weights, someone/instruct"
    with pytest.raises(ValueError, match=message):
        ak.LlamaAdapter.from_pretrained(instruct, tmp_path, strict=True)
    with caplog.at_level(logging.WARNING):
        model = ak.LlamaAdapter.from_pretrained(instruct, tmp_path)
    assert [message in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "again", strict=True)


def test_an_old_folder_has_none(caplog: pytest.LogCaptureFixture) -> None:
    llama = LlamaForCausalLM.from_pretrained(GOLDEN / "backbone")
    with torch.no_grad():
        llama.model.norm.weight.mul_(2)
    ak.LlamaAdapter.from_pretrained(llama, GOLDEN / "classification", strict=True)
    assert not caplog.records
