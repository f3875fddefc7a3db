"""Our entry in PEFT's method comparison, on a suite of the same shape: its data and its GPU cannot be had here."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterkern as ak
from bench.peers import method_comparison
from tests.support.tiny_llama import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENTRY = ROOT / "bench" / "peers" / "experiments" / "adapterkern" / "llama-3.2-3B-dim52"

# Names, arguments and order as in huggingface/peft, method_comparison/MetaMathQA, of 2026; nothing behind them.
UTILS = """
import os, tempfile
from peft import get_peft_model
from transformers import AutoModelForCausalLM

def get_base_model(*, model_id, dtype, attn_implementation, use_gc):
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=dtype, attn_implementation=attn_implementation)
    if use_gc:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return model

def get_model(*, model_id, dtype, compile, use_gc, attn_implementation, peft_config, autocast_adapter_dtype):
    base = get_base_model(model_id=model_id, dtype=dtype, attn_implementation=attn_implementation, use_gc=use_gc)
    if peft_config is None:
        return base
    return get_peft_model(base, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)

def get_file_size(model, *, peft_config, clean, print_fn):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return os.stat(os.path.join(folder, "adapter_model.safetensors")).st_size
"""
RUN = """
import argparse, json, sys
import torch
from peft import AdaLoraConfig, PeftConfig
from transformers import GenerationConfig
from utils import get_file_size, get_model

def train(model):
    ids = torch.arange(24).reshape(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    trainable, total = model.get_nb_trainable_parameters()
    model.eval()
    with torch.inference_mode():
        before = model(**batch, pad_token_id=0).logits.double().sum().item()
    model.train()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch, labels=ids, num_items_in_batch=24).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.inference_mode():
        how = GenerationConfig(cache_implementation="static", max_length=16)
        said = model.generate(**batch, generation_config=how, pad_token_id=0)
    return {"before": before, "losses": losses, "generated": list(said.shape), "num_trainable_params": trainable,
            "num_total_params": total}

def main(path, clean):
    peft_config = PeftConfig.from_pretrained(path)
    given = json.load(open(f"{path}/training_params.json"))
    model = get_model(model_id="llama", compile=False, attn_implementation=None, peft_config=peft_config, **given)
    trained = train(model)
    trained["file_size"] = get_file_size(model, peft_config=peft_config, clean=clean, print_fn=print_verbose)
    about = {"peft_config": peft_config.to_dict(), "is_adalora": isinstance(peft_config, AdaLoraConfig)}
    json.dump({"run_info": about, "train_info": trained}, open("result.json", "w"))

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("path_experiment")
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    def print_verbose(*what):
        print(*what, file=sys.stderr)
    main(args.path_experiment, args.clean)
"""


def suite(folder: Path, config: dict[str, Any]) -> list[str]:
    """A suite with one experiment, and the arguments that run it."""
    tiny().save_pretrained(folder / "llama")
    experiment = folder / "experiments" / "adapterkern" / "tiny"
    experiment.mkdir(parents=True)
    (experiment / "adapter_config.json").write_text(json.dumps(config))
    given = {"dtype": "float32", "use_gc": True, "autocast_adapter_dtype": True}
    (experiment / "training_params.json").write_text(json.dumps(given))
    (folder / "utils.py").write_text(UTILS)
    (folder / "run.py").write_text(RUN)
    return ["-v", "--clean", "experiments/adapterkern/tiny"]


def test_the_suites_own_loop_trains_our_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    arguments = suite(tmp_path, {"peft_type": "ADAPTERKERN", "adapter_dim": 8, "every": 2})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    request.addfinalizer(lambda: sys.modules.pop("utils", None))
    method_comparison.main(arguments)
    assert isinstance(peft.PeftConfig.from_pretrained, types.MethodType)  # PEFT is as it was
    result = json.loads((tmp_path / "result.json").read_text())
    llama = tiny()
    config = ak.AdapterConfig(adapter_dim=8, every=2)
    found, about = result["train_info"], result["run_info"]
    expected = config.num_params(llama.config.hidden_size, llama.config.num_hidden_layers)
    assert found["num_trainable_params"] == expected
    assert found["num_total_params"] == expected + llama.num_parameters()
    assert 4 * expected < found["file_size"] < 4 * expected + 4096  # fp32 and a header
    ids = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():  # the adapters start as nothing
        bare = llama.eval()(input_ids=ids).logits.double().sum().item()
    assert found["before"] == pytest.approx(bare, rel=1e-6)
    assert found["losses"][-1] < found["losses"][0]
    assert found["generated"] == [2, 16]
    assert about["peft_config"] == {"peft_type": "ADAPTERKERN", "task_type": None, **config.to_dict()}
    assert not about["is_adalora"]


def test_the_suites_other_experiments_are_pefts(tmp_path: Path) -> None:
    peft.LoraConfig(r=3, target_modules=["q_proj"]).save_pretrained(tmp_path)
    read = method_comparison.read_config(peft.PeftConfig.from_pretrained, str(tmp_path))
    assert (type(read), read.r) == (peft.LoraConfig, 3)
    given = {"compile": True, "autocast_adapter_dtype": False}
    got = method_comparison.get_model(lambda **how: how, peft_config=read, **given)
    assert got == {"peft_config": read, **given}
    assert method_comparison.get_file_size(lambda model, **_: 7, torch.nn.Linear(1, 1), clean=True, print_fn=print) == 7


def test_what_ours_cannot_follow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = method_comparison.Entry(ak.AdapterConfig())
    for given, message in (
        ({"compile": True}, "compile: expected False with ADAPTERKERN, got True"),
        ({"autocast_adapter_dtype": False}, "autocast_adapter_dtype: expected True with ADAPTERKERN, got False"),
    ):
        with pytest.raises(ValueError, match=message):
            method_comparison.get_model(lambda **_: pytest.fail("loads"), peft_config=entry, **given)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADAPTERKERN", "r": 8}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: .*adapter_dim"):
        method_comparison.read_config(peft.PeftConfig.from_pretrained, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"current folder: expected method_comparison/MetaMathQA .*, without run\.py"):
        method_comparison.main([])


def test_the_entry_has_as_many_parameters_as_the_suites_lora_of_rank_32() -> None:
    entry = method_comparison.read_config(peft.PeftConfig.from_pretrained, str(ENTRY))
    assert entry.config.num_params(3072, 28) == pytest.approx(9_175_040, rel=0.005)  # of Llama-3.2-3B; theirs
    assert json.loads((ENTRY / "training_params.json").read_text())["optimizer_kwargs"].keys() == {"lr", "weight_decay"}
