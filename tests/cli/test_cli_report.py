"""``adapterkern eval --report``: what a classification gets wrong, for runs of every kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import adapterkern as ak
from adapterkern import cli
from adapterkern.inference import report as reports

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
COLORS = [json.loads(line) for line in (GOLDEN / "colors.jsonl").open()]


@pytest.fixture(autouse=True)
def in_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)  # where the runs' sources.json has their backbone and data


@pytest.fixture
def no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backbone can be loaded."""

    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("adapterkern.inference.runs.load_backbone", load)


def written(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert (directory / "confusion.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (directory / "wrong.jsonl").open()]
    return json.loads((directory / "report.json").read_text()), rows


@pytest.mark.parametrize(
    ("run", "folder", "metric"),
    [
        ("classification", "", "accuracy"),
        ("keeping", "", "accuracy"),
        ("routing", "", "accuracy"),
        ("multitask", "default", "default/accuracy"),
        ("multitask", "small", "small/accuracy"),
    ],
)
def test_it_is_what_predict_says(run: str, folder: str, metric: str, tmp_path: Path) -> None:
    assert cli.main(["eval", run, "--report", str(tmp_path / "report")]) == 0
    report, wrong = written(tmp_path / "report" / folder)
    assert report["accuracy"] == EXPECTED[run][metric]
    task = {"task": folder} if folder else {}
    found = ak.predict(run, [{"text": row["text"], **task} for row in COLORS])
    expected = [
        {"place": f"colors.jsonl:{line}", **row, "predicted": one.label, "probability": pytest.approx(one.probability)}
        for line, (row, one) in enumerate(zip(COLORS, found, strict=True), 1)
        if one.label != row["label"]
    ]
    assert wrong == sorted(expected, key=lambda row: -row["probability"].expected)
    assert [(one["label"], one["support"]) for one in report["labels"]] == [("no", 6), ("yes", 6)]
    assert sum(one["predicted"] for one in report["labels"]) == 12


def test_the_tables_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "classification"]) == 0
    output = capsys.readouterr()
    assert {line.split()[0] for line in output.out.splitlines()} == {
        "loss", "accuracy", "targets", "seconds", "tokens_per_second"
    }  # fmt: skip
    rows = [line.split() for line in output.err.splitlines()]
    assert ["'no'", "0.400", "0.333", "0.364", "6", "5"] in rows  # 2 of the 5 predicted, and of the 6 rows
    assert ["'yes'", "0.429", "0.500", "0.462", "6", "7"] in rows
    assert "7 of 12 rows are wrong" in output.err


def test_each_task_has_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "multitask"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines.index("default") < lines.index("small")
    assert lines.count("12 rows, 41.67 % right") == 2


def test_worst(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["route", "evaluate", "routing", "--report", str(tmp_path / "report"), "--worst", "1"]) == 0
    report, wrong = written(tmp_path / "report")
    assert (report["errors"], len(wrong)) == (6, 1)
    assert f"report in {tmp_path / 'report'}" in " ".join(capsys.readouterr().err.split())


def test_a_head_alone(model_folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = map(str, files)
    run, report = str(tmp_path / "run"), str(tmp_path / "report")
    options = ["--no-train-adapters", "--max-steps", "2", "--dtype", "fp32", "--no-progress"]
    assert cli.main(["train", "--model", str(model_folder), "--train", train, "--output", run, *options]) == 0
    assert cli.main(["eval", run, "--data", test, "--report", report]) == 0
    found, _ = written(Path(report))
    assert found["rows"] == 32
    assert [one["label"] for one in found["labels"]] == ["fruit", "metal"]


def test_rows_that_are_tokenized_have_the_text_of_their_tokens(tmp_path: Path) -> None:
    _, tokenizer = ak.load("classification")
    tokens = [{"input_ids": tokenizer(row["text"])["input_ids"], "label": row["label"]} for row in COLORS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tokens))
    for data in ("colors.jsonl", tmp_path / "data.jsonl"):
        report = tmp_path / Path(data).stem
        assert cli.main(["eval", "classification", "--data", str(data), "--report", str(report)]) == 0
    texts = [[row["text"] for row in written(tmp_path / name)[1]] for name in ("colors", "data")]
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("no_backbone")
@pytest.mark.parametrize("run", ["causal-lm", "qa", "distillation"])
def test_runs_without_labels_have_none(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", run, "--report", str(tmp_path / "report")]) == 1
    assert f"--report: expected a run with a classification head, got {run}" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("no_backbone")
def test_it_is_refused_before_the_backbone_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*options: str, run: str = "classification") -> str:
        assert cli.main(["eval", run, *options]) == 1
        return capsys.readouterr().err

    assert "--worst: has no effect without --report" in refused("--worst", "3")
    assert "--worst: expected an integer >= 0, got -1" in refused("--report", str(tmp_path / "new"), "--worst", "-1")
    (tmp_path / "file").touch()
    assert "--report: expected a folder, got the file" in refused("--report", str(tmp_path / "file"))
    (tmp_path / "small").mkdir()
    (tmp_path / "small/report.txt").write_text("mine")
    assert "--report: expected no report.txt in" in refused("--report", str(tmp_path), run="multitask")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--report: expected one process, got 2" in refused("--report", str(tmp_path / "new"))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None)
    assert "--report: expected scikit-learn" in refused("--report", str(tmp_path / "new"))


def test_scores_need_no_scikit_learn(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ImportError("report: expected scikit-learn")

    monkeypatch.setattr(reports, "check_installed", missing)
    assert cli.main(["eval", "classification"]) == 0
    output = capsys.readouterr()
    assert "accuracy           0.4167" in output.out
    assert "precision" not in output.err
    assert "expected scikit-learn" in caplog.text


def test_a_checkpoint_and_labels_that_are_booleans(tmp_path: Path) -> None:
    """Heads of 0.1.0 name these labels ``True`` and ``False``."""
    run = shutil.copytree(GOLDEN / "classification/checkpoints/step-00000004", tmp_path / "run")
    head = json.loads((run / "head_config.json").read_text()) | {"labels": ["False", "True"]}
    (run / "head_config.json").write_text(json.dumps(head))
    rows = [{"text": row["text"], "label": row["label"] == "yes"} for row in COLORS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", str(GOLDEN / "backbone"), "--report", str(tmp_path / "report")]
    assert cli.main(["eval", str(run), "--data", str(tmp_path / "data.jsonl"), *options]) == 0
    report, _ = written(tmp_path / "report")
    assert report["confusion"] == {"False": {"False": 2, "True": 4}, "True": {"False": 3, "True": 3}}
