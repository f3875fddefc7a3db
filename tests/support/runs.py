"""What runs have left: cut short, read, compared."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def cut(run: Path, target: Path) -> None:
    """The run as if it had been killed after step 3."""
    shutil.copytree(run, target)
    for checkpoint in sorted((target / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    assert [path.name for path in (target / "checkpoints").iterdir()] == ["step-00000003"]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(run.glob("*.safetensors"))
    assert files
    return {f"{path.name} {key}": tensor for path in files for key, tensor in load_file(path).items()}


def same(run: Path, one: Path, tolerance: float) -> None:
    """Every loss, global clip norm, learning rate and evaluation, and what was learnt."""
    got, expected = records(run), records(one)
    assert [(r["kind"], r["step"]) for r in got] == [(r["kind"], r["step"]) for r in expected]
    for a, b in zip(got, expected, strict=True):
        for key in {"loss", "grad_norm", "lr", "accuracy", "targets"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (a["step"], key)
    for key, tensor in trained(one).items():
        torch.testing.assert_close(trained(run)[key], tensor, atol=tolerance, rtol=tolerance)
