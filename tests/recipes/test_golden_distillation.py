"""Runs of version 0.1 that learned from soft labels load, score as they did, and resume."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest

from adapterkern import AdapterConfig, LlamaAdapter
from adapterkern.recipes.distillation import Distillation, KeepBehaviour, WithKept, first_layers
from adapterkern.training import evaluate, train
from tests.support import golden_runs

pytestmark = pytest.mark.slow

KINDS: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "distillation": (Distillation, {"temperature": 2.0, "divergence": "js"}, golden_runs.TEXTS, "causal-lm"),
    "keeping": (
        KeepBehaviour,
        {"weight": 0.3},
        WithKept(golden_runs.COLORS, golden_runs.TEXTS),
        "classification",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_run_scores_as_it_did(name: str) -> None:
    kind, settings, data, _ = KINDS[name]
    llama, tokenizer = golden_runs.backbone()
    task, config = kind.from_pretrained(llama, golden_runs.RUNS / name)
    assert task.settings == kind(task.model, **settings).settings
    golden_runs.check(name, evaluate(task.model, data, config, tokenizer=tokenizer, task=task))


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_resumes_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    kind, settings, data, config_task = KINDS[name]
    folder = golden_runs.cut(name, tmp_path / name)
    llama, tokenizer = golden_runs.backbone()
    model = LlamaAdapter(llama, AdapterConfig(adapter_dim=2, layers=[-1]))
    config = golden_runs.config(task=config_task, output_dir=folder, resume=True)
    task = kind(model, **settings)
    assert train(model, data, config, tokenizer=tokenizer, task=task).steps == 4
    golden_runs.check(name, evaluate(model, data, config, tokenizer=tokenizer, task=task))


def test_the_old_module_has_its_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module("adapterkern.training.distillation")
    assert (module.Distillation, module.KeepBehaviour) == (Distillation, KeepBehaviour)
    assert (module.WithKept, module.first_layers) == (WithKept, first_layers)
