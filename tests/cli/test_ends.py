"""How a command ends that is interrupted, whose reader goes away, or that is one of several processes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterkern import _ctrl_c, cli
from adapterkern.cli import budget
from adapterkern.training import loop, processes
from tests.support.commands import accuracy

BUDGET = ["budget", "--model-config", "llama-7b", "--max-params", "8e6"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture
def stopped(model_folder: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that a lost terminal has stopped after its third step."""
    step = loop.Run._step

    def hang_up(self: Any, examples: Any) -> None:
        if self.state.step == 2:
            signal.raise_signal(signal.SIGHUP)
        step(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_step", hang_up)
        arguments = ["train", "--model", str(model_folder), "--train", str(files[0]), "--eval", str(files[1])]
        arguments += ["--output", str(tmp_path / "run"), "--adapter-dim", "4", "--no-progress", "--no-plot"]
        assert cli.main(arguments) == 130
    return tmp_path / "run"


def test_a_stopped_run_is_evaluated_by_its_newest_checkpoint(
    stopped: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(stopped / "checkpoints" / "step-00000003")]) == 0
    expected = accuracy(capsys.readouterr().out)
    assert not caplog.text
    assert cli.main(["eval", str(stopped)]) == 0
    assert accuracy(capsys.readouterr().out) == expected
    assert f"{stopped}: has not finished; this is of its newest checkpoint, step-00000003" in caplog.text


def test_eval_reads_other_columns_and_skips_bad_rows(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "other.csv"
    data.write_text("body,kind\nplum,fruit\n,fruit\niron,metal\n")
    options = ["--text-column", "body", "--label-column", "kind"]
    assert cli.main(["eval", str(stopped), "--data", str(data), *options]) == 1
    assert "1 bad row" in capsys.readouterr().err
    assert cli.main(["eval", str(stopped), "--data", str(data), *options, "--skip-bad-rows"]) == 0
    assert "targets            2.0000" in capsys.readouterr().out


def test_eval_with_another_tokenizer_says_so(
    stopped: Path, model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    other = shutil.copytree(model_folder, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"plum"', '"prune"'))
    assert cli.main(["eval", str(stopped), "--model", str(other)]) == 0
    assert f"was trained with other tokens than those of {other}" in caplog.text


def test_a_backbone_that_has_moved(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = stopped / "sources.json"
    sources.write_text(re.sub(r'"model": "[^"]*"', '"model": "/moved/llama"', sources.read_text()))
    assert cli.main(["eval", str(stopped)]) == 1
    assert "was trained on /moved/llama, which is not there; say where it is now" in capsys.readouterr().err


def raising(error: BaseException) -> Callable[..., int]:
    def run(arguments: Any) -> int:
        raise error

    return run


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    library = ImportError("numpy")
    library.__cause__ = KeyboardInterrupt()
    for error in (KeyboardInterrupt(), library):  # a library makes an error of its own from it
        monkeypatch.setattr(budget, "run", raising(error))
        assert cli.main(BUDGET) == 130
        assert capsys.readouterr().err == "adapterkern budget: interrupted\n"


def test_an_unforeseen_error_is_one_line_with_its_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget, "run", raising(KeyError("x")))
    assert cli.main(BUDGET) == 1
    assert capsys.readouterr().err == ("adapterkern budget: KeyError: 'x' (ADAPTERKERN_TRACEBACK=1 shows where)\n")


def test_ctrl_c_during_imports_is_one_line(tmp_path: Path) -> None:
    """The signal comes while torch is imported, for which a module of its name stands in."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time; time.sleep(9)"
    )
    path = os.pathsep.join((str(tmp_path), ENVIRONMENT["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, "-m", "adapterkern", "doctor"],
        env=ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "adapterkern: interrupted\n", "")


def test_ctrl_c_in_another_program_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    _ctrl_c.end_at_once()
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(sys, "argv", ["/usr/bin/adapterkern", "doctor"])
    try:
        _ctrl_c.end_at_once()
        assert signal.getsignal(signal.SIGINT) is _ctrl_c._end
        _ctrl_c.raise_again()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in ``adapterkern budget ... | head -0``."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "adapterkern", *BUDGET],
        env=ENVIRONMENT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_error_of_all_processes_is_printed_by_the_first_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setattr(budget, "run", raising(ValueError("--x: wrong")))
    monkeypatch.setenv("RANK", "0")
    assert cli.main(BUDGET) == 1
    assert capsys.readouterr().err == "adapterkern budget: --x: wrong\n"
    assert slept == []
    monkeypatch.setenv("RANK", "1")
    assert cli.main(BUDGET) == 1
    assert capsys.readouterr().err == "process 1: adapterkern budget: --x: wrong\n"
    assert slept == [15.0]  # in which the launcher ends it, if the first has failed
    monkeypatch.setattr(budget, "run", raising(processes.OtherProcessError("process 0: ValueError: wrong")))
    assert cli.main(BUDGET) == 1
    assert capsys.readouterr().err == ""
