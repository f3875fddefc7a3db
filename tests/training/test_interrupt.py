"""Ctrl-C, with a real signal to a real process."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from adapterkern.training import train
from adapterkern.training.run import interrupt
from adapterkern.training.run.checkpoint import checkpoints
from adapterkern.training.run.interrupt import StopRequest
from tests.support import tiny_run

pytestmark = pytest.mark.slow

ROWS = tiny_run.rows(24)
VALUES = {"epochs": 4, "log_every": 1, "accumulation": 2, "checkpoint_every": 10_000, "warmup": 3}

# In the second epoch's second step, between its two forwards, it says "go" and waits until the signal has been sent.
SCRIPT = """
import sys
import torch
from adapterkern.training import train
from tests.support import tiny_run
config = tiny_run.quiet(output_dir=sys.argv[1], **(eval(sys.argv[2]) | {"progress": True}))
model = tiny_run.model()
calls = []
def wait_in_step_5(*_):
    calls.extend([1] * torch.is_grad_enabled())  # a step's, and not one that asks the backbone how it behaves
    if len(calls) == 10:
        print("go", flush=True)
        sys.stdin.readline()
model.layers[3].register_forward_pre_hook(wait_in_step_5)
result = train(model, tiny_run.rows(24), config, tokenizer=tiny_run.tokenizer())
print(result.stopped, result.steps, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_stops_with_a_checkpoint_that_resumes(tmp_path: Path, number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), repr(VALUES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    process.send_signal(number)
    out, err = process.communicate("\n", timeout=120)
    assert process.returncode == 0, err
    assert out == "True 5\n"
    assert f"{number.name}: stopped after step 5 of 12; saved {tmp_path / 'run'}" in err
    assert "; with resume, a run goes on from there" in err
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000005"]

    model, whole_model = tiny_run.model(), tiny_run.model()
    tokenizer = tiny_run.tokenizer()
    resumed = train(
        model, ROWS, tiny_run.quiet(output_dir=tmp_path / "run", resume=True, **VALUES), tokenizer=tokenizer
    )
    whole = train(whole_model, ROWS, tiny_run.quiet(**VALUES), tokenizer=tokenizer)
    assert resumed.steps == whole.steps == 12
    assert tiny_run.same_bits(tiny_run.weights(model, resumed.head), tiny_run.weights(whole_model, whole.head))


def test_the_terminal_goes_away(tmp_path: Path) -> None:
    """SIGHUP, and from then on every write to the bar's terminal fails."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    script = SCRIPT.replace("sys.stdin.readline()", "import time; time.sleep(1)")  # nothing can be read, either
    arguments = ["-c", script, str(tmp_path / "run"), repr(VALUES)]
    process, terminal = pty.fork()
    if not process:
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    shown = b""
    while b"go\r\n" not in shown:
        shown += os.read(terminal, 4096)
    assert b"/12" in shown  # the bar
    os.close(terminal)
    os.waitpid(process, 0)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000005"]


def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it comes with the first: a launcher passes on what the terminal has sent to all."""
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_name == "SIGINT"
        monkeypatch.setattr(interrupt, "_SAME_REQUEST", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_was_ignored_stays_ignored(number: signal.Signals) -> None:
    """SIGHUP under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(number)
            assert not stop
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_stopped_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal while the prefix cache is filled: nothing was trained, and nothing claims to be a checkpoint."""
    model = tiny_run.model()
    config = tiny_run.quiet(output_dir=tmp_path, prefix_cache=True)
    signalled: list[int] = []

    def interrupt_the_first_batch(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].shape[0] < config.batch_size:  # asks the backbone how it behaves
            return
        if not signalled:
            signal.raise_signal(signal.SIGINT)
        signalled.append(1)

    model.layers[0].register_forward_pre_hook(interrupt_the_first_batch)
    result = train(model, ROWS, config, tokenizer=tiny_run.tokenizer())
    assert (result.stopped, result.steps, result.checkpoint) == (True, 0, None)
    assert len(signalled) == 1  # the batch under way, and no other
    assert checkpoints(tmp_path) == []
