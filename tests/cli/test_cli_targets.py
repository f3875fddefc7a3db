"""``--task multi-label`` and ``--task regression``: train, evaluate and predict by commands, and by transformers."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

import adapterkern as ak
from adapterkern import cli
from adapterkern.training.saved import load_run
from tests.support.commands import TOPICS

pytestmark = pytest.mark.slow

OPTIONS = ["--dtype", "fp32", "--no-progress", "--lr", "1e-2", "--max-steps", "40", "--eval-every", "20"]


def write(path: Path, task: str, count: int = 80) -> Path:
    """Three words each: the kinds of things that are named, or how many fruits, in a unit that is far from 1."""
    draw, words = random.Random(0), [word for topic in TOPICS.values() for word in topic]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            picks = draw.choices([*words, "the", "a"], k=3)
            kinds = [kind for kind, of in TOPICS.items() if set(picks) & set(of)]
            fruits = 1000 + 10 * sum(word in TOPICS["fruit"] for word in picks)
            writer.writerow([" and ".join(picks), json.dumps(kinds) if task == "multi-label" else fruits])
    return path


@pytest.fixture(scope="module", params=["multi-label", "regression"])
def run(request: Any, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The task, its rows, and a run that a command has trained, once in a process of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    data = write(folder / "rows.csv", request.param)
    command = ["train", "--model", model_folder, "--train", data, "--eval", "25%", "--output", folder / "run"]
    words = [*map(str, command), "--task", request.param, *OPTIONS]
    if request.param == "multi-label":
        assert cli.main(words) == 0
        summary = json.loads((folder / "run/data_summary.json").read_text())["train"]
        assert summary["counts"]["texts"] == 60
        assert summary["labels"].keys() == {"fruit", "metal"}
        return request.param, data, folder / "run"
    done = subprocess.run([sys.executable, "-m", "adapterkern", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "numbers from 1000 to 1030, mean 10" in done.stderr
    assert "accuracy" not in done.stdout + done.stderr
    return request.param, data, folder / "run"


def printed(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split() for line in text.splitlines())}


def test_what_it_has_learned_is_evaluated_and_reported(
    run: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, _, folder = run
    assert cli.main(["eval", str(folder), "--report", str(tmp_path / "report")]) == 0
    output = capsys.readouterr()
    found, report = printed(output.out), json.loads((tmp_path / "report/report.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    last = [record for record in history if record["kind"] == "eval"][-1]
    assert {name: last[name] for name in found.keys() - {"seconds", "tokens_per_second"}} == pytest.approx(
        {name: value for name, value in found.items() if name not in ("seconds", "tokens_per_second")}, abs=1e-3
    )
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert (folder / "training.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (tmp_path / "report/wrong.jsonl").open()]
    assert all(Path(row["place"]).name.startswith("rows.csv:") and " and " in row["text"] for row in rows)
    if task == "multi-label":
        assert found["f1_micro"] > 0.7  # of always the same labels 0.77 at most
        assert report["averages"]["micro"]["f1"] == pytest.approx(found["f1_micro"], abs=1e-4)
        assert [one["label"] for one in report["labels"]] == ["fruit", "metal"]
        assert "| f1_micro |" in card
        assert "with all labels right" in output.err
        assert not (tmp_path / "report/confusion.png").exists()
    else:
        assert found["r2"] > 0.5
        assert found["pearson"] > 0.7
        assert report["numbers"]["rmse"] == pytest.approx(found["rmse"], abs=1e-4)
        assert "Spearman" in output.err
        assert "accuracy" not in card
        assert (tmp_path / "report/predicted.png").stat().st_size > 1000


def test_predictions_are_those_of_transformers(run: tuple[str, Path, Path], tmp_path: Path) -> None:
    task, data, folder = run
    more = ["--probabilities"] * (task == "multi-label")
    assert cli.main(["predict", str(folder), "--data", str(data), "--output", str(tmp_path / "out.csv"), *more]) == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:8]
    model, tokenizer = ak.load(folder)
    found = ak.predict(model, [{"text": row["text"]} for row in rows])
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    answers = [{one["label"]: one["score"] for one in of_row} for of_row in classify([row["text"] for row in rows])]
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    for row, one, answer in zip(rows, found, answers, strict=True):
        if task == "multi-label":
            probabilities = {name: float(row[f"probability {name}"]) for name in ("fruit", "metal")}
            assert row["prediction"] == json.dumps([name for name, p in probabilities.items() if p > 0.5])
            assert one.labels == json.loads(row["prediction"])
            assert answer == pytest.approx(probabilities, rel=1e-4)
            assert one.probabilities == pytest.approx(probabilities, rel=1e-4)
        else:
            assert row.keys() == {"text", "label", "prediction"}
            assert answer == {"value": pytest.approx(float(row["prediction"]), rel=1e-5)}
            assert one.value == pytest.approx(float(row["prediction"]), rel=1e-5)
    wanted = [[float(name in row["label"]) for name in ("fruit", "metal")] for row in rows]
    labels = torch.tensor(wanted if task == "multi-label" else [float(row["label"]) for row in rows])
    loss = model(inputs["input_ids"], inputs["attention_mask"], labels=labels).loss.item()
    if task == "regression":
        errors = [float(row["prediction"]) - float(row["label"]) for row in rows]
        assert loss == pytest.approx(sum(e * e for e in errors) / 8, rel=1e-3)


def test_it_goes_on_from_its_head_and_from_a_checkpoint(
    run: tuple[str, Path, Path], model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, data, folder = run
    options = [
        "--train",
        str(data),
        "--dtype",
        "fp32",
        "--no-progress",
        "--max-steps",
        "1",
        "--lr=1e-30",
        "--head-lr=1e-30",
    ]
    more = ["train", "--model", str(model_folder), "--from", str(folder), *options]
    assert cli.main([*more, "--output", str(tmp_path / "next"), "--task", task]) == 0
    (_, before), (_, after) = load_run(folder), load_run(tmp_path / "next")
    assert before is not None
    assert after is not None
    assert before.linear.weight.equal(after.linear.weight)
    assert [vars(one).get("mean") for one in (before, after)] == [getattr(before, "mean", None)] * 2
    assert cli.main(["train", "--resume", "--output", str(folder)]) == 0
    other = {"multi-label": "regression", "regression": "multi-label"}[task]
    data = write(tmp_path / "other.csv", other)
    words = [*more, "--output", str(tmp_path / "other"), "--task", other, "--dry-run"]
    assert cli.main([str(data) if word.endswith("rows.csv") else word for word in words]) == 0
    assert f"--from: the head starts anew, since the saved one is for {task}, not {other}" in caplog.text


def test_what_is_refused_before_the_backbone_is_loaded(
    run: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, data, folder = run

    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("loaded")

    for home in ("model.backbone", "inference.runs"):
        monkeypatch.setattr(f"adapterkern.{home}.load_backbone", load)

    def refused(*words: str) -> str:
        assert cli.main([*words]) == 1
        return capsys.readouterr().err

    new = ["--output", str(tmp_path / "new")]
    backbone = ["--model", str(folder.parent), "--train", str(data)]
    monkeypatch.setattr("adapterkern.model.backbone.check_source", lambda *_: None)
    of_task = ["--task", task, *new]
    assert "--prompt-column: has no effect with --task" in refused("train", *backbone, *of_task, "--prompt-column", "p")
    keep = [*backbone, "--keep", str(data), *of_task]
    assert "--task: expected classification or causal-lm beside texts to keep" in refused("distill", *keep)
    several = ["--model", str(folder), "--data", "a", str(data), *of_task]
    assert "--task: expected classification or causal-lm for several tasks" in refused("multitask", *several)
    wrong = write(tmp_path / "wrong.csv", {"multi-label": "regression", "regression": "multi-label"}[task])
    said = refused("train", "--model", str(folder), "--train", str(wrong), *of_task)
    assert "--train: " in said
    assert "wrong.csv:2: column 'label': expected " in said
    said = refused("eval", str(folder), "--data", str(wrong))
    assert "wrong.csv:2: column 'label': expected " in said
    if task == "regression":
        out = ["--data", str(data), "--output", str(tmp_path / "out.csv")]
        assert "--probabilities: has no effect on numbers" in refused("predict", str(folder), *out, "--probabilities")
    assert not (tmp_path / "new").exists()
