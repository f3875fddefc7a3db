"""Runs that an earlier version saved load, evaluate to their numbers, and resume; see tests/golden/make_runs.py."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import adapterkern as ak
from adapterkern.model.backbone import load_backbone
from adapterkern.training import train
from adapterkern.training.saved import load_sources
from adapterkern.training.task import Task

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": ("colors.jsonl", {}),
    "causal-lm": ("texts.jsonl", {"task": "causal-lm", "max_norm": math.inf}),
}


def made(folder: Path, **values: Any) -> ak.TrainConfig:
    """The configuration that the run was made with, in ``folder``."""
    settings = {"batch_size": 4, "max_length": 24, "max_steps": 4, "checkpoint_every": 2, "log_every": 1, "lr": 0.02}
    return ak.TrainConfig(**({"output_dir": folder, "plot": False, "progress": False} | settings | values))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("folder", ["", "checkpoints/step-00000004"])
def test_loads_and_evaluates(name: str, folder: str) -> None:
    run = GOLDEN / name / folder
    llama, tokenizer = load_backbone(GOLDEN / load_sources(run).model)
    task: Task[Any]
    task, config = Task.from_pretrained(llama, run)
    metrics = ak.evaluate(task.model, GOLDEN / RUNS[name][0], config, tokenizer=tokenizer, task=task)
    for key, value in EXPECTED[name].items():
        assert metrics[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("name", RUNS)
def test_resumes_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    file, values = RUNS[name]
    run = shutil.copytree(GOLDEN / name, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    llama, tokenizer = load_backbone(GOLDEN / "backbone")
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=2, layers=[-1]))
    data = GOLDEN / file
    result = train(model, data, made(run, resume=True, **values), tokenizer=tokenizer, eval_data=data)
    assert result.steps == 4
    assert result.metrics is not None
    for key, value in EXPECTED[name].items():
        assert result.metrics[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("name", ["routing", "multitask", "distillation", "qa"])
def test_a_run_of_another_kind_is_replaced_whole(name: str, tmp_path: Path) -> None:
    run = shutil.copytree(GOLDEN / name, tmp_path / "run")
    (run / "mine.txt").write_text("mine")
    llama, tokenizer = load_backbone(GOLDEN / "backbone")
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=2, layers=[-1]))
    data = GOLDEN / "colors.jsonl"
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        train(model, data, made(run), tokenizer=tokenizer)
    train(model, data, made(run, overwrite=True), tokenizer=tokenizer)
    plain = {path.name for path in (GOLDEN / "classification").iterdir()} - {"sources.json"}
    assert {path.name for path in run.iterdir()} == plain | {"mine.txt"}
