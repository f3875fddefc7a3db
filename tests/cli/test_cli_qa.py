"""``adapterkern qa`` as a user types it, on a tiny random LLaMA in a folder and a SQuAD file of our own."""

import json
from pathlib import Path

import pytest

from adapterkern import cli
from tests.support import tiny_qa

EXAMPLES = str(tiny_qa.EXAMPLES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qa")
    tiny_qa.TOKENIZER.save_pretrained(folder / "model")
    tiny_qa.model().unload().save_pretrained(folder / "model")
    command = ["qa", "train", "--model", str(folder / "model"), "--train", EXAMPLES, "--eval", EXAMPLES]
    command += ["--output", str(folder / "run"), "--adapter-dim", "8", "--epochs", "2", "--batch-size", "8"]
    command += ["--max-length", "80", "--doc-stride", "20", "--null-threshold", "0", "--lr", "0.01", "--no-progress"]
    assert cli.main(command) == 0
    return folder / "run"


def shown(text: str) -> dict[str, float]:
    return {words[0]: float(words[1]) for words in map(str.split, text.splitlines()) if len(words) == 2}


def test_evaluate_gives_what_training_gave(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "eval"][-1]
    assert cli.main(["qa", "evaluate", str(run)]) == 0
    got = shown(capsys.readouterr().out)
    for name in ("exact", "f1", "HasAns_f1", "NoAns_exact", "total", "accuracy"):
        assert got[name] == pytest.approx(trained[name], abs=5e-5), name
    assert got["loss"] == pytest.approx(trained["loss"], rel=1e-4)
    assert got["total"] == 26


def test_evaluate_takes_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["qa", "evaluate", str(run)]) == 0
    expected = shown(capsys.readouterr().out)["exact"]
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert cli.main(["qa", "evaluate", str(newest)]) == 0
    assert shown(capsys.readouterr().out)["exact"] == expected


def test_predict_writes_answers_and_candidates(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "questions.jsonl"
    row = {"id": "x", "question": "Who came?", "context": "Ann came by the old road. " * 20}
    questions.write_text(json.dumps(row) + "\n")
    answers, candidates = tmp_path / "answers.json", tmp_path / "n-best.json"
    command = ["qa", "predict", str(run), "--data", str(questions), "--output", str(answers)]
    assert cli.main([*command, "--n-best", str(candidates)]) == 0
    assert capsys.readouterr().out.startswith(f"1 answers in {answers}, ")
    (best, *others) = json.loads(candidates.read_text())["x"]
    assert row["context"][best["start"] : best["end"]].strip() == best["text"]
    assert len(others) == 19
    assert json.loads(answers.read_text()) == {"x": best["text"] if best["score"] >= 0 else ""}


def test_eval_takes_the_run_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for command in (["eval"], ["qa", "evaluate"]):
        assert cli.main([*command, str(run)]) == 0
        outputs.append({k: v for k, v in shown(capsys.readouterr().out).items() if "second" not in k})
    assert outputs[0] == outputs[1]
    assert "f1" in outputs[0]


def test_errors_name_file_and_id(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dev.json"
    qas = [{"id": "d7", "question": "Who?", "answers": [{"text": "Bo", "answer_start": 3}]}]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ann met Bo.", "qas": qas}]}]}))
    assert cli.main(["qa", "evaluate", str(run), "--data", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"{path}: data[0].paragraphs[0].qas[0] (id 'd7'): field 'answers[0].answer_start'" in error
    assert "expected 'Bo' at 3 of the context, but it is at 8" in error


@pytest.mark.parametrize("option", ["--task", "--pooling", "--text-column"])
def test_options_of_other_tasks_are_not_offered(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["qa", "train", "--help"])
    offered = capsys.readouterr().out
    assert option not in offered
    assert "--null-threshold" in offered
