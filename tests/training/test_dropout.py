"""A training with dropout: a resumed one drops what the uninterrupted one dropped, and an evaluation nothing."""

from pathlib import Path
from typing import Any

import pytest

import adapterkern as ak
from tests.support import tiny_run
from tests.support.runs import cut, records, same


def run(folder: Path | None, dropout: float = 0.3, **settings: Any) -> ak.training.TrainResult:
    model = tiny_run.model(layers=(2, 3), dropout=dropout, init="xavier")
    settings = {"max_steps": 6, "batch_size": 4, "checkpoint_every": 3, "log_every": 1} | settings
    config = tiny_run.quiet(output_dir=folder, keep_checkpoints=9, **settings)
    rows = tiny_run.rows(16)
    result = ak.train(model, rows, config, tokenizer=tiny_run.tokenizer(), eval_data=rows[:6])
    found = [ak.evaluate(model, rows[:6], tiny_run.quiet(), tokenizer=tiny_run.tokenizer(), head=result.head)]
    assert result.metrics is not None
    assert found[0]["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
    return result


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in history if record["kind"] == "train"]


def test_a_resumed_run_drops_what_the_uninterrupted_one_dropped(tmp_path: Path) -> None:
    run(tmp_path / "whole", prefix_cache=True)
    cut(tmp_path / "whole", tmp_path / "resumed")
    run(tmp_path / "resumed", prefix_cache=True, resume=True)
    same(tmp_path / "resumed", tmp_path / "whole", 0)
    found = losses(records(tmp_path / "whole"))
    # Neither the prefix cache nor recomputing changes what is drawn.
    assert losses(run(None, prefix_cache=False, checkpoint_activations=True).history) == pytest.approx(found, rel=1e-5)
    assert losses(run(None, dropout=0.0).history) != pytest.approx(found, rel=1e-3)
