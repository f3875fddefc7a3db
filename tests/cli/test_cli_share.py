"""``--eval 10%``: trained, and evaluated on the same rows again by ``adapterkern eval``."""

import json
import re
from pathlib import Path

import pytest

from adapterkern import cli
from tests.support import tiny_qa
from tests.support.commands import accuracy

pytestmark = pytest.mark.slow

SMALL = ["--adapter-dim", "4", "--layers=-2,-1", "--batch-size", "8", "--no-progress", "--no-plot", "--epochs", "1"]


def metrics(text: str) -> dict[str, float]:
    return {m[1]: float(m[2]) for m in re.finditer(r"^(loss|accuracy|targets|exact|f1) +(\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--task", "classification"],
        ["train", "--task", "causal-lm"],
        ["route", "train", "--experts", "2"],
        ["distill", "--keep", "{train}", "--task", "classification"],
    ],
)
def test_eval_gives_the_numbers_of_the_training(
    command: list[str],
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    named = [word.format(train=files[0]) for word in command]
    data = ["--model", str(model_folder), "--train", str(files[0]), "--eval", "25%", "--output", str(tmp_path)]
    assert cli.main([*named, *data, *SMALL, "--seed", "5"]) == 0
    trained = metrics(capsys.readouterr().out)
    assert ("train kept  64 texts" in caplog.text) == ("--keep" in command)  # which are no part of a file
    saved = json.loads((tmp_path / "sources.json").read_text())["eval_data"]
    assert (saved["train_data"], saved["share"], saved["seed"]) == (str(files[0]), "25%", 5)
    assert cli.main(["eval", str(tmp_path)]) == 0
    again = metrics(capsys.readouterr().out)
    assert again["targets"] == trained["targets"] > 0
    assert again == pytest.approx({name: trained[name] for name in again}, abs=2e-4)


def test_the_report_has_the_texts_of_the_share(model_folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    run, report = tmp_path / "run", tmp_path / "report"
    data = ["--model", str(model_folder), "--train", str(files[0]), "--eval", "25%", "--output", str(run)]
    assert cli.main(["train", *data, "--max-steps", "1", "--adapter-dim", "4", "--no-progress", "--no-plot"]) == 0
    assert cli.main(["eval", str(run), "--report", str(report)]) == 0
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    wrong = [json.loads(line) for line in (report / "wrong.jsonl").read_text().splitlines()]
    assert wrong
    for one in wrong:
        name, _, line = one["place"].rpartition(":")
        assert name.endswith(files[0].name)
        assert {"text": one["text"], "label": one["label"]} == rows[int(line) - 1]


def test_questions_of_one_context_stay_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_qa.TOKENIZER.save_pretrained(tmp_path / "model")
    tiny_qa.model().unload().save_pretrained(tmp_path / "model")
    command = ["qa", "train", "--model", str(tmp_path / "model"), "--train", str(tiny_qa.EXAMPLES), "--eval", "40%"]
    assert cli.main([*command, "--output", str(tmp_path / "run"), "--null-threshold", "0", *SMALL]) == 0
    trained = metrics(capsys.readouterr().out)
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    again = metrics(capsys.readouterr().out)
    assert again == pytest.approx({name: trained[name] for name in again}, abs=2e-4)


def test_a_checkpoint_knows_its_rows_and_changed_ones_are_refused(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(files[0].read_text())
    run = tmp_path / "run"
    data = ["--model", str(model_folder), "--train", str(train), "--eval", "25%", "--output", str(run)]
    assert cli.main(["train", *data, *SMALL]) == 0
    trained = accuracy(capsys.readouterr().out)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert cli.main(["eval", str(checkpoint)]) == 0
    assert accuracy(capsys.readouterr().out) == pytest.approx(trained, abs=5e-5)
    train.write_text("".join(files[0].read_text().splitlines(keepends=True)[:-8]))
    assert cli.main(["eval", str(run)]) == 1
    assert "train.jsonl: expected the rows of the training, of which 25% were held out" in capsys.readouterr().err
    assert cli.main(["eval", str(run), "--data", str(files[1])]) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "train --train {train} --eval 100%",
            "--eval: expected a share above 0% and below 100%, such as 10%, got '100%'",
        ),
        (
            "train --train {train} --eval 0.1",
            "--eval: expected data, or a share of the training rows such as '10%', got ",
        ),
        (
            "train --train {train} --eval 0.5%",
            "--eval: expected a share that leaves rows to learn and rows to evaluate",
        ),
        ("train --train 10%", "--train: expected a file, got 10%"),
        (
            "multitask --data a {train} 10%",
            "--data a: expected a file, got 10%: a share of --train is for --eval of a si",
        ),
        (
            "distill --train {train} --keep {train} --eval 10% --eval-keep {train}",
            "--eval: expected a file together with --eval-keep, got a share of --train, 10%",
        ),
    ],
)
def test_refusals(
    line: str,
    message: str,
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = line.format(train=files[0]).split()
    output = tmp_path / "run"
    assert cli.main([*words, "--model", str(model_folder), "--output", str(output)]) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("command", [["demo"], ["ablate"]])
def test_other_commands_take_files_alone(
    command: list[str], model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--model", str(model_folder), "--train", str(files[0]), "--eval", "10%", "--output", str(tmp_path / "x")]
    assert cli.main([*command, *data]) == 1
    assert "--eval: " in (said := capsys.readouterr().err)
    assert "10%" in said
