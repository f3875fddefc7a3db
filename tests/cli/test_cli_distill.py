"""``adapterkern distill`` as a user types it, on a tiny random LLaMA in a folder."""

import json
from pathlib import Path

import pytest

from adapterkern import cli
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
