"""``modules_to_save`` in ``ak.train``: trained, saved, resumed, and what it does not use is named."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

import adapterkern as ak
from adapterkern.training import train
from adapterkern.training.task import Task
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(16)
TEXTS = [{"prompt": "w1", "completion": row["text"]} for row in ROWS]


def run(folder: Path | None, model: ak.LlamaAdapter, **values: Any) -> Any:
    config = tiny_run.quiet(**{"output_dir": folder, "max_steps": 4, "checkpoint_every": 2} | values)
    rows = TEXTS if config.task == "causal-lm" else ROWS
    return train(model, rows, config, tokenizer=TOKENIZER)


def copies(model: ak.LlamaAdapter) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in model.adapters.named_parameters() if "modules_to_save" in key}


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_embeddings_learn_and_resume_to_the_bit(tmp_path: Path, task: str) -> None:
    names = ["embed_tokens"] if task == "classification" else ["embed_tokens", "lm_head"]
    model = tiny_run.model(modules_to_save=names)
    backbone = {key: p.clone() for key, p in model.base.state_dict().items()}
    before = copies(model)
    result = run(tmp_path, model, task=task)
    assert result.prefix_layers == 0
    after = copies(model)
    assert all(not torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(p, backbone[key]) for key, p in model.base.state_dict().items())

    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    resumed = tiny_run.model(modules_to_save=names)
    run(tmp_path, resumed, task=task, resume=True)
    assert tiny_run.same_bits(tiny_run.weights(resumed), tiny_run.weights(model))

    task_again: Task[Any]
    task_again, config = Task.from_pretrained(tiny_run.model().unload(), tmp_path)
    assert tiny_run.same_bits(tiny_run.weights(task_again.model), tiny_run.weights(model))
    assert config.task == task


def test_trained_modules_above_the_prefix_keep_the_cache(tmp_path: Path) -> None:
    cached, uncached = (tiny_run.model(modules_to_save=["norm", "layers.3.mlp"]) for _ in range(2))
    assert run(None, cached, prefix_cache=True, padding="max_length").prefix_layers == 3
    run(None, uncached, prefix_cache=False, padding="max_length")
    assert tiny_run.same_bits(tiny_run.weights(cached), tiny_run.weights(uncached))


def test_a_head_that_is_not_used_is_named_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    backbone = LlamaForSequenceClassification(tiny_run.model().config)
    model = ak.LlamaAdapter(backbone, ak.AdapterConfig(adapter_dim=8, layers=[2, 3]))
    before = copies(model)
    run(tmp_path, model)
    assert "modules_to_save: score: not used by this training, and not trained" in caplog.text
    assert all(torch.equal(copies(model)[key], p) for key, p in before.items())


def test_a_trained_parameter_of_the_backbone_is_refused_before_the_training(tmp_path: Path) -> None:
    model = tiny_run.model()
    model.base.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"modules_to_save: the backbone's parameter lm_head\.weight requires"):
        run(tmp_path / "run", model)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
