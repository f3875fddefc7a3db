"""``adapterkern generate``: prompts from everywhere, through saved runs of every kind."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterkern import cli
from adapterkern.inference import api
from adapterkern.inference.generate import complete
from adapterkern.inference.settings import GenerationSettings
from tests.support.commands import TOPICS
from tests.support.golden_runs import RUNS
from tests.support.tiny_chat import said

pytestmark = pytest.mark.slow

EIGHT = ["--max-new-tokens", "8"]
PROMPTS = [json.loads(line)["prompt"] for line in (RUNS / "texts.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the runs' sources.json has their backbone."""
    monkeypatch.chdir(RUNS)


@pytest.fixture(scope="module")
def expected() -> dict[str | None, list[str]]:
    """The completions of the prompts, with the adapter and without."""
    model, tokenizer = api.load(RUNS / "causal-lm", model=RUNS / "backbone")
    settings = GenerationSettings(max_new_tokens=8)
    found = {name: complete(model, tokenizer, PROMPTS, settings, adapter=name) for name in (None, "none")}
    assert found[None] != found["none"]
    return found


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_one_prompt(
    expected: dict[str | None, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an argument or on stdin; to a terminal it streams."""
    assert cli.main(["generate", "causal-lm", PROMPTS[0], *EIGHT]) == 0
    assert capsys.readouterr().out == expected[None][0] + "\n"
    typed(monkeypatch, PROMPTS[0] + "\n")
    assert cli.main(["generate", "causal-lm", *EIGHT, "--adapter", "none"]) == 0
    assert capsys.readouterr().out == expected["none"][0] + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    streamed: list[str] = []
    monkeypatch.setattr("transformers.TextStreamer.on_finalized_text", lambda self, text, **_: streamed.append(text))
    assert cli.main(["generate", "causal-lm", PROMPTS[0], *EIGHT]) == 0
    assert "".join(streamed) == expected[None][0]
    assert capsys.readouterr().out == ""


def test_several_prompts(
    expected: dict[str | None, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed(monkeypatch, "\n".join(PROMPTS[:3]) + "\n")
    assert cli.main(["generate", "causal-lm", "--lines", "--batch-size", "2", *EIGHT]) == 0
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected[None][:3])
    typed(monkeypatch, f"{PROMPTS[0]}\u2028\x0c{PROMPTS[1]}\x85\n{PROMPTS[2]}\n")
    assert cli.main(["generate", "causal-lm", "--lines", "--max-new-tokens", "1"]) == 0
    assert len(capsys.readouterr().out.split("\n")) == 3  # two lines
    output = tmp_path / "out.csv"
    named = ["--output-column", "answer", "--output", str(output)]
    assert cli.main(["generate", "causal-lm", "--data", "texts.jsonl", *named, *EIGHT]) == 0
    assert capsys.readouterr().out == f"{len(PROMPTS)} rows in {output}\n"
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["answer"] for row in rows] == expected[None]
    assert rows[0]["completion"] == "teal"


def test_generation_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "drawn.json").write_text(json.dumps({"do_sample": True, "temperature": 5.0}))
    command = ["generate", "causal-lm", PROMPTS[0], *EIGHT, "--generation", str(tmp_path / "drawn.json")]
    shown = []
    for seed in ("1", "1", "2"):
        assert cli.main([*command, "--seed", seed]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]
    assert cli.main(["generate", "causal-lm", PROMPTS[0], *EIGHT, "--generation", "max_new_tokens=3"]) == 1
    assert "--max-new-tokens: expected it once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["causal-lm", "x", "--data", "texts.jsonl"], "--data: expected one of PROMPT, --data and stdin"),
        (["causal-lm", "x", "--lines"], "--lines: expected one of PROMPT, --data and stdin"),
        (["causal-lm", "x", "--top-p", "0.5"], "--top-p: has no effect on the likeliest token"),
        (["causal-lm", "x", "--generation", "topk=1"], "--generation: expected fields of transformers' Generation"),
        (["causal-lm", "x", "--batch-size", "0"], "--batch-size: expected an integer >= 1, got 0"),
        (["causal-lm", "x", "--output-column", "y"], "--output-column: has no effect without --output"),
        (["causal-lm", "x", "--seed", "1"], "--seed: has no effect on the likeliest token"),
        (["causal-lm", "x", "--prompt-column", "y"], "--prompt-column: has no effect without --data"),
        (["causal-lm", "x", "--text-column", "y"], "--text-column: has no effect without --data"),
        (["causal-lm", "x", "--skip-bad-rows"], "--skip-bad-rows: has no effect without --data"),
        (["causal-lm", "x", "--output", "out.txt"], "--output: expected a name that ends in .csv"),
        (["causal-lm", "--data", "texts.jsonl", "--output", "out.csv"], "--output-column names another"),
        (
            ["causal-lm", "--data", "texts.jsonl", "--output", "../runs/texts.jsonl"],
            "--output: expected a file that is",
        ),
        (["causal-lm", "--data", "colors.jsonl"], "--data: colors.jsonl: column 'prompt' is missing"),
        (["causal-lm", " "], "column 'prompt': expected a non-empty string"),
        (["classification", "x"], "expected a run of causal-lm, got one of classification, which answers by"),
        (["qa", "x"], "expected a run of causal-lm, got one of"),
    ],
)
def test_refusals_before_the_model_is_loaded(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("adapterkern.inference.runs.load_backbone", None)
    assert cli.main(["generate", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_terminal_without_a_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert cli.main(["generate", "causal-lm"]) == 1
    assert "PROMPT: expected a prompt, --data FILE, or a text on stdin, got none" in capsys.readouterr().err


def test_an_adapter_or_a_template_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "causal-lm", "x", "--adapter", "other"]) == 1
    assert "--adapter: expected one of default, none, got 'other'" in capsys.readouterr().err
    assert cli.main(["generate", "causal-lm", "x", "--chat"]) == 1
    assert "tokenizer: expected one with a chat template for --chat, got none" in capsys.readouterr().err


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_several_tasks(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task's adapter must be named; it is the one that is saved in the task's own folder."""
    data = [write(tmp_path / f"{n}.jsonl", [{"prompt": "the", "completion": f" {n}"}] * 8) for n in ("apple", "iron")]
    command = ["multitask", "--model", str(model_folder), "--output", str(tmp_path / "run"), "--task", "causal-lm"]
    command += ["--data", "fruit", data[0], data[0], "--data", "metal", data[1], data[1], "--adapter-dim", "4"]
    assert cli.main([*command, "--lr", "0.05", "--epochs", "8", "--no-progress", "--no-plot"]) == 0
    capsys.readouterr()
    shown = {}
    for name in ("fruit", "metal"):
        assert cli.main(["generate", str(tmp_path / "run"), "the", "--adapter", name, "--max-new-tokens", "1"]) == 0
        shown[name] = capsys.readouterr().out
        assert cli.main(["generate", str(tmp_path / "run" / "tasks" / name), "the", "--max-new-tokens", "1"]) == 0
        assert capsys.readouterr().out == shown[name]
    assert shown == {"fruit": "apple\n", "metal": "iron\n"}
    assert cli.main(["generate", str(tmp_path / "run"), "the"]) == 1
    assert "--adapter: expected one of fruit, metal of" in capsys.readouterr().err


def test_a_run_of_chat_messages(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What it has learned is rendered through the template, and an answer stops at the turn's end."""
    data = write(tmp_path / "chats.jsonl", [{"messages": said(fruit, "iron")} for fruit in TOPICS["fruit"]])
    run, output = str(tmp_path / "run"), tmp_path / "out.jsonl"
    command = ["train", "--model", str(chat_model), "--train", data, "--output", run, "--task", "causal-lm"]
    options = ["--adapter-dim", "4", "--lr", "0.05", "--epochs", "20", "--no-progress", "--no-plot"]
    assert cli.main([*command, *options]) == 0
    capsys.readouterr()
    assert cli.main(["generate", run, "--data", data, "--output", str(output), *EIGHT]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["completion"] for row in found] == ["iron"] * 4
    capsys.readouterr()
    assert cli.main(["generate", run, "plum", *EIGHT]) == 0
    assert capsys.readouterr().out == "iron\n"
    assert cli.main(["generate", run, "plum", "--no-chat", *EIGHT]) == 0
    model, tokenizer = api.load(run)
    assert [capsys.readouterr().out[:-1]] == complete(model, tokenizer, ["plum"], GenerationSettings(max_new_tokens=8))
    (tmp_path / "run" / "data_summary.json").unlink()
    assert cli.main(["generate", run, "plum", *EIGHT]) == 0
    assert "does not say whether it learned chat messages" in caplog.text
