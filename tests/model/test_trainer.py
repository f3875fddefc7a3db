"""LlamaAdapter in transformers' Trainer and TRL's SFTTrainer: training, checkpoints, label smoothing, evaluation."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
)

import adapterkern as ak
from tests.support import tiny_run
from tests.support.trainers import ROWS, adapted, by_hand, check_sft_trainer, check_trainer, logged, trainer, weights


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
    assert sorted(load_file(checkpoint / "model.safetensors")) == sorted(names)
    assert load_file(checkpoint / "adapterkern.safetensors").keys() == model.adapters["default"].state_dict().keys()
    backbone_bytes = sum(p.nbytes for p in model.base.parameters())
    assert sum(path.stat().st_size for path in checkpoint.glob("*model*.safetensors")) < backbone_bytes / 4

    resumed = adapted()
    trainer(tmp_path, resumed).train(resume_from_checkpoint=str(checkpoint))
    assert all(map(torch.equal, weights(resumed), weights(model)))
    loaded = ak.LlamaAdapter.from_pretrained(adapted().unload(), tmp_path / "checkpoint-6")
    assert all(map(torch.equal, weights(loaded), weights(model)))


def test_the_best_adapter_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The loss falls and the highest counts as the best, so the best adapter is not the last one."""
    model = adapted()
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
    tokenizer.pad_token = tokenizer.eos_token
    texts, unseen = ([row["text"] for row in tiny_run.rows(count, seed)] for count, seed in ((32, 0), (8, 1)))
    given: dict[str, Any] = {"llama": tiny_run.model().unload(), "tokenizer": tokenizer}
    exec(code[1], given | {"texts": texts, "unseen": unseen})
    assert {"adapterkern.safetensors", "model.safetensors"} <= {path.name for path in Path("adapter").iterdir()}
    assert len(list(Path("out").glob("checkpoint-*"))) == 3
