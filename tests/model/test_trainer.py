"""LlamaAdapter in transformers' Trainer and TRL's SFTTrainer: training, checkpoints, label smoothing, evaluation."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import adapterkern as ak
from tests.support import tiny_run
from tests.support.trainers import (
    ROWS,
    adapted,
    by_hand,
    check_sft_trainer,
    check_trainer,
    logged,
    sft_trainer,
    trainer,
    weights,
)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains_as_a_loop_by_hand(tmp_path: Path, smoothing: float, checkpointing: bool) -> None:
    model = adapted()
    backbone = {key: p.clone() for key, p in model.base.state_dict().items()}
    check_trainer(tmp_path, model, smoothing, checkpointing)
    assert all(torch.equal(p, backbone[key]) for key, p in model.base.state_dict().items())


def test_checkpoints_hold_the_adapter_alone_and_resume_to_the_bit(tmp_path: Path) -> None:
    model = adapted()
    trainer(tmp_path, model, save_strategy="steps", save_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    names = [f"adapters.default.{key}" for key in model.adapters["default"].state_dict()]
    described = "adapters.default.config"
    tensors = load_file(checkpoint / "model.safetensors")
    assert sorted(tensors) == sorted([*names, described])
    assert tensors[described].numpy().tobytes() == (checkpoint / "adapterkern.json").read_bytes()
    assert load_file(checkpoint / "adapterkern.safetensors").keys() == model.adapters["default"].state_dict().keys()
    backbone_bytes = sum(p.nbytes for p in model.base.parameters())
    assert sum(path.stat().st_size for path in checkpoint.glob("*model*.safetensors")) < backbone_bytes / 4

    resumed = adapted()
    trainer(tmp_path, resumed).train(resume_from_checkpoint=str(checkpoint))
    assert all(map(torch.equal, weights(resumed), weights(model)))
    loaded = ak.LlamaAdapter.from_pretrained(adapted().unload(), tmp_path / "checkpoint-6")
    assert all(map(torch.equal, weights(loaded), weights(model)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one step, with the adapters of ``adapted``."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, adapted(), save_strategy="steps", max_steps=1).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"activation": "relu"}, "activation='silu', not 'relu'"),
        ({"position": "attention"}, "position='layer', not 'attention'"),
        ({"eps": 1e-3}, "eps=1e-05, not 0.001"),
        ({"x_free": True}, "x_free=False, not True"),
        ({"layers": [1]}, r"layers=\[0, 1\], not \[1\]"),
        ({"adapter_dim": 8}, "adapter_dim=4, not 8"),
        ({"depth": 2}, "depth=1, not 2"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save=\[\], not \['model.norm'\]"),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else "",
)
def test_another_configuration_is_not_resumed(
    tmp_path: Path, checkpoint: Path, other: dict[str, Any], message: str
) -> None:
    model = adapted(config=ak.AdapterConfig(**({"adapter_dim": 4} | other)))
    before = weights(model)
    expected = f"^config: the run was begun with {message}: resume with the same value, or begin another run$"
    with pytest.raises(ValueError, match=expected):
        trainer(tmp_path, model).train(resume_from_checkpoint=str(checkpoint))
    assert all(map(torch.equal, weights(model), before))


def test_another_init_is_resumed(tmp_path: Path, checkpoint: Path) -> None:
    model = adapted(config=ak.AdapterConfig(adapter_dim=4, init="svd"))
    trainer(tmp_path, model, max_steps=1).train(resume_from_checkpoint=str(checkpoint))
    saved = load_file(checkpoint / "adapterkern.safetensors")
    assert all(torch.equal(t, saved[key]) for key, t in model.adapters["default"].state_dict().items())


def test_what_is_the_same_in_other_words_or_another_dtype_is_loaded(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    model = adapted(config=ak.AdapterConfig(adapter_dim=4, modules_to_save=[]))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model.load_state_dict({key: t.to(dtype) for key, t in tensors.items()}, strict=False)
    key = "adapters.default.config"
    with pytest.raises(ValueError, match=r"config: expected the bytes of .*json, got \(\d+,\) of torch.float32"):
        model.load_state_dict(tensors | {key: tensors[key] + 0.5}, strict=False)


def test_checkpoints_without_a_configuration_are_resumed(tmp_path: Path, checkpoint: Path) -> None:
    """Those of before."""
    old = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    tensors = load_file(old / "model.safetensors")
    del tensors["adapters.default.config"]
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    one, other = adapted(), adapted()
    trainer(tmp_path, one).train(resume_from_checkpoint=str(old))
    trainer(tmp_path, other).train(resume_from_checkpoint=str(checkpoint))
    assert all(map(torch.equal, weights(one), weights(other)))


def test_resuming_warns_of_another_backbone_and_of_another_active_adapter(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    model = adapted()
    model.load_state_dict(tensors, strict=False)
    assert not caplog.records
    model.base.model.norm.weight.data.mul_(2)
    model.load_state_dict(tensors, strict=False)
    assert "saved for the backbone without a name, and loaded on one of other weights" in caplog.text
    assert "strict" not in caplog.text  # which load_state_dict has for something else
    model.add_adapter("b", ak.AdapterConfig(adapter_dim=4))
    model.set_adapter("b")
    model.load_state_dict(tensors, strict=False)
    assert "the checkpoint is of the adapter 'default', and 'b' is active" in caplog.text


def test_a_state_dict_by_hand_is_the_module_s(checkpoint: Path) -> None:
    model, other = adapted(), adapted()
    part = load_file(checkpoint / "adapterkern.safetensors")
    key = next(iter(part))
    assert model.load_state_dict({f"adapters.default.{key}": part[key]}, strict=False).unexpected_keys == []
    assert torch.equal(model.adapters["default"].state_dict()[key], part[key])
    assert "adapters.default.config" not in model.state_dict()
    assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    # also within another module, and without a change of what is passed
    tensors = {f"0.{key}": value for key, value in load_file(checkpoint / "model.safetensors").items()}
    wrapped = torch.nn.Sequential(adapted(config=ak.AdapterConfig(adapter_dim=4, eps=1e-3)))
    with pytest.raises(ValueError, match=r"config: the run was begun with eps=1e-05, not 0\.001"):
        wrapped.load_state_dict(tensors, strict=False)
    result = torch.nn.Sequential(other).load_state_dict(tensors, strict=False)
    assert result.unexpected_keys == []
    assert all(torch.equal(t, part[key]) for key, t in other.adapters["default"].state_dict().items())
    assert "0.adapters.default.config" in tensors


def test_the_best_adapter_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The loss falls and the highest counts as the best, so the best adapter is not the last one."""
    model = adapted()
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=2))  # which is not saved, and not missed
    run = trainer(
        tmp_path,
        model,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    run.train()
    scores = logged(run, "eval_loss")
    assert max(scores) > scores[-1] + 0.01
    assert run.evaluate()["eval_loss"] == pytest.approx(max(scores), rel=1e-6)
    assert not [record for record in caplog.records if "missing keys" in record.message]


def test_evaluates_to_the_mean_over_tokens_and_predicts(tmp_path: Path) -> None:
    model = adapted()
    run = trainer(tmp_path, model, per_device_eval_batch_size=6)
    expected = by_hand(adapted(), [ROWS[:6]])[0]
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert run.predict(ROWS[:6]).predictions.shape == (6, 12, 64)


def test_is_a_model_to_transformers() -> None:
    model = adapted()
    base = model.base
    assert isinstance(model, PreTrainedModel)
    assert model.config is base.config
    assert model.generation_config is base.generation_config
    assert model.get_output_embeddings() is base.lm_head
    assert model.get_input_embeddings() is base.model.embed_tokens
    assert model.base_model is base.model
    assert model.loss_type == base.loss_type
    assert not hasattr(model, "hf_device_map")
    assert math.isfinite(model(**{key: value[None] for key, value in ROWS[0].items()}).loss.item())


# TRL


def test_sft_trainer(tmp_path: Path) -> None:
    model = adapted()
    check_sft_trainer(tmp_path, model)
    loaded = ak.LlamaAdapter.from_pretrained(adapted().unload(), tmp_path / "checkpoint-6")
    assert all(map(torch.equal, weights(loaded), weights(model)))


def test_the_documentation_s_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_run.tokenizer()
    assert tokenizer.pad_token is None
    texts, unseen = ([row["text"] for row in tiny_run.rows(count, seed)] for count, seed in ((32, 0), (8, 1)))
    given: dict[str, Any] = {"llama": tiny_run.model().unload(), "tokenizer": tokenizer}
    exec(code[1], given | {"texts": texts, "unseen": unseen})
    assert {"adapterkern.safetensors", "model.safetensors"} <= {path.name for path in Path("adapter").iterdir()}
    assert len(list(Path("out").glob("checkpoint-*"))) == 3


# PEFT


@pytest.mark.parametrize(
    ("where", "by"), [(["q_proj"], "get_peft_model"), ("all-linear", "get_peft_model"), (["q_proj"], "SFTTrainer")]
)
def test_what_peft_does_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, where: Any, by: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, lora = adapted(), peft.LoraConfig(target_modules=where, task_type="CAUSAL_LM")
    own = model.adapter_parameters()
    if by == "SFTTrainer":
        sft_trainer(tmp_path, model, peft_config=lora)
    else:
        peft.get_peft_model(model, lora)
    assert not any(p.requires_grad for p in own)
    expected = "peft_config: PEFT has frozen the adapters of this model: it trains and saves its own modules alone"
    assert [r.message.startswith(expected) for r in caplog.records if "PEFT" in r.message] == [True]


def test_adapters_over_peft_s_modules(caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.get_peft_model(adapted().unload(), peft.LoraConfig(target_modules=["q_proj"]))
    assert not hasattr(lora, "adapters")
    assert "PEFT" not in caplog.text
    model = adapted(lora.get_base_model())
    assert "llama: PEFT's modules in it are frozen from now on" in caplog.text
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.adapter_parameters()}
    caplog.clear()
    adapted(model.unload())  # frozen already
    assert not caplog.records
