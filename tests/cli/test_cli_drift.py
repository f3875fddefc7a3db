"""``--drift``: in a run, of a saved run, and where it is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adapterkern import cli
from tests.support.commands import write_texts
from tests.support.runs import records


def test_a_run_measures_it_and_so_does_eval(
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, texts = tmp_path / "run", write_texts(tmp_path / "texts.jsonl", 6, 2)
    data = ["--model", str(model_folder), "--train", str(files[0]), "--eval", str(files[1]), "--drift", str(texts)]
    options = ["--layers=-1", "--lr=2e-2", "--warmup=0", "--max-steps=3", "--eval-every=1", "--max-length=6"]
    command = [sys.executable, "-m", "adapterkern", "train", *data, *options, "--output", str(run)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    first, _, last = (r["drift"] for r in records(run) if r["kind"] == "eval")
    assert min(first, last) > 0
    assert f"drift {first:.3g}\n" in process.stderr
    assert f"drift              {last:.4f}\n" in process.stdout
    assert "drift  6 texts; 36 tokens, 30 measured; a text has 6 (median), 6 (longest)\n" in process.stderr
    assert "warning: 6 of 6 texts are cut to the maximum length of 6 tokens" in process.stderr
    assert process.stderr.count("texts.jsonl: column not used: 'label'\n") == 1
    assert json.loads((run / "data_summary.json").read_text())["drift"]["counts"] == {"texts": 6}
    assert json.loads((run / "data_summary.json").read_text())["drift"]["measured"] == 30
    assert (run / "training.png").exists()

    assert cli.main(["eval", str(run), "--drift", str(texts)]) == 0
    assert f"drift              {last:.4f}\n" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--output", str(run), "--max-steps", "4"]) == 0  # by the same words
    assert [r["drift"] > 0 for r in records(run) if r["kind"] == "eval"] == [True] * 4
    resume = ["train", "--resume", "--output", str(run), "--max-steps", "5"]
    assert cli.main([*resume, "--drift", str(files[1])]) == 1
    assert "resume with the same, or with --drift none\n" in capsys.readouterr().err
    lost = texts.rename(tmp_path / "elsewhere.jsonl")
    assert cli.main(resume) == 1
    assert f"train: --drift: no file {texts}; --drift none goes on without\n" in capsys.readouterr().err
    assert cli.main([*resume, "--drift", "none"]) == 0
    assert cli.main(["train", "--resume", "--output", str(run), "--max-steps", "6"]) == 0  # by the same words
    assert ["drift" in r for r in records(run) if r["kind"] == "eval"] == [True] * 4 + [False] * 2
    texts = lost.rename(texts)
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--drift", str(texts), "--backbone-layers", "4"]) == 0
    warning = "--drift: does not say what is forgotten with --backbone-layers 4: the first layers of a backbone are no "
    assert any(message.startswith(warning) for message in caplog.messages)

    tasks = ["--data", "a", str(files[0]), str(files[1]), "--data", "b", str(files[0]), "--no-plot"]
    options = ["--model", str(model_folder), "--output", str(tmp_path / "many"), "--max-steps", "2"]
    assert cli.main(["multitask", *options, *tasks, "--drift", str(texts)]) == 0
    capsys.readouterr()
    for saved in (tmp_path / "many", tmp_path / "many" / "tasks" / "a"):
        assert cli.main(["eval", str(saved), "--drift", str(texts)]) == 0
    assert "b/drift" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("train", "--drift E", "train: --drift: has no effect without --eval: expected no --drift, got "),
        ("train", "--drift E --eval E --no-train-adapters", "--drift: has no effect with --no-train-adapters, which"),
        ("train", "--drift 10% --eval E", "--drift: expected a file, got 10%: a share of --train is for --eval of"),
        ("train", "--drift nowhere.csv --eval E", "train: --drift: no file nowhere.csv"),
        ("train", "--drift E --drift E --eval E", "--drift: expected one file, got two: write all rows into one"),
        ("qa train", "--drift B --eval Q", "qa train: --drift: "),
        ("route train", "--drift B --eval E", "bad.csv: column 'text' is missing; there are 'a'"),
        ("distill", "--drift B --eval E --task classification --keep E", "distill: --drift: "),
        ("multitask", "--data a E --drift E", "--drift: has no effect without data to evaluate on: expected no --dri"),
        ("predict", "run --data E --output out.csv --drift E", "unknown --drift"),
    ],
)
def test_refusals_come_before_the_backbone(
    command: str,
    options: str,
    message: str,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.support.tiny_qa import EXAMPLES

    (tmp_path / "bad.csv").write_text("a\n1\n")
    named = {"E": str(files[1]), "B": str(tmp_path / "bad.csv"), "Q": str(EXAMPLES)}
    typed = [named.get(word, word) for word in options.split()]
    (model := tmp_path / "m.gguf").touch()  # nothing that could be loaded
    arguments = ["--model", str(model), "--output", str(tmp_path / "run")]
    if command != "multitask":
        arguments += ["--train", str(EXAMPLES) if command == "qa train" else str(files[0])]
    arguments = [] if command == "predict" else arguments
    assert cli.main([*command.split(), *typed, *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_saved_head_alone_has_none(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model_folder), "--train", str(files[0]), "--output", str(tmp_path), "--max-steps", "1"]
    assert cli.main(["train", *options, "--no-train-adapters", "--no-plot"]) == 0
    assert cli.main(["eval", str(tmp_path), "--data", str(files[1]), "--drift", str(files[1])]) == 1
    assert "eval: --drift: expected none beside a head alone, which leaves the model" in capsys.readouterr().err
