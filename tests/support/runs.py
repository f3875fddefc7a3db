"""What runs have left: cut short, read, compared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapterkern as ak
from tests.support import tiny_run


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
        for key in {"loss", "grad_norm", "lr", "accuracy", "targets", "drift"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (a["step"], key)
    for key, tensor in trained(one).items():
        torch.testing.assert_close(trained(run)[key], tensor, atol=tolerance, rtol=tolerance)


def check_learned(folder: Path, **fields: Any) -> tuple[ak.LlamaAdapter, Callable[..., Any]]:
    """Train such an adapter, with a prefix of one layer cached and without; load it, and resume it.

    Returns its model, and what trains another one in ``folder``.
    """
    rows = tiny_run.rows(12)

    def run(model: ak.LlamaAdapter, **values: Any) -> Any:
        # eps: without it Adam makes a full step of a gradient that is 0 but for rounding, which depends on the CPU
        config = tiny_run.quiet(output_dir=folder, checkpoint_every=2, eps=1e-4, **values)
        return ak.train(model, rows, config, tokenizer=tiny_run.tokenizer())

    model, uncached = tiny_run.model(**fields), tiny_run.model(**fields)
    before = tiny_run.weights(model)
    run(uncached, prefix_cache=False, overwrite=True)
    result = run(model, prefix_cache=True, overwrite=True)
    assert result.prefix_layers == 1
    assert all((p != q).any() for p, q in zip(tiny_run.weights(model), before, strict=True))
    torch.testing.assert_close(tiny_run.weights(model), tiny_run.weights(uncached), rtol=1e-4, atol=1e-5)

    loaded = ak.LlamaAdapter.from_pretrained(tiny_run.model().unload(), folder)
    assert loaded.adapter_config() == model.adapter_config()
    assert tiny_run.same_bits(tiny_run.weights(loaded), tiny_run.weights(model))
    assert result.checkpoint is not None
    shutil.rmtree(result.checkpoint)
    resumed = tiny_run.model(**fields)
    run(resumed, prefix_cache=True, resume=True)
    assert tiny_run.same_bits(tiny_run.weights(resumed), tiny_run.weights(model))
    return model, run
