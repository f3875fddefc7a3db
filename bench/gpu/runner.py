"""Runs steps one after another, each with a time limit; whatever happens in one, the archive keeps all results."""

import contextlib
import ctypes
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterkern.files import replacing, write_json, write_text

ARCHIVE = "results.tar.gz"
LARGEST = 4 << 20  # bytes kept of a file in the archive: the last ones
_COUNTS = re.compile(r"\b\d+ (?:passed|failed|skipped|error)")  # pytest's last line
GRACE = 5  # seconds between SIGINT and SIGKILL for a step over its limit


@dataclasses.dataclass(frozen=True)
class Command:
    """A process; after the exit status ``again_on`` it is run again with --resume, at most five times in all."""

    argv: Sequence[str]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    again_on: int | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: its commands run one after another, together for at most ``limit`` seconds.

    It is not started with less than ``least`` seconds left; if it is ``optional``, that is not an error. ``tool`` is a
    program that it needs. ``commands`` is called when the step begins, since earlier steps may change them; if there
    are none, ``why_not`` is the reason. "{seconds}" in their arguments is replaced by the step's seconds, less a margin
    for ending. If a ``vital`` step fails, no later step is started.
    """

    name: str
    limit: float
    commands: Callable[[], Sequence[Command]]
    least: float = 15
    tool: str = ""
    optional: bool = False
    why_not: str = "nothing to do"
    vital: bool = False


@dataclasses.dataclass
class Outcome:
    """A step's status: ok, failed, killed, missing or left out; and how many kernels it had to compile."""

    step: str
    status: str
    seconds: float
    limit: float
    reason: str = ""
    compiled: int = 0

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "killed", "missing")


class Run:
    """The outcomes so far, the folder that the steps write to, and the archive of both."""

    def __init__(
        self, work: Path, out: Path, seconds: float, root: Path, environment: Mapping[str, str],
        summarize: Callable[[Path], str], start: float | None = None,
    ) -> None:  # fmt: skip
        self.work, self.archive, self.root = work, out / ARCHIVE, root
        self.seconds, self.environment, self.summarize = seconds, dict(environment), summarize
        self.outcomes: list[Outcome] = []
        self.kernels = self._kernels()
        self.start = time.monotonic() if start is None else start
        self.lost = ""  # the vital step that failed
        if self.archive.exists():  # an earlier call's archive is kept
            age = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self.archive.stat().st_mtime))
            self.archive.rename(self.archive.with_name(f"results-{age}.tar.gz"))

    @property
    def left(self) -> float:
        """Seconds left for all steps."""
        return self.seconds - (time.monotonic() - self.start)

    def do(self, step: Step) -> None:
        """Run a step, and write the archive whatever happens in it."""
        begin = time.monotonic()
        limit = max(0.0, min(step.limit, self.left))
        status, reason = "killed", "with all later steps"
        try:
            status, reason = self._done(step, limit)
            if step.vital and status != "ok":
                self.lost = step.name
        except Exception as error:  # an error of this code must not cost the other steps
            status, reason = "failed", f"{type(error).__name__}: {error}"
        finally:
            took = time.monotonic() - begin
            before, self.kernels = self.kernels, self._kernels()
            compiled = self.kernels - before
            self.outcomes.append(Outcome(step.name, status, round(took, 1), round(limit, 1), reason, compiled))
            print(f"{time.monotonic() - self.start:6.1f} s  {step.name}: {status} {reason}".rstrip(), flush=True)
            try:
                self.save()
            except OSError as error:  # there may be space again after the next step
                print(f"warning: the archive is unchanged: {error}", flush=True)

    def _kernels(self) -> int:
        """The number of kernels in the Triton cache."""
        return len(list(Path(self.environment["TRITON_CACHE_DIR"]).glob("*/__grp__*")))

    def _done(self, step: Step, limit: float) -> tuple[str, str]:
        if self.lost:
            return "left out", f"{self.lost} has failed"
        if limit < step.least:
            status = "left out" if step.optional else "missing"
            return status, f"{limit:.0f} s are left, and it takes at least {step.least:.0f}"
        if step.tool and shutil.which(step.tool, path=self.environment.get("PATH")) is None:
            return "missing", f"no {step.tool} on the path"
        commands = step.commands()
        if not commands:
            return "left out", step.why_not
        deadline, statuses = time.monotonic() + limit, []
        with (self.work / f"{step.name}.log").open("ab") as log:
            for command in commands:
                for turn in self._turns(command):
                    argv = [a.replace("{seconds}", f"{max(5.0, (limit - 15) / len(commands)):.0f}") for a in turn]
                    log.write(f"$ {' '.join(argv)}\n".encode())
                    log.flush()
                    statuses.append(self._finish(argv, {**self.environment, **command.env}, deadline, log))
                    if statuses[-1] is None:
                        return "killed", f"after {limit:.0f} s"
                    if statuses[-1] != command.again_on:
                        break
        bad = [str(s) for s in statuses if s]
        again = commands[-1].again_on
        if again is not None and statuses[-1] == 0:
            bad = [s for s in bad if s != str(again)]
        said = self._said(step.name)
        return ("failed", f"exit {', '.join(bad)}: {said}") if bad else ("ok", said if _COUNTS.search(said) else "")

    def _said(self, name: str) -> str:
        """The last line of a step's log, or pytest's counts."""
        lines = (self.work / f"{name}.log").read_text(errors="replace").split("\n")
        counts = [line for line in lines if _COUNTS.search(line)]
        last = [line for line in lines if line.strip() and not line.startswith("$ ")]
        return (counts or last or [""])[-1].strip("= ")[:160]

    def _turns(self, command: Command) -> Iterator[list[str]]:
        yield list(command.argv)
        if command.again_on is not None:
            yield from ([*command.argv, "--resume"] for _ in range(4))

    def _finish(self, argv: Sequence[str], env: Mapping[str, str], deadline: float, log: Any) -> int | None:
        """The exit status, or None if the deadline was reached."""
        child = subprocess.Popen(
            argv, cwd=self.root, env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        try:
            return child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(child.pid, signal.SIGINT)  # pytest and the bench then report and save
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            return None
        finally:
            _signal(child.pid, signal.SIGKILL)  # with its children
            child.wait()

    def save(self) -> None:
        """Write the archive again, atomically."""
        write_json(self.work / "summary.json", [dataclasses.asdict(o) for o in self.outcomes])
        write_text(self.work / "summary.md", self.summary())
        with replacing(self.archive) as temporary, tarfile.open(temporary, "w:gz") as tar:
            for path in sorted(p for p in self.work.rglob("*") if p.is_file()):
                content = path.read_bytes()
                member = tarfile.TarInfo(f"results/{path.relative_to(self.work)}")
                content = content[-LARGEST:]
                member.size, member.mtime = len(content), int(time.time())
                tar.addfile(member, io.BytesIO(content))

    def summary(self) -> str:
        """The table of the steps, and the tables of their results."""
        try:
            tables = self.summarize(self.work)
        except Exception as error:  # the archive has the files behind the tables
            tables = f"no tables: {type(error).__name__}: {error}"
        return f"{self.steps_table()}\n\n{tables}"

    def steps_table(self) -> str:
        """One line per step."""
        lines = [f"{'step':12} {'status':9} {'s':>6} {'limit':>6} {'compiled':>8}"]
        for o in self.outcomes:
            figures = f"{o.step:12} {o.status:9} {o.seconds:6.1f} {o.limit:6.1f} {o.compiled:8}"
            lines.append(f"{figures}  {o.reason}".rstrip())
        return "\n".join(lines)


def _die_with_parent() -> None:
    """In the child: die with the parent, so that no step stays on the GPU (Linux, PR_SET_PDEATHSIG)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def read(archive: Path) -> dict[str, bytes]:
    """The archive's files by name."""
    with tarfile.open(archive) as tar:
        files = {m.name.removeprefix("results/"): tar.extractfile(m) for m in tar if m.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}


def outcomes(archive: Path) -> dict[str, dict[str, Any]]:
    """Each step's outcome by its name."""
    return {o["step"]: o for o in json.loads(read(archive)["summary.json"])}
