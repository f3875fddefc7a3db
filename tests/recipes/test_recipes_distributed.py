"""Every kind of task on two processes with gloo, by DDP and by FSDP2: the numbers of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkern.recipes.distillation import Distillation, KeepBehaviour, WithKept
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.training import processes, train
from adapterkern.training.task import Task
from tests.support import pair, tiny_recipes, tiny_run

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

TEXTS = [{"text": row["text"]} for row in tiny_run.rows(7, seed=3)]
ROWS = tiny_run.rows(11)
# One task has a row in few steps only, so that a step, or one process's part of it, has none of it.
MANY = {"a": tiny_run.rows(11, seed=4), "b": tiny_run.rows(3, seed=5), "c": tiny_run.rows(5, seed=6)}


def multitask() -> tuple[Task[Any], Any]:
    return MultiTask(tiny_recipes.many_adapters(), list(MANY)), MANY


def routed(**routing: Any) -> tuple[Task[Any], Any]:
    return tiny_recipes.routed(noise=0.5, balance=0.3, cost=0.2, free_epochs=1, **routing), ROWS


def distilled() -> tuple[Task[Any], Any]:
    return Distillation(tiny_run.model(), tiny_run.model(seed=1).base, temperature=2.0, chunk_tokens=5), TEXTS


def rolled() -> tuple[Task[Any], Any]:
    """Half of the steps: each process generates its own rows, and the last step of an epoch has 3."""
    rows = [{"prompt": f"w{i} w{i + 2} w{i * 2}", "completion": f"w{i + 40} w{i}"} for i in range(11)]
    settings: Any = {"on_policy": 0.5, "max_new_tokens": 6, "divergence": "reverse-kl", "weight": 0.9}
    return Distillation(tiny_run.model(init="xavier"), **settings), rows


def kept() -> tuple[Task[Any], Any]:
    """The teacher is the model itself, its adapters off; a forward, or all of a process's, may have no text to keep."""
    return KeepBehaviour(tiny_run.model(init="xavier")), WithKept(ROWS, TEXTS)


TASKS: dict[str, Callable[[], tuple[Task[Any], Any]]] = {
    "multitask": multitask,
    "routed": routed,
    "routed to two, or none, by probability": lambda: routed(top_k=2, gate="probability"),
    "each token routed to two, or none": lambda: routed(top_k=2, per="token"),
    "distilled": distilled,
    "rolled": rolled,
    "kept": kept,
}
WHOLE = {"rolled"}  # which a sharded model cannot be


def outcome(name: str, folder: Path | None = None, **values: Any) -> dict[str, Any]:
    """Of 7 steps, each clipped: losses, norms, metrics, and what has been learned."""
    torch.manual_seed(0)
    task, rows = TASKS[name]()
    kind = "causal-lm" if name in ("distilled", "rolled") else "classification"
    settings = {"task": kind, "batch_size": 2, "accumulation": 2, "max_steps": 7, "epochs": 9, "max_norm": 0.03}
    # eps: where a gradient is almost 0, Adam makes any step of its rounding.
    config = tiny_run.quiet(**(settings | {"log_every": 1, "eps": 1e-4, "output_dir": folder} | values))
    parameters = {}
    how: dict[str, Any] = {"tokenizer": tiny_run.tokenizer(), "eval_data": rows, "drift_data": TEXTS}
    result = train(task.model, rows, config, task=task, **how)
    assert result.metrics is not None
    for key, p in task.trained(config).items():
        parameters[key] = processes.gathered(p.detach()).clone()
    steps = [record for record in result.history if record["kind"] == "train"]
    timeless = {key: value for key, value in result.metrics.items() if "second" not in key}
    return {
        "losses": [record["loss"] for record in steps],
        "norms": [record["grad_norm"] for record in steps],
        "metrics": timeless,
        "parameters": parameters,
    }


def work(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name in TASKS:
        found[name] = outcome(name, folder / name)
        found |= {} if name in WHOLE else {f"{name} shard": outcome(name, shard=True)}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pair.start(work, folder)
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_learn_as_one(folder: Path, name: str) -> None:
    expected = outcome(name)
    assert min(expected["norms"]) > 0.03
    for rank in range(2):
        both = pair.found(folder, rank)
        for got in (both[name], both.get(f"{name} shard", both[name])):
            for key in ("losses", "norms"):
                assert got[key] == pytest.approx(expected[key], rel=1e-5), (rank, key)
            assert got["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6)
            for key, p in expected["parameters"].items():
                torch.testing.assert_close(got["parameters"][key], p, atol=5e-6, rtol=1e-4)
