"""One run per folder: the lock, and what a run that fails leaves."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapterkern.training import train
from adapterkern.training.loop import Run
from adapterkern.training.run import lock
from adapterkern.training.run.lock import LOCK_NAME, check_writable, locked
from tests.support import tiny_run

HOLDER = """
import sys, pathlib
from adapterkern.training.run.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_held_by_one_and_gone_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked(folder):
        assert (folder / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")
        for attempt in (lambda: locked(folder).__enter__(), lambda: check_writable(folder)):
            with pytest.raises(BlockingIOError, match=rf"output_dir: {folder} is in use by process {os.getpid()} on "):
                attempt()
        assert (folder / LOCK_NAME).exists()  # a refused run takes nothing with it
    assert not (tmp_path / "a").exists()
    with locked(folder):
        (folder / "file").touch()
    assert os.listdir(folder) == ["file"]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=f"in use by process {process.pid} on "):
        check_writable(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert (tmp_path / LOCK_NAME).exists()
    check_writable(tmp_path)
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_whose_file_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner removed it between another process's open and lock: that one tries again on the new file."""
    flock = fcntl.flock
    calls: list[int] = []

    def late(handle: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK_NAME).unlink()
        calls.append(how)
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(BlockingIOError):
            check_writable(tmp_path)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(handle: int, how: int) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", without)
    with locked(tmp_path):
        assert f"{tmp_path}: its file system has no locks" in caplog.text


def test_a_second_run_is_refused_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Run._step
    refused: list[bool] = []

    def second(self: Run, examples: list) -> None:
        if not refused:
            refused.append(True)
            for more in ({}, {"overwrite": True}):
                with pytest.raises(BlockingIOError, match=r"output_dir: .* is in use by process"):
                    train(tiny_run.model(), rows, tiny_run.quiet(output_dir=folder, **more), tokenizer=tokenizer)
        step(self, examples)

    monkeypatch.setattr(Run, "_step", second)
    folder, rows, tokenizer = tmp_path / "run", tiny_run.rows(8), tiny_run.tokenizer()
    assert train(tiny_run.model(), rows, tiny_run.quiet(output_dir=folder), tokenizer=tokenizer).steps == 4
    assert refused
    assert LOCK_NAME not in os.listdir(folder)


@pytest.mark.parametrize("wrong", [{"rows": []}, {"resume": True}, {"warmup": 99}], ids=lambda wrong: next(iter(wrong)))
def test_a_run_that_fails_leaves_no_folder(tmp_path: Path, wrong: dict) -> None:
    folder, values = tmp_path / "new" / "run", dict(wrong)
    rows = values.pop("rows", tiny_run.rows(8))
    with pytest.raises((ValueError, FileNotFoundError)):
        train(tiny_run.model(), rows, tiny_run.quiet(output_dir=folder, **values), tokenizer=tiny_run.tokenizer())
    assert os.listdir(tmp_path) == []


def test_a_run_without_a_finished_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-00000001.1").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000001.1" / "task.json").write_text("{")
    config = tiny_run.quiet(output_dir=tmp_path, max_steps=2)
    train(tiny_run.model(), tiny_run.rows(8), config, tokenizer=tiny_run.tokenizer())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
