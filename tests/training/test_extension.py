"""A lock that a killed process left in torch's folder of extensions."""

import os
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from adapterkern import cli
from adapterkern.training.parallel import extension


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_a_long_wait_is_told_once(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extension, "PATIENCE", 0.1)
    threading.Timer(0.6, lock.unlink).start()
    with extension.waits_told():
        FileBaton(str(lock), wait_seconds=0.02).wait()
    (record,) = caplog.records
    assert f"waiting for {lock}, by which another process compiles" in record.getMessage()
    assert "delete that file" in record.getMessage()


def test_a_short_wait_is_not(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    threading.Timer(0.1, lock.unlink).start()
    with extension.waits_told():
        FileBaton(str(lock), wait_seconds=0.02).wait()
    assert not caplog.records
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("adapterkern")]


def test_doctor_names_an_old_lock(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert str(lock) not in capsys.readouterr().out  # somebody may be compiling right now
    long_ago = time.time() - 7200
    os.utime(lock, (long_ago, long_ago))
    assert cli.main(["doctor"]) == 0
    assert f"{lock} is 120 min old" in capsys.readouterr().out
