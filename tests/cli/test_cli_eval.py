"""``adapterkern eval`` on saved runs of every kind: those of an earlier version, which do not say their kind, too."""

import json
import shutil
from pathlib import Path

import pytest

from adapterkern import cli

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("distillation", "keeping")])
@pytest.mark.parametrize("checkpoint", ["", "checkpoints/step-00000004"], ids=["run", "checkpoint"])
def test_earlier_runs(
    name: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(GOLDEN)  # where the runs' sources.json has their backbone and data
    assert cli.main(["eval", f"{name}/{checkpoint}"]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    for key, value in EXPECTED[name].items():
        assert float(shown[key]) == pytest.approx(value, rel=1e-4, abs=6e-5), key


@pytest.mark.parametrize(("name", "metric"), [("distillation", "perplexity"), ("keeping", "accuracy")])
def test_a_distilled_model_is_evaluated_without_its_teacher(
    name: str, metric: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(GOLDEN)
    assert cli.main(["eval", name]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(shown[metric]) == pytest.approx(EXPECTED[name][metric], rel=1e-4, abs=6e-5)


def test_data_of_several_tasks_are_the_run_s_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(GOLDEN)
    assert cli.main(["eval", "multitask", "--data", "colors.jsonl"]) == 1
    assert "--data: expected none for a run of several tasks" in capsys.readouterr().err
    assert cli.main(["eval", "multitask/tasks/small", "--data", "colors.jsonl"]) == 0


def test_a_kind_of_another_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(GOLDEN / "classification", tmp_path / "run")
    task = json.loads((run / "task.json").read_text()) | {"kind": "MyTask"}
    (run / "task.json").write_text(json.dumps(task))
    monkeypatch.chdir(GOLDEN)
    with caplog.at_level("WARNING"):
        assert cli.main(["eval", str(run)]) == 0
    assert "evaluated as a plain Task, since 'MyTask' is not of this package" in caplog.text


def test_only_question_answering_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(GOLDEN)
    arguments = ["--data", "questions.jsonl", "--output", str(tmp_path / "answers.json")]
    assert cli.main(["qa", "predict", "classification", *arguments]) == 1
    assert "expected a run of question answering, got one of `adapterkern train`" in capsys.readouterr().err
    assert cli.main(["qa", "predict", "qa", *arguments]) == 0


def test_without_an_adapter_s_first_sites(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, evaluation = map(str, files)
    run, data = str(tmp_path / "run"), ["--model", str(model_folder), "--train", train, "--eval", evaluation]
    how = ["--adapter-dim", "4", "--layers=-2,-1", "--epochs", "1", "--lr", "1e-2", "--no-progress", "--no-plot"]
    assert cli.main(["train", *data, *how, "--adapter-drop", "1", "--output", run]) == 0
    capsys.readouterr()
    shown = []
    for skip in ("0", "1"):
        assert cli.main(["eval", run, "--skip-sites", skip]) == 0
        shown.append(dict(line.split() for line in capsys.readouterr().out.splitlines())["loss"])
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(shown[0]) == pytest.approx(metrics["loss"], rel=1e-3)
    assert shown[1] != shown[0]
    assert cli.main(["eval", run, "--skip-sites", "2"]) == 1
    assert "--skip-sites: expected fewer than the adapter's 2 sites, got 2" in capsys.readouterr().err
