"""What commands refuse, in the words of the command line, before a backbone is loaded: one row each."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from adapterkern import cli
from adapterkern.cli import options
from adapterkern.model import backbone

TRAIN = "train --model {model} --train good.jsonl --output out "
DISTILL = TRAIN.replace("train", "distill", 1)
ROUTE = TRAIN.replace("train", "route train", 1)
MULTITASK = "multitask --model {model} --output out "

ROWS = [
    # the command line itself: status 2
    ("train", "train: missing --model, --train, --output; see adapterkern train --help"),
    (
        "trian",
        "COMMAND: expected one of train, eval, .*got 'trian' \\(did you mean train\\?\\); see",
    ),
    ("qa train --modle m", "qa train: unknown --modle \\(did you mean --model\\?\\); see adapterkern qa train --help"),
    (TRAIN + "--sed 3", "train: unknown --sed \\(did you mean --seed\\?\\)"),
    (TRAIN + "--seed x", "train: --seed: expected an integer, got 'x'; see"),
    (TRAIN + "--seed 1.5", "--seed: expected an integer, got '1.5'"),
    (TRAIN + "--backbone-layers x", "--backbone-layers: expected an integer, got 'x'"),
    (TRAIN + "--lr nan", "--lr: expected a number, got 'nan'"),
    (TRAIN + "--layers a,b", "--layers: expected layer numbers such as 0,3 or -2,-1, got 'a,b'"),
    (TRAIN + "--dtype fp3", "--dtype: expected one of fp32, bf16, fp16, got 'fp3'"),
    (TRAIN + "--skip-bad-rows 3", "train: unknown 3;"),
    # values
    (TRAIN + "--lr 0", "--lr: expected a number above 0"),
    (TRAIN + "--lr -1e-3", "--lr: expected a number in \\[0, inf\\), got -0.001"),
    (TRAIN + "--epochs 0", "--epochs: expected an integer >= 1, got 0"),
    (TRAIN + "--depth 1000", "--depth: expected at most 32 adapters, which run one after the other, got 1000"),
    (TRAIN + "--layers -2,-1 --every 2", "--layers: expected none together with --every 2, got -2,-1$"),
    (
        TRAIN + "--adapter-dim 8 --max-params 1e4",
        "--max-params: expected none together with --adapter-dim 8, .* 1",
    ),
    (TRAIN + "--resume --overwrite", "--overwrite: expected --no-overwrite together with --resume, got --overwrite"),
    (
        TRAIN + "--no-train-adapters --task causal-lm",
        "--train-adapters: .*, got --no-train-adapters",
    ),
    (DISTILL + "--weight 3", "--weight: expected a number in \\[0, 1\\]"),
    (
        ROUTE + "--no-skip --cost 1",
        "--cost: expected 0 with --no-skip",
    ),
    ("ablate --train good.jsonl", "--train, --eval: expected both files or neither, got one"),
    (MULTITASK + "--data good.jsonl", "--data: expected a name, a file .*; got good.jsonl"),
    (
        MULTITASK + "--data a good.jsonl --adapters a '{{\"foo\": 1}}'",
        "--adapters a: foo: unknown",
    ),
    # files and folders
    (
        "train --model good.jsonl --train good.jsonl --output out",
        "--model: .* got the file good.jsonl",
    ),
    ("train --model ./no --train good.jsonl --output out", "--model: no folder no"),
    (DISTILL + "--teacher no.gguf", "--teacher: no file no.gguf"),
    ("train --model {model} --train no.jsonl --output out", "--train: no file no.jsonl"),
    (TRAIN + "--eval .", "--eval: expected a file, got the folder ."),
    (TRAIN + "--eval bad.txt", "bad.txt: expected a name that ends in .jsonl, .csv"),
    (TRAIN + "--eval empty.jsonl", "--eval: expected a file with rows, got none in empty.jsonl"),
    (
        TRAIN + "--eval other.csv",
        "--eval: other.csv: column 'text' is missing; there are 'body', 'label'; --text-column names another",
    ),
    (
        TRAIN + "--label-column lab",
        "--train: good.jsonl: column 'lab' is missing; there are 'text', 'label'; --label-column names another",
    ),
    (MULTITASK + "--data a no.jsonl", "--data: no file no.jsonl"),
    (DISTILL + "--keep no.jsonl", "--keep: no file no.jsonl"),
    ("qa train --model {model} --train other.csv --output out", "other.csv: expected a name that ends in .json"),
    ("demo --train good.jsonl --eval no.csv", "demo: --eval: no file no.csv"),
    ("train --model {model} --train good.jsonl --output bad.txt", "--output: expected a folder, got bad.txt"),
    (TRAIN + "--resume", "--resume: expected a checkpoint in out/checkpoints, got none"),
    (
        "train --model {model} --train good.jsonl --output old",
        "--output: old .*\\(--resume\\), .*\\(--overwrite\\)",
    ),
    ("eval no", "eval: no: no such folder; expected the --output of a training, or a checkpoint"),
    ("eval bad.txt", "eval: bad.txt: expected the --output of a training, or a checkpoint, got a file"),
    (
        "eval strange",
        "eval: strange: expected a finished training or .*; got a folder with x.txt",
    ),
]


@pytest.mark.parametrize(("line", "message"), ROWS, ids=[f"{i} {line[:40]}" for i, (line, _) in enumerate(ROWS)])
def test_refused(
    line: str,
    message: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backbone, "_read", lambda *_, **__: pytest.fail("loads a backbone"))
    rows = [{"text": "the apple", "label": label} for label in "abab"]
    Path("good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("other.csv").write_text("body,label\nthe apple,a\n")
    Path("bad.txt").write_text("x")
    Path("empty.jsonl").touch()
    Path("old", "checkpoints", "step-00000002").mkdir(parents=True)
    Path("strange").mkdir()
    Path("strange", "x.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    status = cli.main(shlex.split(line.format(model=model_folder)))
    out, error = capsys.readouterr()
    assert re.search(message, error.strip()), error
    assert status == (2 if "; see adapterkern" in error else 1)
    assert error.count("\n") == 1
    assert not out
    assert sorted(tmp_path.rglob("*")) == before


def test_liger_is_missed_before_a_backbone_is_loaded(
    model_folder: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adapterkern.model import liger

    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    arguments = ["train", "--model", str(model_folder), "--train", str(files[0]), "--output", "out", "--liger"]
    assert cli.main(arguments) == 1
    assert "train: --liger: expected liger-kernel, which is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("seed: expected x", "--seed: expected x"),
        ("num_layers: got 3", "--backbone-layers: got 3"),
        ("run/step-1: begun with lr=0.001, not 0.01", "run/step-1: begun with --lr 0.001, not 0.01"),
        ("a: begun with task='causal-lm', not 'x'", "a: begun with --task causal-lm, not 'x'"),
        ("set skip_bad_rows to skip them", "set --skip-bad-rows to skip them"),
        ("or set prefix_cache=False", "or set --no-prefix-cache"),
        ("plot: expected True, got False", "--plot: expected --plot, got --no-plot"),
        ("layers: expected None, got (0, 1)", "--layers: expected none, got 0,1"),
        # not the names of fields
        ("/data/max_length.csv: no file", "/data/max_length.csv: no file"),
        ("the task of a seed", "the task of a seed"),
        ("task.json: lr: expected x", "task.json: lr: expected x"),
        ("expected one of adapter_dim, max_length", "expected one of adapter_dim, max_length"),
    ],
)
def test_fields_are_named_as_options(message: str, shown: str) -> None:
    argv = ["train", "--model", "m", "--train", "t", "--output", "o"]
    assert options.in_options(message, cli._parser(argv).read(argv).parser) == shown


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        (["--layers", "-2,-1"], "layers", [-2, -1]),
        (["--layers=-2,-1"], "layers", [-2, -1]),
        (["--seed", "9007199254740993"], "seed", 9007199254740993),  # 2**53 + 1, which is no float
        (["--max-steps", "8e6"], "max_steps", 8000000),
    ],
)
def test_values(given: list[str], field: str, value: Any) -> None:
    argv = ["train", "--model", "m", "--train", "t", "--output", "o", *given]
    assert getattr(cli._parser(argv).read(argv), field) == value
