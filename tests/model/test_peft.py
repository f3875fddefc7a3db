"""Gated prompts in PEFT's files. What PEFT computes of ours, and we of its, is in test_prompt.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkern as ak
from adapterkern.model.files.peft import CONFIG_NAME, WEIGHTS_NAME
from tests.support.tiny_llama import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"  # PEFT 0.21.2 wrote it: make_peft.py
KEY = "base_model.model.model.layers.3.self_attn.adaption_"


def test_reads_and_writes_peft_s_files(tmp_path: Path) -> None:
    model = ak.LlamaAdapter.from_peft(tiny(), GOLDEN)
    expected = ak.AdapterConfig(kind="prompt", prompt_length=3, layers=(2, 3))
    assert model.adapter_config() == expected
    saved = load_file(GOLDEN / WEIGHTS_NAME)
    prompt: Any = model.adapters["default"]["3"]
    assert torch.equal(prompt.embeddings, saved[f"{KEY}prompt"][0])
    assert torch.equal(prompt.gate, saved[f"{KEY}gate"])
    model.load_peft(GOLDEN, "again")
    for _ in range(2):  # over its own files
        model.save_peft(tmp_path, "again")
    written = load_file(tmp_path / WEIGHTS_NAME)
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[key], saved[key]) for key in saved)
    theirs, ours = (json.loads((folder / CONFIG_NAME).read_text()) for folder in (GOLDEN, tmp_path))
    assert {key: theirs[key] for key in ours} == ours


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps(fields | changes))

    return damage


def tensors(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        saved = load_file(folder / WEIGHTS_NAME)
        saved |= {KEY + key: value for key, value in changes.items() if value is not None}
        dropped = [KEY + key for key, value in changes.items() if value is None]
        save_file({key: value for key, value in saved.items() if key not in dropped}, folder / WEIGHTS_NAME)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config(peft_type="LORA"), "peft_type: expected ADAPTION_PROMPT, got 'LORA'"),
        (config(target_modules="attn"), "target_modules: expected self_attn, got 'attn'"),
        (config(adapter_len=None), "adapter_len: expected an integer from 1 to 1024, got None"),
        (config(adapter_layers=5), "adapter_layers: expected an integer from 1 to 4, got 5"),
        (config(adapter_layers=1), "layers.2.self_attn.adaption_.*: expected prompts and gates of layers"),
        (config(adapter_layers=3), "layer 1: adaption_prompt: expected a tensor, got none"),
        (tensors(gate=None), "layer 3: adaption_gate: expected a tensor, got none"),
        (tensors(gate=torch.ones(2)), r"gate: expected \(1,\) of floating point, got \(2,\)"),
        (tensors(prompt=torch.full((1, 3, 32), torch.nan)), "prompt: expected finite values, got 96 that are not"),
        (tensors(alpha=torch.ones(1)), "adaption_alpha: expected prompts and gates of layers"),
    ],
)
def test_what_is_no_such_adapter_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(GOLDEN, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        ak.LlamaAdapter.from_peft(tiny(), folder)


def test_what_peft_does_not_have_is_refused(tmp_path: Path) -> None:
    for llama, fields, message in (
        (tiny(), {"layers": [0, 3]}, r"layers: expected \(2, 3\) for PEFT's AdaptionPrompt, got \(0, 3\)"),
        (tiny(), {"modules_to_save": ["norm"]}, "modules_to_save: expected None for PEFT's AdaptionPrompt"),
        (tiny("Qwen3"), {}, "llama: expected one of llama, mistral for PEFT's AdaptionPrompt, got qwen3"),
    ):
        model = ak.LlamaAdapter(llama, ak.AdapterConfig(**{"kind": "prompt"} | fields))
        with pytest.raises(ValueError, match=message):
            model.save_peft(tmp_path)
    model = ak.LlamaAdapter(tiny(), ak.AdapterConfig())
    with pytest.raises(ValueError, match="kind: expected 'prompt' for PEFT's AdaptionPrompt, got 'bottleneck'"):
        model.save_peft(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    prompts = ak.LlamaAdapter(tiny(), ak.AdapterConfig(kind="prompt"))
    with pytest.raises(ValueError, match="expected PEFT's file or none, got another program's"):
        prompts.save_peft(tmp_path)
    with pytest.raises(ValueError, match=r"PEFT's gated prompts, which LlamaAdapter.from_peft loads"):
        ak.LlamaAdapter.from_pretrained(tiny(), GOLDEN)
