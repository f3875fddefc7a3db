"""``adapterkern train`` on files of chat messages, with a model whose tokenizer has a chat template."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapterkern import cli
from tests.support.commands import TOPICS
from tests.support.tiny_chat import said

pytestmark = pytest.mark.slow


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(model: Path, data: str, output: Path) -> list[str]:
    made = ["train", "--model", str(model), "--train", data, "--output", str(output), "--task", "causal-lm"]
    return [*made, "--adapter-dim", "4", "--lr", "0.02", "--batch-size", "8", "--no-progress", "--no-plot"]


# Which metal follows which fruit, in two turns
PAIRS = list(zip(*TOPICS.values(), strict=True))
CHATS = [{"messages": said(*first, *second)} for first in PAIRS for second in PAIRS]


def test_train_and_eval_on_messages(chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "chats.jsonl", CHATS)
    assert cli.main([*arguments(chat_model, data, tmp_path / "run"), "--eval", data, "--epochs", "4"]) == 0
    summary = json.loads((tmp_path / "run" / "data_summary.json").read_text())["train"]
    assert summary["tokens"] == 16 * 16  # a message is a start, its role, a word and an end
    assert summary["learned"] == 16 * 4  # the assistant's words and ends
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(shown["accuracy"]) >= 0.5  # every other token is an end; a random model's is about 1 / 128
    assert float(shown["targets"]) == 64


def test_alpaca_and_sharegpt(chat_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Either file is the same data."""
    losses = []
    rows: dict[str, list[dict[str, Any]]] = {
        "sharegpt": [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in PAIRS],
        "alpaca": [{"instruction": a, "input": "", "output": b} for a, b in PAIRS],
    }
    for name, form in (("sharegpt", "ShareGPT's form (from, value)"), ("alpaca", "Alpaca's form (instruction, input,")):
        data = write(tmp_path / f"{name}.jsonl", rows[name])
        assert cli.main([*arguments(chat_model, data, tmp_path / name), "--epochs", "1"]) == 0
        assert f"{name}.jsonl: rows of {form}" in caplog.text
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
    assert losses[0] == losses[1]
    assert losses[0][0] > 0


def test_rows_are_checked_before_the_model_is_loaded(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("adapterkern.model.backbone.load_backbone", None)
    data = write(tmp_path / "bad.jsonl", [CHATS[0], {"messages": [{"role": "bot", "content": "apple"}]}])
    assert cli.main(arguments(chat_model, data, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "bad.jsonl:2: column 'messages'[0]: expected role to be one of 'system', " in error
    assert "got 'bot'" in error
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_chat_template(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "chats.jsonl", CHATS)
    assert cli.main(arguments(model_folder, data, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert f"expected one with a chat template for rows of chat messages ({data}:1), got none" in error
    assert "add a file chat_template.jinja to the tokenizer's folder" in error
