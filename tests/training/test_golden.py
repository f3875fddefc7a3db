"""Runs that an earlier version saved load, evaluate to their numbers, and resume; see tests/golden/make_runs.py."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import adapterkern as ak
from adapterkern.files import write_json
from adapterkern.model.backbone import load_backbone
from adapterkern.model.files.folder import CONFIG_NAME, OLD_CONFIG_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME
from adapterkern.training import train
from adapterkern.training.data.examples import Example
from adapterkern.training.saved import load_sources
from adapterkern.training.task import Task

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
OLD_NAMES, NEW_NAMES = {OLD_WEIGHTS_NAME, OLD_CONFIG_NAME}, {WEIGHTS_NAME, CONFIG_NAME}
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
@pytest.mark.parametrize("lists", ["whole", "damaged", "gone"])
def test_a_run_of_another_kind_is_replaced_whole(name: str, lists: str, tmp_path: Path) -> None:
    run = shutil.copytree(GOLDEN / name, tmp_path / "run")
    (run / "mine.txt").write_text("mine")
    (run / "tasks").mkdir(exist_ok=True)
    (run / "tasks" / "todo.txt").write_text("mine, too")
    if lists == "gone":
        shutil.rmtree(run / "checkpoints")
    for path in run.glob("checkpoints/*/state.json") if lists == "damaged" else ():
        path.write_text("{")
    llama, tokenizer = load_backbone(GOLDEN / "backbone")
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=2, layers=[-1]))
    data = GOLDEN / "colors.jsonl"
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        train(model, data, made(run), tokenizer=tokenizer)
    train(model, data, made(run, overwrite=True), tokenizer=tokenizer)
    plain = {path.name for path in (GOLDEN / "classification").iterdir()} - {"sources.json", *OLD_NAMES} | NEW_NAMES
    assert {path.name for path in run.iterdir()} == plain | {"data_summary.json", "mine.txt", "tasks"}
    assert [path.name for path in (run / "tasks").iterdir()] == ["todo.txt"]


def test_what_a_task_of_one_s_own_saves_goes_and_what_lies_beside_it_stays(tmp_path: Path) -> None:
    class Mine(Task[Example]):
        def save(self, directory: Path, config: ak.TrainConfig) -> None:
            super().save(directory, config)
            write_json(directory / "src" / "vocabulary.json", {})

    def run(**values: Any) -> None:
        model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=2, layers=[-1]))
        data = GOLDEN / "colors.jsonl"
        task = Mine(model) if "overwrite" not in values else None
        train(model, data, made(tmp_path, **values), tokenizer=tokenizer, task=task)
        model.unload()

    llama, tokenizer = load_backbone(GOLDEN / "backbone")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "precious.py").write_text("mine")
    run()
    assert (tmp_path / "src" / "vocabulary.json").exists()
    run(overwrite=True)
    assert [path.name for path in (tmp_path / "src").iterdir()] == ["precious.py"]
