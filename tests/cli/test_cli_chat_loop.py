"""``adapterkern chat``: saved runs, a script of lines, and Ctrl-C."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterkern import cli
from adapterkern.inference import api
from adapterkern.inference.generate import complete
from adapterkern.inference.settings import GenerationSettings
from tests.support.golden_runs import RUNS
from tests.support.tiny_chat import said
from tests.support.tiny_llama import tiny

pytestmark = pytest.mark.slow

EIGHT = GenerationSettings(max_new_tokens=8)


def chat(
    lines: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """The status, and what is printed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    status = cli.main(["chat", *arguments, "--max-new-tokens", "8"])
    return status, *capsys.readouterr()


def test_a_run_without_a_template(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(RUNS)
    model, tokenizer = api.load("causal-lm")
    ours, bare = (complete(model, tokenizer, ["red: "], EIGHT, adapter=name)[0] for name in (None, "none"))
    assert ours != bare
    status, out, err = chat(["/adapter", "red: ", "/off", "red: "], ["causal-lm"], monkeypatch, capsys)
    assert status == 0
    assert out == f"* causal-lm\n  none\n{ours}\n[causal-lm]\n{ours}\n[backbone]\n{bare}\n"
    assert "(each answer is given twice: with the adapter, and by the bare backbone, which reads the same turns)" in err
    assert "the tokenizer has no chat template: each message is a prompt by itself" in caplog.text


def trained(model: Path, output: Path, rows: list[dict[str, Any]]) -> str:
    data = output.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "--model", str(model), "--train", str(data), "--output", str(output), "--task", "causal-lm"]
    options = ["--adapter-dim", "4", "--lr", "0.05", "--epochs", "20", "--no-progress", "--no-plot"]
    assert cli.main([*command, *options]) == 0
    return str(output)


@pytest.fixture(scope="module")
def runs(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters on one backbone: one always says iron, the other plum."""
    folder = tmp_path_factory.mktemp("runs")
    words = {"iron": "iron", "dotted.name": "plum"}
    return [trained(chat_model, folder / name, [{"messages": said("the", word)}] * 4) for name, word in words.items()]


def test_two_runs_on_one_backbone(
    runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "chat.jsonl"
    lines = ["the", "/adapter dotted.name", "the", f"/save {saved}", "/adapter", "/quit", "the"]
    status, out, err = chat(lines, runs, monkeypatch, capsys)
    assert status == 0
    assert out == "iron\nplum\n  iron\n* dotted.name\n  none\n"
    assert "(dotted.name answers)" in err
    assert [json.loads(line) for line in saved.read_text().splitlines()] == [
        {"messages": said("the", "iron", "the", "plum")}
    ]


def test_no_chat_gives_prompts(
    runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = chat(["the", "a"], [runs[0], "--no-chat"], monkeypatch, capsys)
    model, tokenizer = api.load(runs[0])
    assert status == 0
    assert out.splitlines() == complete(model, tokenizer, ["the", "a"], EIGHT)


def test_runs_that_do_not_go_together(
    runs: list[str],
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = shutil.copytree(chat_model, tmp_path / "other")
    llama = tiny()
    llama.model.layers[0].mlp.up_proj.weight.data *= 2
    llama.save_pretrained(other)
    second = trained(other, tmp_path / "second", [{"messages": said("the", "iron")}] * 4)
    status, _, err = chat([], [runs[0], second], monkeypatch, capsys)
    assert status == 1
    assert "saved for the backbone other, and loaded on one of other weights, model; expected the same weights\n" in err
    monkeypatch.setattr("adapterkern.inference.runs.load_backbone", None)  # what follows is refused before
    again = shutil.copytree(runs[0], tmp_path / "iron")
    status, _, err = chat([], [runs[0], str(again)], monkeypatch, capsys)
    assert status == 1
    assert "expected adapters of different names, got 'iron' twice; rename a folder" in err
    status, _, err = chat([], [runs[0], str(RUNS / "classification")], monkeypatch, capsys)
    assert status == 1
    assert "expected a run of causal-lm, got one of classification" in err


def test_ctrl_c_stops_an_answer_and_not_the_chat(tmp_path: Path) -> None:
    """In a process of its own. An answer that would take minutes is stopped at its first word."""
    backbone = shutil.copytree(RUNS / "backbone", tmp_path / "backbone")
    config = json.loads((backbone / "config.json").read_text()) | {"max_position_embeddings": 1 << 20}
    (backbone / "config.json").write_text(json.dumps(config))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    endless = ["--max-new-tokens", "100000", "--generation", "min_new_tokens=100000", "--model", str(backbone)]
    endless += ["--temperature", "5"]  # so that words end, which is when they are shown
    command = [sys.executable, "-m", "adapterkern", "chat", "causal-lm", *endless]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=RUNS, env=environment, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"red: \n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/adapter\n", timeout=120)
    assert process.returncode == 0
    assert b"(stopped)" in err
    assert out.endswith(b"* causal-lm\n  none\n")
