"""What commands refuse, in the words of the command line, before a backbone is loaded: one row each."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from adapterkern import cli
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
    (TRAIN + "--dtype fp3", "--dtype: expected one of auto, fp32, bf16, fp16, got 'fp3'"),
    (TRAIN + "--seed", "--seed: expected a value, got none; see"),
    (
        TRAIN + "--skip-bad-rows 3",
        "train: --skip-bad-rows: expected no value, since the option is a flag, got '3'; see",
    ),
    (TRAIN + "--skip-bad-rows=3", "--skip-bad-rows/--no-skip-bad-rows: expected no value, .*, got '3'; see"),
    (TRAIN + "--liger=yes", "train: --liger: expected no value, since the option is a flag, got 'yes'; see"),
    (TRAIN + "--seed 3 4", "train: --seed: expected one value, got 3 and 4; see"),
    (
        "train --model m --output o --train a.csv b.csv",
        "train: --train: expected one file, got a.csv and b.csv; see",
    ),
    ("eval run qa", "eval: directory: expected one folder, got run and qa; see"),
    ("eval --liger run qa", "eval: directory: expected one folder, got run and qa; see"),
    (TRAIN + "--max-steps 1M", "--max-steps: expected an integer such as 1000000 or 1e6, got '1M'; see"),
    ("tran --model x", "adapterkern: COMMAND: expected one of train, .*, got 'tran' \\(did you mean train\\?\\); see"),
    (
        "route --no-progress --model x",
        "adapterkern route: missing ACTION: expected one of train, evaluate before --no-progress; see",
    ),
    (ROUTE.replace("route", "route --seed=1"), "route train: --seed: expected after train, got it before; see"),
    ("--verson", "adapterkern: unknown --verson \\(did you mean --version\\?\\); see"),
    ("train --model m --output o --train max_length=5.csv", "train: --train: no file max_length=5.csv$"),
    (
        MULTITASK + "--data b good.jsonl --adapters b adapter_dim=3",
        "multitask: --adapters: expected a JSON object of fields, got adapter_dim=3: ",
    ),
    (TRAIN.replace(" out", " old/checkpoints") + "--resume", "got none: --output is the folder of the run, old$"),
    (
        TRAIN.replace(" out", " old/checkpoints/step-00000002") + "--resume",
        "got none: --output is the folder of .*, old$",
    ),
    # values
    (TRAIN + "--lr 0", "--lr: expected a number above 0"),
    (TRAIN + "--lr -1e-3", "--lr: expected a number in \\[0, inf\\), got -0.001"),
    (TRAIN + "--epochs 0", "--epochs: expected an integer >= 1, got 0"),
    (TRAIN + "--depth 1000", "--depth: expected at most 32 adapters, which run one after the other, got 1000"),
    (
        TRAIN + "--layers -2,-1 --every 2",
        "--layers: expected --layers or --every, not both: each says which layers have adapters; got -2,-1 and 2$",
    ),
    (
        TRAIN + "--adapter-dim 8 --max-params 1e4",
        "--max-params: expected --max-params or --adapter-dim, not both: a budget .*; got 10000 and 8$",
    ),
    # of two options one has no effect, though its value may be the default
    (
        TRAIN + "--max-params 1e4 --adapter-dim 64",
        "--max-params: expected --max-params or --adapter-dim, not both: a budget .*; got 10000 and 64$",
    ),
    (
        TRAIN + "--every 1 --layers -2,-1",
        "--layers: expected --layers or --every, not both: each says which layers have adapters; got -2,-1 and 1$",
    ),
    (TRAIN + "--epochs 3 --max-steps 5", "--epochs: expected --epochs or --max-steps, not both: each .*; got 3 and 5$"),
    (
        TRAIN + "--no-train-adapters --init identity",
        "--init: has no effect with --no-train-adapters, which .*: expected no --init, got identity$",
    ),
    (
        TRAIN + "--task causal-lm --pooling mean",
        "--pooling: has no effect with --task causal-lm, which has no labels: expected no --pooling, got mean$",
    ),
    (
        DISTILL + "--label-column y",
        "--label-column: has no effect with --task causal-lm, .*: expected no --label-column, got y$",
    ),
    (
        TRAIN + "--prompt-column q",
        "--prompt-column: has no effect with --task classification, .*: expected no --prompt-column, got q$",
    ),
    (
        TRAIN + "--max-skipped-steps 20",
        "--max-skipped-steps: has no effect with --precision fp32, .*: expected no --.*, got 20$",
    ),
    (
        TRAIN + "--no-prefix-cache --prefix-cache-bytes 1e9",
        "--prefix-cache-bytes: has no .* with --no-prefix-cache: .*, got 10+$",
    ),
    (
        TRAIN + "--packing",
        "--packing: expected --no-packing with --task classification, whose head reads whole rows, got --packing$",
    ),
    (
        ROUTE + "--task causal-lm --packing",
        "--packing: expected --no-packing for RoutedTask, which reads a row as one text, got --packing$",
    ),
    (
        DISTILL + "--keep good.jsonl --packing",
        "--packing: expected --no-packing for KeepBehaviour, which reads a row as one text, got --packing$",
    ),
    ("qa train --packing", "qa train: unknown --packing"),
    (TRAIN + "--padding-free", "train: unknown --padding-free \\(did you mean --packing\\?\\); see"),
    (TRAIN + "--length-grouping", "train: unknown --length-grouping \\(did you mean --group-by-length\\?\\); see"),
    (
        TRAIN + "--group-by-length --padding max_length",
        "--group-by-length: has no effect with --padding max_length, .*: expected no --group-by-length, got --group-.*",
    ),
    (TRAIN + "--eval-every 5", "--eval-every: has no effect without --eval: expected no --eval-every, got 5$"),
    (
        MULTITASK + "--data a good.jsonl --eval-every 5",
        "--eval-every: has no effect without data to evaluate on: expected no --eval-every, got 5$",
    ),
    (
        TRAIN + "--fuse-norm --position parallel-mlp",
        "--fuse-norm: has no effect with --position parallel-mlp, which .*: expected no --fuse-norm, got --fuse-norm$",
    ),
    (TRAIN + "--fuse-norm --unfused", "--fuse-norm: has no effect with --unfused, which .*, got --fuse-norm$"),
    (TRAIN + "--fuse-norm --x-free", "--fuse-norm: has no effect with --x-free, whose .*, got --fuse-norm$"),
    (TRAIN + "--fuse-norm --compile", "--fuse-norm: has no effect with --compile, which .*, got --fuse-norm$"),
    (
        TRAIN + "--fuse-norm --checkpoint-activations",
        "--fuse-norm: has no effect with --checkpoint-activations, which .*, got --fuse-norm$",
    ),
    (TRAIN + "--fuse-norm --kind prompt", "--fuse-norm: has no effect with --kind prompt, which .*, got --fuse-norm$"),
    (MULTITASK + "--data a good.jsonl --fuse-norm", "multitask: unknown --fuse-norm"),
    (
        TRAIN + "--x-free --unfused",
        "--x-free: has no effect with --unfused, which .*: expected no --x-free, got --x-free$",
    ),
    (ROUTE + "--free-epochs 1", "--free-epochs: has no effect with --cost 0.0: expected no --free-epochs, got 1$"),
    (
        "ablate --train-texts 400 --train good.jsonl --eval good.jsonl",
        "--train-texts: expected --train-texts or --train, not both: .*; got 400 and good.jsonl$",
    ),
    # of what several adapters in a batch share
    (ROUTE + "--modules-to-save norm", "route train: --modules-to-save: expected no modules of the backbone, .* norm$"),
    (MULTITASK + "--data a good.jsonl --modules-to-save norm", "multitask: --modules-to-save: expected no modules"),
    (
        MULTITASK + '--data a good.jsonl --adapters a \'{{"modules_to_save": ["norm"]}}\'',
        "--adapters a: expected no modules of the backbone, .*, got norm$",
    ),
    (ROUTE + "--no-train-adapters", "--train-adapters: expected several adapters to train, got --no-train-adapters"),
    (MULTITASK + "--data a good.jsonl --temperature 0.5", "--temperature: expected a number in \\[1, inf\\], got 0.5"),
    (MULTITASK + "--data keys good.jsonl", "--data: expected a non-empty name without dots .*, got 'keys'"),
    (MULTITASK + "--data a/b good.jsonl", "--data: expected a task's name that a folder can have, got a/b"),
    (DISTILL + "--task classification", "--task: expected causal-lm without --keep, .*, got classification"),
    (
        TRAIN + "--train good.jsonl",
        "train: --train: expected one file, got two: write all rows into one; see",
    ),
    ("train --model {model} --train good.jsonl --output ''", "--output: expected the name of a folder, got ''"),
    (TRAIN + "--max-norm 0", "--max-norm: expected a number above 0, .* or inf, got 0"),
    (
        TRAIN + "--resume --overwrite",
        "--overwrite: expected --resume, which continues the earlier run, or --overwrite, which replaces it; got both$",
    ),
    (
        TRAIN + "--no-train-adapters --task causal-lm",
        "--train-adapters: expected adapters to train with --task causal-lm: without .*; got --no-train-adapters$",
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
    ("ablate --set foo=1", "--set: expected one of adapter_dim, position, .*, got 'foo'"),
    ("ablate --set epochs", "--set: expected FIELD=VALUE,VALUE,..., got 'epochs'"),
    ("ablate --set epochs=1 --set epochs=2", "--set: expected each field once, got epochs=1 epochs=2"),
    ("ablate --seeds 0", "--seeds: expected an integer >= 1, got 0"),
    (
        MULTITASK + "--data a good.jsonl --adapters a '{{\"depth\": 2}}' --adapters a '{{\"depth\": 1}}'",
        "--adapters: expected each task once, got a twice",
    ),
    # files and folders
    (
        "train --model good.jsonl --train good.jsonl --output out",
        "--model: .* got the file good.jsonl",
    ),
    ("train --model ./no --train good.jsonl --output out", "--model: no folder no"),
    (DISTILL + "--teacher no.gguf", "--teacher: no file no.gguf"),
    ("train --model {model} --train no.jsonl --output out", "--train: no file no.jsonl"),
    (TRAIN + "--eval folder.csv", "--eval: expected a file, got the folder folder.csv"),
    (
        TRAIN + "--eval old",
        "--eval: old: expected .txt files, or .* label, got a folder with 'checkpoints/step-00000002'",
    ),
    (TRAIN + "--eval bad.txt", "bad.txt: expected a name that ends in .jsonl, .csv"),
    (TRAIN + "--eval empty.jsonl", "--eval: empty.jsonl: no rows"),
    (
        TRAIN + "--eval other.csv",
        "--eval: other.csv: column 'text' is missing; there are 'body', 'label'; --text-column names another",
    ),
    (
        TRAIN + "--eval pairs.csv",
        "--eval: pairs.csv: columns 'text', 'label' are missing; .*; --text-column and --label-column name others. "
        "prompt and completion are for --task causal-lm$",
    ),
    (
        TRAIN + "--label-column lab",
        "--train: good.jsonl: column 'lab' is missing; there are 'text', 'label'; --label-column names another",
    ),
    (
        TRAIN.replace("good", "one"),
        "--train: one.jsonl: column 'label': expected at least two different labels, got 'a'",
    ),
    (MULTITASK + "--data a no.jsonl", "--data a: no file no.jsonl"),
    (
        MULTITASK + "--data a good.jsonl other.csv",
        "--data a: other.csv: column 'text' is missing; there are 'body', 'lab",
    ),
    (MULTITASK + "--data a one.jsonl", "--data a: one.jsonl: column 'label': expected at least two different labels"),
    (DISTILL + "--keep no.jsonl", "--keep: no file no.jsonl"),
    ("qa train --model {model} --train other.csv --output out", "other.csv: expected a name that ends in .json"),
    (
        "qa train --model {model} --train q.jsonl --output out",
        "--train: q.jsonl: field 'answers' is missing: no question",
    ),
    ("demo --train good.jsonl --eval no.csv", "demo: --eval: no file no.csv"),
    ("train --model {model} --train good.jsonl --output bad.txt", "--output: expected a folder, got bad.txt"),
    (TRAIN + "--resume", "--resume: expected a checkpoint in out/checkpoints, got none"),
    (
        "train --model {model} --train good.jsonl --output old",
        "--output: old .*\\(--resume\\), .*\\(--overwrite\\)",
    ),
    ("eval no", "eval: no: no such folder; expected the output folder of a training, a checkpoint or a saved adapter"),
    (
        "eval bad.txt",
        "eval: bad.txt: expected the output folder of a training, a checkpoint or a saved adapter, got a file",
    ),
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
    Path("one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    Path("q.jsonl").write_text('{"question": "what", "context": "the apple"}\n')
    Path("other.csv").write_text("body,label\nthe apple,a\n")
    Path("pairs.csv").write_text("prompt,completion\nthe apple, is red\n")
    Path("bad.txt").write_text("x")
    Path("empty.jsonl").touch()
    Path("old", "checkpoints", "step-00000002").mkdir(parents=True)
    Path("folder.csv").mkdir()
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "eval classification --data questions.jsonl",
            "--data: questions.jsonl: columns 'text', 'label' are missing; .*'answers'; --text-column and "
            "--label-column name others. classification is a run of classification, which reads 'text' and 'label'$",
        ),
        (
            "eval multitask/tasks/small --data {bad}",
            "--data: .*: 1 bad row:\n.*: label 'maybe' is not one of the training's labels ",
        ),
        (
            "eval routing --data {bad}",
            "--data: .*: 1 bad row:\n.*: label 'maybe' is not one of the training's labels ",
        ),
        (
            "eval qa --data colors.jsonl",
            "--data: colors.jsonl: columns 'question', 'context' are missing; .* qa is a run of "
            "question answering, which reads 'question', 'context' and 'answers'$",
        ),
        (
            "eval causal-lm --data questions.jsonl",
            "--data: questions.jsonl: column 'text' is missing; .*; --text-column names another, or --prompt-column "
            "and --completion-column a pair. causal-lm is a run of causal-lm, which reads 'prompt' and 'completion', "
            "or 'text'$",
        ),
        (
            "eval classification --data {pairs}",
            "pairs.jsonl: columns 'text', 'label' are missing; there are 'prompt', 'completion'; --text-column and "
            "--label-column name others. classification is a run of classification, which reads 'text' and 'label'$",
        ),
        ("eval qa --data no.jsonl", "--data: no file no.jsonl"),
        ("eval qa --text-column x", "--text-column: has no effect for a run of question answering, .*: .*, got x$"),
        (
            "eval classification --prompt-column x",
            "--prompt-column: has no effect for a run of classification, .*: .*, got x$",
        ),
        (
            "qa predict classification --data questions.jsonl --output a.json",
            "a run of question answering, got one of `adapterkern train`$",
        ),
        (
            "qa predict qa --data questions.jsonl --output no/a.json",
            "--output: expected a file in a folder that exists, g",
        ),
    ],
)
def test_a_saved_run_s_data_are_checked_before_its_backbone_is_loaded(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1] / "golden" / "runs")
    monkeypatch.setattr(backbone, "_read", lambda *_, **__: pytest.fail("loads a backbone"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "the apple", "label": "maybe"}\n')
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "the apple", "completion": " is red"}\n')
    assert cli.main(shlex.split(line.format(bad=bad, pairs=pairs))) == 1
    assert re.search(message, capsys.readouterr().err.strip())


LABELS = (
    "bad.jsonl: 1 bad row:\n  bad.jsonl:2: column 'label': label 'c' is not one of the training's labels 'a', 'b'\n"
    "set --skip-bad-rows to "
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (TRAIN + "--eval bad.jsonl", "train: --eval: " + LABELS),
        (ROUTE + "--eval bad.jsonl", "route train: --eval: " + LABELS),
        (MULTITASK + "--data x good.jsonl bad.jsonl", "multitask: --data x: " + LABELS),
        (DISTILL + "--task classification --keep good.jsonl --eval bad.jsonl", "distill: --eval: " + LABELS),
        ("demo --train good.jsonl --eval bad.jsonl", "demo: --eval: " + LABELS.partition("\nset")[0] + "\n"),
        ("ablate --train good.jsonl --eval bad.jsonl", "ablate: --eval: " + LABELS.partition("\nset")[0] + "\n"),
        (TRAIN + "--eval c.jsonl --skip-bad-rows", "train: --eval: c.jsonl: no rows are left of 1"),
        (TRAIN.replace("good", "blank"), "blank.jsonl:1: column 'text': expected a non-empty string, got an empty one"),
        (
            DISTILL + "--keep blank.jsonl",
            "--keep: blank.jsonl: 1 bad row:\n  blank.jsonl:1: column 'text': expected a non-empty string",
        ),
    ],
)
def test_bad_rows_are_found_before_a_backbone_is_loaded(
    line: str,
    message: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backbone, "_read", lambda *_, **__: pytest.fail("loads a backbone"))
    for name, labels, text in (("good", "abab", "x"), ("bad", "acb", "x"), ("c", "c", "x"), ("blank", "a", " ")):
        rows = [{"text": text, "label": label} for label in labels]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(shlex.split(line.format(model=model_folder))) == 1
    assert message in capsys.readouterr().err


def test_liger_is_missed_before_a_backbone_is_loaded(
    model_folder: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adapterkern.model import liger

    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    arguments = ["train", "--model", str(model_folder), "--train", str(files[0]), "--output", "out", "--liger"]
    assert cli.main(arguments) == 1
    assert "train: --liger: expected liger-kernel, which is not installed: pip install" in capsys.readouterr().err


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
