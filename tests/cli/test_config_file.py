"""``--config``: options from a file, in front of those that are typed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterkern import cli
from adapterkern.cli.config_file import with_file

BEFORE = ["train", "--model", "m", "--train", "t.csv", "--output", "out"]


def words(path: Path, *typed: str, before: list[str] | None = None) -> list[str]:
    argv = [*(before or BEFORE[:1]), f"--config={path}", *typed]
    return with_file(argv, cli._parser(argv))


def arguments(path: Path, *typed: str) -> Any:
    argv = [*BEFORE, *typed]
    return cli._parser(argv).read(words(path, *argv[1:]))


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: ./llama\nlr: 2e-3\nlayers: [-2, -1]\nprefix-cache: false\nliger: true\nmax_steps: null\n")
    assert words(path) == ["train", "--model=./llama", "--lr=2e-3", "--layers=-2,-1", "--no-prefix-cache", "--liger"]
    found = arguments(path)
    assert (found.model, found.lr, found.layers, found.prefix_cache, found.liger) == ("m", 2e-3, [-2, -1], False, True)
    assert not found.parser.repeated


def test_what_is_typed_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"lr": 1.0, "progress": True, "unfused": True, "epochs": 7}))
    found = arguments(path, "--lr", "5e-4", "--no-progress")
    assert (found.lr, found.progress, found.unfused, found.epochs) == (5e-4, False, True, 7)
    for typed in (["--config", str(path)], [f"--config={path}"]):
        argv = [*BEFORE, *typed]
        assert with_file(argv, cli._parser(argv))[1:5] == ["--lr=1.0", "--progress", "--unfused", "--epochs=7"]


@pytest.mark.parametrize(("value", "expected"), [("true", "--no-plot"), ("false", "--plot")])
def test_the_negative_name_of_a_flag_is_its_negative(value: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"no-plot: {value}\n")
    assert words(path) == ["train", expected]


def test_keys_that_yaml_merges_are_no_doubles(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("<<: {lr: 1.0, seed: 2}\nlr: 2.0\n")
    assert words(path) == ["train", "--lr=2.0", "--seed=2"]


def test_a_run_s_task(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "runs" / "classification" / "task.json"
    found = arguments(golden)
    saved = json.loads(golden.read_text())["config"]
    assert (found.lr, found.max_steps, found.batch_size) == (saved["lr"], saved["max_steps"], saved["batch_size"])
    assert found.output_dir == "out"
    assert not found.overwrite
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"format_version": 1, "config": {"max_norm": None}}))
    assert arguments(path).max_norm == float("inf")


def test_a_command_within_a_command(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("doc-stride: 4\n")
    assert words(path, before=["qa", "train"]) == ["qa", "train", "--doc-stride=4"]


def test_a_training_by_a_file_alone(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model": str(model_folder), "train": str(files[0]), "output": str(tmp_path / "run"), "max-steps": 1}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values | {"adapter_dim": 4, "progress": False, "plot": False}))
    assert cli.main(["train", "--config", str(path)]) == 0
    assert json.loads((tmp_path / "run" / "adapterkern.json").read_text())["adapter"]["adapter_dim"] == 4
    assert "saved in" in capsys.readouterr().out


def test_a_run_is_resumed_without_its_options(
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files[0].parent)
    options = ["--model", str(model_folder), "--train", files[0].name, "--eval", files[1].name, "--adapter-dim", "4"]
    options += ["--layers=-1", "--max-steps", "2", "--checkpoint-every", "1", "--max-norm", "inf", "--no-progress"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for run in (whole, halves):
        assert cli.main(["train", *options, "--no-plot", "--output", str(run)]) == 0
    shutil.rmtree(halves / "checkpoints" / "step-00000002")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--output", "halves", "--log-every", "1"]) == 0
    assert (halves / "adapterkern.safetensors").read_bytes() == (whole / "adapterkern.safetensors").read_bytes()
    assert not (halves / "training.png").exists()
    saved = json.loads((halves / "sources.json").read_text())["options"]
    assert (saved["train"], saved["layers"], saved["max_norm"]) == (str(files[0]), [-1], "inf")
    assert (saved["progress"], saved["log_every"]) == (False, 1)
    again = ["train", "--config", str(halves / "sources.json"), "--output", "again"]
    assert cli.main(again) == 0
    assert (tmp_path / "again" / "adapterkern.safetensors").read_bytes() == (
        whole / "adapterkern.safetensors"
    ).read_bytes()


def test_a_resumed_run_has_the_settings_that_it_began_with(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model_folder), "--train", str(files[0]), "--max-steps", "1", "--no-progress"]
    assert cli.main(["train", *options, "--output", str(tmp_path)]) == 0
    assert cli.main(["train", "--resume", "--output", str(tmp_path), "--lr", "1"]) == 1
    assert "--lr" in capsys.readouterr().err
    (tmp_path / "sources.json").write_text("{")
    assert cli.main(["train", "--resume", "--output", str(tmp_path)]) == 2
    assert "missing --model, --train" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--output", str(tmp_path / "none")]) == 2
    assert "--output: expected the folder of a run to resume, got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "lerning-rate: 1", "a.yaml: expected options of adapterkern train, got 'lerning-rate'"),
        ("a.yaml", "adapter-di: 1", "got 'adapter-di' (did you mean adapter-dim?)"),
        ("a.yaml", "- lr", "a.yaml: expected names of options and their values, got ['lr']"),
        ("a.yaml", "lr: [", "a.yaml: not YAML: "),
        ("a.json", "[]", "a.json: expected a JSON object, got list"),
        ("a.yaml", "liger: 3", "a.yaml: liger: expected true or false, got 3"),
        ("a.yaml", "lr: true", "a.yaml: lr: expected a value of --lr, got True"),
        ("a.yaml", "lr: 1\nlr: 2", "a.yaml: not YAML: key 'lr' is there twice"),
        (
            "a.yaml",
            "eval-every: 1\neval_every: 2",
            "expected each option once, got 'eval-every' and 'eval_every'",
        ),
        ("a.yaml", "plot: true\nno-plot: true", "a.yaml: expected each option once, got 'plot' and 'no-plot'"),
        ("a.yaml", "help: true", "a.yaml: expected options of adapterkern train, got 'help'"),
        ("a.yaml", "[" * 3000, "a.yaml: not YAML: maximum recursion depth"),
        ("a.json", '{"lr": 1, "lr": 2}', "a.json: not a JSON file: key 'lr' is there twice"),
        ("a.yaml", "lr: fast", "--lr: expected a number, got 'fast'"),
        ("a.yaml", "layers: 0\nevery: 2", "--layers: expected --layers or --every, not both"),
        ("a.toml", "lr = 1", "--config: expected a .yaml or .json file, got "),
        (None, "", "--config: no file "),
    ],
)
def test_refused(name: str | None, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / (name or "a.yaml")
    if name:
        path.write_text(text)
    assert cli.main([*BEFORE, "--config", str(path)]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_config_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BEFORE, "--config"]) == 2
    assert "--config: expected a value, got none" in capsys.readouterr().err
