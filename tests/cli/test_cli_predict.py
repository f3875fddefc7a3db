"""``adapterkern predict`` from a training to a table of labels, and on saved runs of every kind."""

import csv
import json
from pathlib import Path

import pytest

from adapterkern import cli

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_from_texts_to_labels(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = files
    run, new = tmp_path / "run", tmp_path / "new.csv"
    options = ["--adapter-dim", "4", "--lr", "1e-2", "--epochs", "4", "--no-progress", "--no-plot"]
    command = ["train", "--model", str(model_folder), "--train", str(train), "--eval", str(held_out)]
    assert cli.main([*command, "--output", str(run), *options]) == 0
    metrics = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    with new.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *([number, row["text"]] for number, row in enumerate(rows))])
    output = tmp_path / "predictions.csv"
    assert cli.main(["predict", str(run), "--data", str(new), "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{len(rows)} rows in {output}\n"
    found = rows_of(output)
    assert [(row["id"], row["text"]) for row in found] == [(str(n), row["text"]) for n, row in enumerate(rows)]
    right = sum(one["prediction"] == row["label"] for one, row in zip(found, rows, strict=True))
    assert right / len(rows) == pytest.approx(float(metrics["accuracy"]), abs=1e-4)
    assert all(0.5 <= float(one["probability"]) <= 1 for one in found)


@pytest.mark.parametrize(
    ("run", "data", "columns"),
    [
        ("classification", "colors.jsonl", {"prediction", "probability", "probabilities"}),
        ("routing", "colors.jsonl", {"prediction", "probability", "probabilities"}),
        ("multitask/tasks/small", "colors.jsonl", {"prediction", "probability", "probabilities"}),
        ("qa", "questions.jsonl", {"prediction", "score"}),
    ],
)
def test_every_kind(run: str, data: str, columns: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    output = tmp_path / "out.jsonl"
    more = [] if run == "qa" else ["--probabilities"]
    assert cli.main(["predict", run, "--data", data, "--output", str(output), *more]) == 0
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.items() <= one.items() for row, one in zip(rows, found, strict=True)] == [True] * len(rows)
    assert [one.keys() - row.keys() for row, one in zip(rows, found, strict=True)] == [columns] * len(rows)


def test_rows_name_their_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    data, output = tmp_path / "new.tsv", tmp_path / "out.tsv"
    data.write_text("text\ttask\nred\tsmall\nred\tdefault\n")
    assert cli.main(["predict", "multitask", "--data", str(data), "--output", str(output)]) == 0
    header, *lines = output.read_text().splitlines()
    assert header.split("\t") == ["text", "task", "prediction", "probability"]
    assert [line.split("\t")[:2] for line in lines] == [["red", "small"], ["red", "default"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "causal-lm --data texts.jsonl --output {tmp}/out.csv",
            "got a language model, which answers by `adapterkern generate`",
        ),
        (
            "qa --data questions.jsonl --output {tmp}/out.csv --text-column x",
            "--text-column: has no effect for a run of",
        ),
        (
            "qa --data questions.jsonl --output {tmp}/out.csv --probabilities",
            "--probabilities: has no effect on answers",
        ),
        ("classification --data colors.jsonl --output {tmp}/out.csv --label-column x", "--label-column: has no effect"),
        ("classification --data no.csv --output {tmp}/out.csv", "--data: no file no.csv"),
        ("classification --data colors.jsonl --output {tmp}/out.xlsx", "--output: expected a name that ends in .csv"),
        ("classification --data colors.jsonl --output {tmp}/no/out.csv", "--output: expected a file in a folder that"),
        ("classification --data {tmp}/bad.csv --output {tmp}/bad.csv", "--output: expected a file that is no part of"),
        ("classification --data texts.jsonl --output {tmp}/out.csv", "--data: texts.jsonl: column 'text' is missing"),
        (
            "classification --data {tmp}/bad.csv --output {tmp}/out.csv",
            "bad.csv:3: column 'text': expected a non-empty",
        ),
        ("multitask --data colors.jsonl --output {tmp}/out.csv", "column 'task': expected a task among"),
        ("colors.jsonl --data colors.jsonl --output {tmp}/out.csv", "expected the output folder of a training"),
    ],
)
def test_refused_before_anything_is_written(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(GOLDEN)
    (tmp_path / "bad.csv").write_text('text\nred\n""\n')
    assert cli.main(["predict", *line.format(tmp=tmp_path).split()]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]


def test_bad_rows_are_kept_without_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    data, output = tmp_path / "bad.csv", tmp_path / "out.csv"
    data.write_text('id,text\n1,""\n2,red\n')
    arguments = ["classification", "--data", str(data), "--output", str(output), "--skip-bad-rows"]
    assert cli.main(["predict", *arguments]) == 0
    found = rows_of(output)
    assert [(row["id"], bool(row["prediction"])) for row in found] == [("1", False), ("2", True)]
