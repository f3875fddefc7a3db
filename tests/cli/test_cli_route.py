"""``adapterkern route`` as a user types it."""

import json
from pathlib import Path

import pytest

from adapterkern import cli
from tests.support.commands import TOPICS, accuracy


def train(model: Path, data: tuple[Path, Path], output: Path, *options: str) -> int:
    arguments = ["route", "train", "--model", str(model), "--train", str(data[0]), "--eval", str(data[1])]
    arguments += ["--output", str(output), "--adapter-dim", "4", "--layers=-2,-1", "--batch-size", "8"]
    return cli.main([*arguments, "--lr", "0.02", "--epochs", "4", "--no-progress", "--no-plot", *options])


def test_trains_and_evaluates_to_the_same_numbers(
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    assert train(model_folder, files, output, "--experts", "3", "--cost", "0.01") == 0
    trained = capsys.readouterr().out
    assert accuracy(trained) >= 0.9
    assert json.loads((output / "routing_config.json").read_text())["routing"]["experts"] == 3
    newest = sorted((output / "checkpoints").iterdir())[-1]
    for folder in (newest, output):
        assert cli.main(["route", "evaluate", str(folder)]) == 0
        again = capsys.readouterr().out
        names = ("loss", "accuracy", "skipped", "experts_run", "expert_2")
        assert [line for line in again.splitlines() if line.startswith(names)] == [
            line for line in trained.splitlines() if line.startswith(names)
        ]


def test_a_language_model_whose_tokens_are_routed(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, evaluated, generated from, and not resumed for whole texts."""
    data, output = tmp_path / "pairs.jsonl", tmp_path / "run"
    rows = [{"prompt": f"the {word}", "completion": " and a and a and a"} for word in TOPICS["fruit"] * 2]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "causal-lm", "--per", "token", "--top-k", "2", "--experts", "3"]
    assert train(model_folder, (data, data), output, *options) == 0
    trained = capsys.readouterr().out
    assert accuracy(trained) >= 0.75
    assert json.loads((output / "routing_config.json").read_text())["routing"]["per"] == "token"
    assert cli.main(["eval", str(output)]) == 0
    assert accuracy(capsys.readouterr().out) == accuracy(trained)
    assert cli.main(["generate", str(output), "the plum", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out == "and a\n"
    assert train(model_folder, (data, data), output, *options, "--per", "sequence", "--resume") == 1
    assert "the run was begun with --per token" in capsys.readouterr().err


def test_what_cannot_be_is_named(
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(model_folder, files, tmp_path / "run", "--no-skip", "--cost", "1") == 1
    assert "--cost: expected 0 with --no-skip" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
