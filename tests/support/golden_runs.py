"""The runs in tests/golden/runs, saved by an earlier version: their backbone, their data, their expected metrics."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterkern.model.backbone import load_backbone
from adapterkern.training import TrainConfig
from adapterkern.training.run.checkpoint import checkpoints

RUNS = Path(__file__).parents[1] / "golden" / "runs"
COLORS, TEXTS, QUESTIONS = (RUNS / f"{name}.jsonl" for name in ("colors", "texts", "questions"))


def backbone() -> tuple[Any, Any]:
    """A new LLaMA, and its tokenizer."""
    return load_backbone(RUNS / "backbone")


def check(name: str, metrics: dict[str, float]) -> None:
    """``metrics`` must be those that the run ``name`` had at its end."""
    expected = json.loads((RUNS / "expected.json").read_text())[name]
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def cut(name: str, target: Path) -> Path:
    """A copy of the run ``name`` as if it had been killed before its last checkpoint."""
    shutil.copytree(RUNS / name, target)
    newest = checkpoints(target)[-1]
    assert newest.name == "step-00000004"
    shutil.rmtree(newest)
    return target


def config(**values: Any) -> TrainConfig:
    """As tests/golden/make_runs.py has it."""
    settings = {"batch_size": 4, "max_length": 24, "max_steps": 4, "checkpoint_every": 2, "log_every": 1, "lr": 0.02}
    return TrainConfig(**(settings | {"progress": False, "plot": False} | values))
