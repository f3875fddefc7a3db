"""The best evaluation: found, kept through interruptions, saved and returned; patience; runs that are made longer."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

import adapterkern as ak
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import CheckpointError, TrainResult, evaluate, load_run, read_metrics, train
from adapterkern.training.run.best import Best
from adapterkern.training.run.checkpoint import checkpoints
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS, EVAL_ROWS = tiny_run.rows(24), tiny_run.rows(16, seed=1)
# Of the 8 evaluations of 16 steps that overfit 24 rows; without a schedule a run of fewer steps is the same so far.
VALUES: dict[str, Any] = {"max_steps": 16, "eval_every": 2, "log_every": 2, "checkpoint_every": 3, "lr": 5e-2}
VALUES |= {"schedule": "constant", "warmup": 2}


def run(directory: Path | None, model: LlamaAdapter | None = None, callbacks: Any = (), **values: Any) -> TrainResult:
    config = tiny_run.quiet(output_dir=directory, **(VALUES | values))
    model = model or tiny_run.model()
    return train(model, ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS, callbacks=callbacks)


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


class Dies(ak.Callback):
    """Ends the process, as far as the run can tell, at the log line of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            raise KeyboardInterrupt


def test_what_the_best_evaluation_saw_is_saved_and_returned(tmp_path: Path) -> None:
    model = tiny_run.model()
    result = run(tmp_path / "run", model, best="loss", keep_checkpoints=1, plot=True)
    losses = {r["step"]: r["loss"] for r in result.history if r["kind"] == "eval"}
    best = min(losses, key=lambda step: losses[step])
    assert (result.steps, result.best_step, result.ended) == (16, best, None)
    assert 0 < best < 16
    assert result.metrics is not None
    assert result.metrics["loss"] == losses[best]

    plain = tiny_run.model()
    alone = run(None, plain, max_steps=best)  # the same steps, and no more
    expected = tiny_run.weights(plain, alone.head)
    assert tiny_run.same_bits(tiny_run.weights(model, result.head), expected)
    config, head = load_run(tmp_path / "run")
    saved = LlamaAdapter.from_pretrained(tiny_run.model().unload(), tmp_path / "run")
    assert tiny_run.same_bits(tiny_run.weights(saved, head), expected)
    again = evaluate(saved, EVAL_ROWS, config, tokenizer=TOKENIZER, head=head)
    assert again["loss"] == pytest.approx(losses[best], rel=1e-6)

    # The checkpoints of the last step and of the best evaluation; card and metrics.jsonl say which was saved.
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "run")] == [best, 16]
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"Saved is step {best}, the best of 8 evaluations by loss ({losses[best]:.4g})." in card
    assert f"Evaluation at step {best}." in card
    assert [r["step"] for r in result.history if r.get("best")][-1] == best
    assert (tmp_path / "run" / "training.png").exists()

    # A finished run, resumed, is as it was; and longer it still has its best.
    before = timeless(result.history)
    other = run(tmp_path / "run", best="loss", keep_checkpoints=1, resume=True)
    assert timeless(other.history) == before
    assert tiny_run.same_bits(tiny_run.weights(None, other.head), expected[-2:])
    longer = run(tmp_path / "run", best="loss", keep_checkpoints=1, resume=True, max_steps=18)
    assert (longer.steps, longer.best_step) == (18, best)
    assert tiny_run.same_bits(tiny_run.weights(None, longer.head), expected[-2:])


def test_the_best_survives_an_interruption(tmp_path: Path) -> None:
    """Killed at step 14, after the checkpoint of step 12 and the best evaluation before that."""
    whole_model, model = tiny_run.model(), tiny_run.model(seed=9)
    whole = run(None, whole_model, best="loss")  # in memory alone
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, best="loss", keep_checkpoints=1, callbacks=[Dies(14)])
    model.base.load_state_dict(tiny_run.model().base.state_dict())
    resumed = run(tmp_path, model, best="loss", keep_checkpoints=1, resume=True)
    assert resumed.best_step is not None
    assert whole.best_step == resumed.best_step < 12
    assert tiny_run.same_bits(tiny_run.weights(model, resumed.head), tiny_run.weights(whole_model, whole.head))
    assert timeless(whole.history) == timeless(read_metrics(tmp_path / "metrics.jsonl"))

    folder = tmp_path / "checkpoints" / f"step-{resumed.best_step:08d}"
    folder.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=f"step-{resumed.best_step:08d}: missing: the checkpoint of the run's b"):
        run(tmp_path, best="loss", resume=True)


def test_patience_ends_a_run_which_is_then_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(None, best="loss")
    assert whole.best_step is not None
    first = run(tmp_path, best="loss", patience=2)
    end = whole.best_step + 4
    assert (first.steps, first.best_step, first.stopped) == (end, whole.best_step, False)
    assert first.ended == f"2 evaluations without a better loss than that of step {whole.best_step}"
    assert timeless(first.history) == [r for r in timeless(whole.history) if r["step"] <= end]  # the same schedule
    with caplog.at_level(logging.INFO, "adapterkern"):
        again = run(tmp_path, best="loss", patience=2, resume=True)
    assert f"ended early, after step {end} of 16: {first.ended}" in caplog.text
    assert f"saved: step {whole.best_step}, the best of " in caplog.text
    assert timeless(again.history) == timeless(first.history)
    more = run(tmp_path, best="loss", patience=9, resume=True)
    assert (more.steps, timeless(more.history)) == (16, timeless(whole.history))


@pytest.mark.parametrize(
    ("metric", "values", "steps", "since"),
    [
        ("loss", [3.0, 2.0, 2.0, 2.5], [1, 2, 2, 2], 2),
        ("accuracy", [0.5, 0.75, 0.75, 0.5], [1, 2, 2, 2], 2),  # of two equal ones the earlier
        ("small/perplexity", [math.nan, 9.0, 8.0, math.nan], [0, 2, 3, 3], 1),
        ("f1", [-math.inf, 0.1, 0.2, 0.3], [1, 2, 3, 4], 0),
    ],
)
def test_what_is_better(metric: str, values: list[float], steps: list[int], since: int) -> None:
    best = Best(metric)
    found = []
    for step, value in enumerate(values, start=1):
        best.update(step, {metric: value})
        best = Best.from_dict(json.loads(json.dumps(best.to_dict())))
        best.update(step, {metric: math.inf if metric == "f1" else -1.0})  # a step that was counted before
        found.append(best.step)
    assert (found, best.since, best.evaluations) == (steps, since, 4)


def test_refusals_come_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"best: expected a metric of the evaluations: loss or accuracy; got 'f1'"):
        run(tmp_path, best="f1")
    with pytest.raises(ValueError, match="got 'seconds'"):
        run(None, best="seconds")
    with pytest.raises(ValueError, match=r"best: expected a metric .*: small/loss; got 'small/targets'"):
        Best("small/targets").update(1, {"small/loss": 1.0, "small/targets": 3})
    with pytest.raises(ValueError, match="best: expected eval_data, to find the best evaluation of, got 'loss'"):
        train(tiny_run.model(), ROWS, tiny_run.quiet(best="loss"), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"patience: expected a metric .*, such as best='loss', got 3 alone"):
        tiny_run.quiet(patience=3)
    assert not (tmp_path / "metrics.jsonl").exists()
    run(tmp_path, best="loss", max_steps=4)
    with pytest.raises(CheckpointError, match="was begun with best='loss', not 'accuracy'"):
        run(tmp_path, best="accuracy", max_steps=4, resume=True)


# Longer runs


def test_a_finished_run_is_made_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a schedule it is the longer run to the bit; with one it has that run's learning rates from there."""
    long_model, model = tiny_run.model(), tiny_run.model()
    whole = run(None, long_model)
    run(tmp_path / "constant", max_steps=10)
    resumed = run(tmp_path / "constant", model, resume=True)
    assert tiny_run.same_bits(tiny_run.weights(model, resumed.head), tiny_run.weights(long_model, whole.head))

    values: dict[str, Any] = {"schedule": "linear", "max_steps": None, "log_every": 1, "best": None}
    whole = run(None, epochs=3, **values)  # 6 steps each
    first = run(tmp_path / "linear", epochs=2, **values)
    longer = run(tmp_path / "linear", epochs=3, resume=True, **values)
    rates = [[r["lr"] for r in result.history if r["kind"] == "train"] for result in (whole, first, longer)]
    assert rates[2] == rates[1] + rates[0][12:]
    assert rates[1][-1] == 0 < rates[2][12]
    # by hand: lr · (N − n) / (N − w) at n = 12 of N = 18 with w = 2
    said = f"from 0 to {5e-2 * 6 / 16:.3g}"
    length = "resumed from step 12 of 12, extended to 18 steps: the linear schedule goes on as that of 18, and"
    assert length in caplog.text
    assert said in caplog.text
    assert json.loads((tmp_path / "linear" / "task.json").read_text())["config"]["epochs"] == 3
    with pytest.raises(CheckpointError, match=r"expected at least the 18 steps that are done, got 12, with epochs=2"):
        run(tmp_path / "linear", epochs=2, resume=True, **values)
    with pytest.raises(
        CheckpointError, match=r"expected at least the 18 steps that are done, got 17, with max_steps=17"
    ):
        run(tmp_path / "linear", resume=True, **(values | {"max_steps": 17}))


def test_a_stopped_run_may_end_sooner(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[Dies(12)])
    shorter = run(tmp_path, max_steps=11, resume=True)
    assert (shorter.steps, shorter.stopped) == (11, False)
    ended = run(tmp_path, max_steps=11, resume=True)
    assert ended.metrics is not None
    assert shorter.metrics is not None
    assert ended.metrics["loss"] == shorter.metrics["loss"]
