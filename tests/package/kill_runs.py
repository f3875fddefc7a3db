"""Kill −9 training and saving, at random moments and at every touch of the file system; see that nothing is lost.

    python -m tests.package.kill_runs --kills 60 --events 0 --saves 60 --output result.json

A run is killed, looked at, resumed, killed again, until it ends; then another begins. Looked at means: every file that
does not bear a temporary name is whole; the newest checkpoint is no older than the last one whose save had returned;
no more steps are lost than lie between two checkpoints; and in the end the trained weights are an undisturbed run's,
bit for bit. Processes are forked after the imports, so that a kill costs a fraction of a second.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file

from adapterkern.files import read_json, sha256
from adapterkern.model.files.folder import read_adapter
from adapterkern.training import ClassificationHead, loop, read_metrics, train
from adapterkern.training.run.checkpoint import checkpoints, save_checkpoint
from adapterkern.training.saved import load_run
from tests.support import tiny_run

EVERY = 2  # steps between checkpoints
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
ROWS = [
    {"input_ids": [3 + (i * j) % 90 for j in range(1, 4 + i % 7)], "label": ("no", "yes")[i % 2]} for i in range(24)
]
MODEL = tiny_run.model(init="xavier")  # every child has its own copy of it


def train_in(directory: Path, tell: Callable[[str], None]) -> None:
    """A run of 12 steps, resumed where that is possible; tells of each step and each checkpoint."""

    def save(*args: Any) -> Path:
        tell("saving")
        path = save_checkpoint(*args)
        tell(f"saved {path.name.removeprefix('step-')}")
        return path

    step = loop.Run._step

    def make_step(run: Any, examples: Any) -> None:
        step(run, examples)
        tell(f"step {run.state.step}")

    loop.checkpoint.save_checkpoint = save  # type: ignore[assignment]  # called by position
    loop.Run._step = make_step  # type: ignore[method-assign, assignment]  # called by position
    resume = bool(checkpoints(directory))
    config = tiny_run.quiet(
        output_dir=directory, checkpoint_every=EVERY, log_every=1, resume=resume, overwrite=not resume, eval_every=3
    )
    tell("begin")
    train(MODEL, ROWS, config, eval_data=ROWS[:6])


def save_in(directory: Path, tell: Callable[[str], None]) -> None:
    """Saves adapters over each other without end, the n-th made of the number n."""
    tell("begin")
    for number in range(10**9):
        with torch.no_grad():
            for parameter in MODEL.adapter_parameters():
                parameter.fill_(number)
        MODEL.save_pretrained(directory)
        tell(f"saved {number}")


def run_child(
    work: Callable[[Path, Callable[[str], None]], None], directory: Path, kill: float | int | None
) -> tuple[bool, list[str], float]:
    """Fork, work, kill after so many seconds (float) or before that file event (int, from 1; 0 counts them).

    Returns whether the work ended by itself, what it told, and how long it took from its beginning.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        status = 1
        try:

            def tell(line: str) -> None:
                os.write(writing, f"{line}\n".encode())

            events = _die_at_event(directory, kill) if isinstance(kill, int) else []
            work(directory, tell)
            tell(f"events {len(events)}")
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        lines = [told.readline()]  # "begin"
        started = time.monotonic()
        if isinstance(kill, float):
            time.sleep(kill)
            os.kill(pid, signal.SIGKILL)
        lines += told.readlines()
    _, status = os.waitpid(pid, 0)
    elapsed = time.monotonic() - started
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the child failed in {directory}")
    return not os.WIFSIGNALED(status), [line.decode().strip() for line in lines], elapsed


def _die_at_event(directory: Path, number: int) -> list[str]:
    """Kill this process before its ``number``-th touch of a file in ``directory``; the touches so far come back."""
    inside = str(directory)
    touched: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS and str(args[0]).startswith(inside):
            touched.append(event)
            if len(touched) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return touched


def look(directory: Path, lines: list[str]) -> dict[str, Any]:
    """Check what a killed run has left; raises AssertionError over anything half-written or lost."""
    leftovers = 0
    for path in directory.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(directory).parts):
            leftovers += 1
        elif path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.name == "metrics.jsonl":
            read_metrics(path)  # whose last line may be cut, and is then left out
        elif path.name == "README.md":
            assert "## Versions" in path.read_text(encoding="utf-8"), path
    found = checkpoints(directory)
    for path in found:
        for name, digest in read_json(path / "state.json")["files"].items():
            assert sha256(path / name) == digest, path / name
        read_adapter(MODEL.base, path)
        ClassificationHead.from_pretrained(path)
        load_run(path)
    newest = int(found[-1].name.removeprefix("step-")) if found else 0
    saved = max([0, *(int(line.split()[1]) for line in lines if line.startswith("saved"))])
    step = max([0, *(int(line.split()[1]) for line in lines if line.startswith("step"))])
    assert newest >= saved, f"checkpoint {saved} was saved, {newest} is the newest there"
    assert step - newest <= EVERY, f"step {step} was made, {newest} is the newest checkpoint"
    return {"lost": max(0, step - newest), "saving": lines[-1] == "saving", "leftovers": leftovers, "newest": newest}


def kill_training(folder: Path, draw: random.Random, kills: int, events: int | None) -> dict[str, Any]:
    """``kills`` at random moments, and at ``events`` file events (None: each one of a run's)."""
    done, lines, duration = run_child(train_in, folder / "whole", 0)
    assert done
    count = int(lines[-1].removeprefix("events "))
    final = [sha256(folder / "whole" / name) for name in ("adapterkern.safetensors", "head.safetensors")]
    chosen = list(range(1, count + 1)) if events is None else sorted(draw.sample(range(1, count + 1), events))
    plan: list[float | int] = [draw.uniform(0, duration) for _ in range(kills)]
    plan += chosen
    reports: list[dict[str, Any]] = []
    runs, directory = 0, _fresh(folder / "run")
    for kill in plan:
        if isinstance(kill, int):
            directory = _fresh(folder / "run")  # events are counted from a run's beginning
        done, lines, _ = run_child(train_in, directory, kill)
        if not done:
            reports.append(look(directory, lines) | {"at": "event" if isinstance(kill, int) else "moment"})
        if isinstance(kill, int):
            done = done or run_child(train_in, directory, None)[0]
        if done:
            same = [sha256(directory / name) for name in ("adapterkern.safetensors", "head.safetensors")] == final
            assert same, f"the resumed run in {directory} ended with other weights"
            leftover = list(directory.rglob(".*"))
            assert not leftover, f"left behind: {leftover}"
            runs, directory = runs + 1, _fresh(folder / "run")
    return {
        "kills": len(reports),
        "at random moments": sum(r["at"] == "moment" for r in reports),
        "before a file event": sum(r["at"] == "event" for r in reports),
        "while a checkpoint was being saved": sum(r["saving"] for r in reports),
        "with temporary files left behind": sum(r["leftovers"] > 0 for r in reports),
        "steps lost": dict(sorted(Counter(r["lost"] for r in reports).items())),
        "runs that ended with an undisturbed run's weights": runs,
        "steps between checkpoints": EVERY,
        "steps a run": 12,
    }


def kill_saving(folder: Path, draw: random.Random, kills: int) -> dict[str, Any]:
    """Kills while an adapter is saved over another one: the last one is there, or the next."""
    states: Counter[str] = Counter()
    directory = _fresh(folder / "saved")
    for _ in range(kills):
        _, lines, _ = run_child(save_in, directory, draw.uniform(0, 0.4))
        if not (directory / "adapterkern.json").exists():
            assert len(lines) == 1, "an adapter was saved and is gone"
            states["nothing saved yet"] += 1
            continue
        waiting = any(path.name.endswith(".next") for path in directory.iterdir())
        _, tensors = read_adapter(MODEL.base, directory)
        values = {float(t.min()) for t in tensors.values()} | {float(t.max()) for t in tensors.values()}
        number = max([-1, *(int(line.split()[1]) for line in lines if line.startswith("saved"))])
        assert len(values) == 1, values
        assert number < 0 or values <= {number, number + 1}, f"{number} was saved, {values} is there"
        states["whole, its weights still under the hidden name" if waiting else "whole"] += 1
    return {"kills": kills, **states}


def _fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="at random moments of training")
    parser.add_argument("--events", type=int, help="at so many file events of a run; default each")
    parser.add_argument("--saves", type=int, default=60, help="at random moments of saving an adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, started = random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        result = {
            "training": kill_training(Path(name), draw, arguments.kills, arguments.events),
            "saving": kill_saving(Path(name), draw, arguments.saves),
        }
    result["seconds"] = round(time.monotonic() - started, 1)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
