"""A checkpoint of 0.1.0, which holds its task's settings in the task's own files, resumes with no others."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adapterkern as ak
from adapterkern.model.backbone import load_backbone
from adapterkern.recipes.distillation import Distillation, KeepBehaviour, WithKept
from adapterkern.recipes.multitask import MultiTask
from adapterkern.recipes.routing import RoutedTask, RoutingConfig
from adapterkern.training import CheckpointError, Task, train

pytestmark = pytest.mark.slow

RUNS = Path(__file__).parents[1] / "golden" / "runs"
COLORS, TEXTS = RUNS / "colors.jsonl", RUNS / "texts.jsonl"


def two_tasks(model: ak.LlamaAdapter, temperature: float) -> MultiTask:
    model.add_adapter("small", ak.AdapterConfig(adapter_dim=1, layers=[0]))
    return MultiTask(model, ["default", "small"], temperature=temperature)


Make = Callable[[ak.LlamaAdapter, Any], Task[Any]]
# run → how its task is made with a value, the value that it had, another one, what the message says
CASES: dict[str, tuple[Make, Any, Any, str]] = {
    "routing": (lambda m, cost: RoutedTask(m, RoutingConfig(experts=2, cost=cost)), 0.0, 5.0, "cost=0.0, not 5.0"),
    "multitask": (two_tasks, 2.0, 3.0, "temperature=2.0, not 3.0"),
    "distillation": (
        lambda m, t: Distillation(m, temperature=t, divergence="js"), 2.0, 7.0, "temperature=2.0, not 7.0",
    ),
    "keeping": (lambda m, weight: KeepBehaviour(m, weight=weight), 0.3, 0.9, "weight=0.3, not 0.9"),
}  # fmt: skip
DATA: dict[str, Any] = {
    "routing": COLORS,
    "multitask": {"default": COLORS, "small": COLORS},
    "distillation": TEXTS,
    "keeping": WithKept(COLORS, TEXTS),
}


@pytest.mark.parametrize("name", CASES)
def test_other_settings_are_refused(name: str, tmp_path: Path) -> None:
    make, same, other, message = CASES[name]
    run = shutil.copytree(RUNS / name, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    kind = "causal-lm" if name == "distillation" else "classification"
    how: dict[str, Any] = {"batch_size": 4, "max_length": 24, "max_steps": 4, "checkpoint_every": 2, "lr": 0.02}
    config = ak.TrainConfig(output_dir=run, resume=True, task=kind, plot=False, progress=False, log_every=1, **how)

    def resume(value: float) -> int:
        llama, tokenizer = load_backbone(RUNS / "backbone")
        model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=2, layers=[-1]))
        return train(model, DATA[name], config, tokenizer=tokenizer, task=make(model, value)).steps

    with pytest.raises(CheckpointError, match=message):
        resume(other)
    assert resume(same) == 4
