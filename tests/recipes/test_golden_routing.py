"""A routed run saved before 0.2: it loads, scores as it did, and goes on from its checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkern as ak
from adapterkern.model.backbone import load_backbone
from adapterkern.recipes.routing import RoutedTask, RoutingConfig
from adapterkern.training import TrainConfig, evaluate, train

pytestmark = pytest.mark.slow

RUNS = Path(__file__).parents[1] / "golden" / "runs"
EXPECTED: dict[str, float] = json.loads((RUNS / "expected.json").read_text())["routing"]
DATA = RUNS / "colors.jsonl"


def scores(task: RoutedTask, config: TrainConfig, tokenizer: Any) -> dict[str, float]:
    metrics = evaluate(task.model, DATA, config, tokenizer=tokenizer, task=task)
    return {name: metrics[name] for name in EXPECTED}


@pytest.mark.parametrize("folder", ["", "checkpoints/step-00000004"])
def test_scores_as_before(folder: str) -> None:
    llama, tokenizer = load_backbone(RUNS / "backbone")
    task, config = RoutedTask.from_pretrained(llama, RUNS / "routing" / folder)
    assert task.routing == RoutingConfig(experts=2)
    assert scores(task, config, tokenizer) == pytest.approx(EXPECTED, rel=1e-4)


def test_resumes_to_the_same_scores(tmp_path: Path) -> None:
    shutil.copytree(RUNS / "routing", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    llama, tokenizer = load_backbone(RUNS / "backbone")
    torch.manual_seed(1)
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=2, layers=[-1], init="xavier"))
    task = RoutedTask(model, RoutingConfig(experts=2))
    config = TrainConfig(
        output_dir=tmp_path / "run",
        resume=True,
        batch_size=4,
        max_length=24,
        max_steps=4,
        checkpoint_every=2,
        log_every=1,
        lr=0.02,
        plot=False,
        progress=False,
    )
    result = train(model, DATA, config, tokenizer=tokenizer, task=task)
    assert [record["step"] for record in result.history] == [1, 2, 3, 4]
    assert scores(task, config, tokenizer) == pytest.approx(EXPECTED, rel=1e-4)
    again, _ = RoutedTask.from_pretrained(load_backbone(RUNS / "backbone")[0], tmp_path / "run")
    assert scores(again, config, tokenizer) == pytest.approx(EXPECTED, rel=1e-4)
