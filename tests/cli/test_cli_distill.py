"""``adapterkern distill`` as a user types it, on a tiny random LLaMA in a folder."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch

import adapterkern as ak
from adapterkern import cli
from adapterkern.recipes.distillation import Distillation
from adapterkern.recipes.distillation.teacher import DISTILLATION_CONFIG
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS = {
    "texts": [{"text": row["text"]} for row in tiny_run.rows(12, seed=3)],
    "labels": tiny_run.rows(12, seed=1),
    "qa": [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 40}"} for i in range(12)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer, and a file of each kind."""
    path = tmp_path_factory.mktemp("distill")
    tiny_run.model().unload().save_pretrained(path / "model")
    TOKENIZER.save_pretrained(path / "model")
    for name, rows in ROWS.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(folder: Path, output: Path, *options: str) -> int:
    small = ["--max-length", "16", "--batch-size", "4", "--epochs", "1", "--adapter-dim", "4", "--no-progress"]
    model = ["--model", str(folder / "model"), "--output", str(output)]
    files = [str(folder / f"{o}.jsonl") if o in ROWS else o for o in options]
    return cli.main(["distill", *model, *small, "--no-plot", *files])


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--backbone-layers", "2", "--teacher", "whole", "--train", "texts", "--eval", "texts"], "teacher_perplexity"),
        (
            ["--train", "qa", "--eval", "qa", "--keep", "texts", "--eval-keep", "texts", "--weight", "0.2"],
            "kept_agreement",
        ),
        (["--task", "classification", "--train", "labels", "--eval", "labels", "--keep", "texts"], "accuracy"),
    ],
)
def test_the_command_trains_and_eval_reads_it(
    options: list[str], shown: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, tmp_path / "run", *options) == 0
    out = capsys.readouterr().out
    assert shown in out
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    name = "accuracy" if "classification" in options else "perplexity"
    lines = [line for text in (out, capsys.readouterr().out) for line in text.splitlines() if line.startswith(name)]
    assert float(lines[0].split()[1]) == pytest.approx(float(lines[1].split()[1]), rel=1e-3)


def test_the_command_takes_another_teacher_of_the_same_tokens_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shallow = tiny_run.model(seed=3).unload()
    shallow.config.num_hidden_layers = 1
    type(shallow)(shallow.config).save_pretrained(other)
    TOKENIZER.save_pretrained(other)
    assert command(folder, tmp_path / "run", "--train", "texts", "--eval", "texts", "--teacher", str(other)) == 0
    assert json.loads((tmp_path / "run" / DISTILLATION_CONFIG).read_text())["teacher"].endswith("other, 1 layers")
    changed = json.loads((other / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (other / "tokenizer.json").write_text(json.dumps(changed))
    assert command(folder, tmp_path / "run2", "--train", "texts", "--teacher", str(other)) == 1
    assert command(folder, tmp_path / "run2", "--train", "texts", "--teacher", "whole") == 1
    errors = capsys.readouterr().err
    assert "--teacher: expected the tokens of" in errors
    assert "--backbone-layers: expected a number of layers together with --teacher whole" in errors


def test_half_of_the_steps_learn_the_models_own_completions(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    rollouts = ["--on-policy", "0.5", "--max-new-tokens", "4"]
    loss = ["--divergence", "jsd", "--beta", "0.2", "--top-k", "9", "--teacher-context", "w7 w8"]
    assert command(folder, run, "--train", "qa", "--eval", "qa", *rollouts, *loss, "--adapter-dim", "4") == 0
    saved = json.loads((run / DISTILLATION_CONFIG).read_text())
    assert saved == {
        "teacher": None,
        **{"temperature": 1.0, "weight": 0.5, "divergence": "jsd", "beta": 0.2, "top_k": 9},
        **{"teacher_context": "w7 w8", "on_policy": 0.5, "max_new_tokens": 4},
    }
    assert cli.main(["eval", str(run)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_saved_adapter_on_the_same_backbone_is_a_teacher(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big, small = tmp_path / "big", tmp_path / "small"
    assert command(folder, big, "--train", "qa", "--adapter-dim", "16", "--lr", "0.05") == 0
    made: list[Distillation] = []
    original = Distillation.__init__
    monkeypatch.setattr(Distillation, "__init__", lambda self, *a, **k: made.append(self) or original(self, *a, **k))
    rollouts = ["--on-policy", "1", "--weight", "1", "--max-new-tokens", "3"]
    assert command(folder, small, "--train", "qa", "--eval", "qa", "--teacher", str(big), *rollouts) == 0
    (task,) = made
    shared = {p.data_ptr() for p in task.model.base.parameters()}
    assert {p.data_ptr() for p in task.teacher.base.parameters()} == shared
    assert not any(p.requires_grad for p in task.teacher.parameters())
    ids = torch.arange(3, 9)[None]
    own, _ = ak.load(big, model=folder / "model", device="cpu")
    assert torch.equal(task.teacher(ids).logits, own(ids).logits)
    assert not torch.equal(task.teacher(ids).logits, task.model(ids).logits)
    assert ", adapter " in json.loads((small / DISTILLATION_CONFIG).read_text())["teacher"]


def test_two_runs_share_a_teachers_labels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One of them in another precision is refused, and writes nothing."""
    caplog.set_level(logging.INFO)
    labels = ["--top-k", "5", "--teacher-labels", str(tmp_path / "labels")]
    whole = ["--backbone-layers", "2", "--teacher", "whole", "--train", "texts", "--eval", "texts", *labels]
    assert command(folder, tmp_path / "run", *whole, "--lr", "1e-2") == 0
    assert "teacher's labels: 0 of 12 texts known in" in caplog.text
    assert command(folder, tmp_path / "again", *whole, "--lr", "3e-3", "--divergence", "reverse-kl") == 0
    assert "teacher's labels: 12 of 12 texts known in" in caplog.text
    capsys.readouterr()
    assert "teacher_labels" not in json.loads((tmp_path / "run" / DISTILLATION_CONFIG).read_text())
    assert command(folder, tmp_path / "bf16", *whole, "--precision", "bf16") == 1
    said = capsys.readouterr().err
    assert re.search(
        r"--teacher-labels: .*: expected --precision bf16, got --precision fp32; name another folder", said
    )
    assert "Loading weights" not in said  # before the backbone is loaded
    assert not (tmp_path / "bf16").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--train", "qa", "--teacher-labels", "kept"],
            "--top-k: expected an integer beside --teacher-labels: it has these tokens alone; got none",
        ),
        (
            ["--train", "qa", "--on-policy", "1", "--top-k", "5", "--teacher-labels", "kept"],
            "--teacher-labels: expected none with --on-policy 1, where no step reads its rows as they are",
        ),
        (["--train", "qa", "--keep", "texts", "--teacher-labels", "kept"], "--teacher-labels: expected none with --ke"),
        (["--train", "texts", "--on-policy", "1"], "--train: .*texts.jsonl: expected rows with a prompt to complete"),
        (["--train", "qa", "--on-policy", "1", "--keep", "texts"], "--on-policy: expected 0 with --keep, .*, got 1"),
        (
            ["--train", "qa", "--teacher-context", "w1", "--keep", "texts"],
            "--teacher-context: expected none with --keep",
        ),
        (["--train", "qa", "--on-policy", "1", "--weight", "0"], "--weight: expected more than 0 beside --on-policy"),
        (
            ["--train", "qa", "--on-policy", "1", "--packing"],
            "--packing: expected --no-packing beside --on-policy: .*",
        ),
        (["--train", "qa", "--max-new-tokens", "5"], "--max-new-tokens: expected none where --on-policy is 0, got 5"),
        (["--train", "qa", "--beta", "0.5"], "--beta: expected none with --divergence kl, got 0.5"),
        (["--train", "qa", "--top-k", "128"], "--top-k: expected an integer from 1 to 127, got 128"),
        (
            ["--train", "labels", "--task", "classification", "--on-policy", "1"],
            "--task: expected causal-lm without --keep",
        ),
    ],
)
def test_what_cannot_be_is_named(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, tmp_path / "run", *options) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
