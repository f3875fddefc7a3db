"""``adapterkern train``: the best evaluation, early stopping, weighted labels, and a run that is made longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adapterkern import cli
from tests.support.runs import records


def test_the_best_is_saved_and_a_resumed_run_is_longer(
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    options = ["--model", str(model_folder), "--train", str(files[0]), "--eval", str(files[1]), "--output", str(run)]
    options += ["--adapter-dim", "4", "--layers=-1", "--max-steps", "4", "--eval-every", "1", "--warmup", "0"]
    options += ["--best", "accuracy", "--class-weights", "balanced", "--label-smoothing", "0.1", "--no-plot"]
    process = subprocess.run([sys.executable, "-m", "adapterkern", "train", *options], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    evaluations = {r["step"]: r["accuracy"] for r in records(run) if r["kind"] == "eval"}
    best = max(evaluations, key=lambda step: evaluations[step])
    assert f"saved: step {best}, the best of 4 evaluations by accuracy ({evaluations[best]:.4g})" in process.stderr
    assert f" parameters of step {best}, 4 steps in " in process.stdout
    assert f"accuracy           {evaluations[best]:.4f}" in process.stdout

    # Longer by other words than it was begun with, and then without a word.
    assert cli.main(["train", "--resume", "--output", str(run), "--epochs", "2", "--lr=1e-2"]) == 1
    assert "begun with --lr 0.006, not 0.01: resume with the same value" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--output", str(run), "--epochs", "2"]) == 0
    goes_on = "the linear schedule goes on as that of 8, and the learning rate jumps from 0 to 0.003"
    assert f"resumed from step 4 of 4, extended to 8 steps: {goes_on}" in caplog.messages
    settings = json.loads((run / "task.json").read_text())["config"]
    assert (settings["epochs"], settings["max_steps"], settings["best"]) == (2, None, "accuracy")
    steps = [r["step"] for r in records(run) if r["kind"] == "eval"]
    assert steps == list(range(1, 9))
    assert cli.main(["train", "--resume", "--output", str(run)]) == 0
    assert [r["step"] for r in records(run) if r["kind"] == "eval"] == steps
    assert cli.main(["train", "--resume", "--output", str(run), "--max-steps", "7"]) == 1
    assert "expected at least the 8 steps that are done, got 7, with --max-steps 7" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--output", str(run), "--patience", "1", "--epochs", "9"]) == 0
    assert "ended early, after step 8 of 36: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("train", "--best loss", "--best: has no effect without --eval: expected no --best, got loss"),
        ("train", "--patience 2 --eval E", "such as --best loss, got 2 alone"),
        ("train", "--class-weights even", "--class-weights: expected balanced, got 'even'"),
        ("train", "--task causal-lm --class-weights balanced", "--class-weights: has no effect with --task causal-lm"),
        ("train", "--log-with tensorbord", "--log-with: expected trackers among aim, "),
        ("train", "--metric-for-best-model f1", "unknown --metric-for-best-model (did you mean --best?)"),
        ("train", "--report-to wandb", "unknown --report-to (did you mean --log-with?)"),
        ("qa train", "--label-smoothing 0.1", "unknown --label-smoothing"),
        ("distill", "--class-weights balanced", "unknown --class-weights"),
    ],
)
def test_refusals_name_the_option(
    command: str,
    options: str,
    message: str,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the backbone is loaded: there is none."""
    typed = [str(files[1]) if word == "E" else word for word in options.split()]
    arguments = ["--model", str(tmp_path), "--train", str(files[0]), "--output", str(tmp_path / "run")]
    assert cli.main([*command.split(), *arguments, *typed]) in (1, 2)
    assert message in capsys.readouterr().err
