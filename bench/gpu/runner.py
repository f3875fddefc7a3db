"""Steps one after another, each with a limit; whatever becomes of one, the archive holds what there is."""

import contextlib
import dataclasses
import io
import json
import os
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
LARGEST = 4 << 20  # of a file in the archive, its last bytes
GRACE = 5  # seconds between asking a step to stop and stopping it


@dataclasses.dataclass(frozen=True)
class Command:
    """``again_on`` is an exit status after which the command runs once more, with --resume, up to five times."""

    argv: Sequence[str]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    again_on: int | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: its commands run in turn, together for at most ``limit`` seconds, and it is worth ``least`` seconds.

    ``tool`` is a program that it cannot do without. A step that is ``optional`` may be left out for want of time.
    ``commands`` are asked for when the step begins: what an earlier one did may change them, and where there are none
    ``why_not`` says why.
    """

    name: str
    limit: float
    commands: Callable[[], Sequence[Command]]
    least: float = 15
    tool: str = ""
    optional: bool = False
    why_not: str = "nothing to do"


@dataclasses.dataclass
class Outcome:
    """What became of a step: ok, failed, killed, missing or left out; and how many kernels it had to compile itself."""

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
    """The outcomes so far, the folder that the steps write into, and the archive of both."""

    def __init__(
        self, work: Path, out: Path, seconds: float, root: Path, environment: Mapping[str, str],
        summarize: Callable[[Path], str],
    ) -> None:  # fmt: skip
        self.work, self.archive, self.root = work, out / ARCHIVE, root
        self.seconds, self.environment, self.summarize = seconds, dict(environment), summarize
        self.outcomes: list[Outcome] = []
        self.kernels = self._kernels()
        self.start = time.monotonic()
        if self.archive.exists():  # an earlier call's is not this one's to write over
            age = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self.archive.stat().st_mtime))
            self.archive.rename(self.archive.with_name(f"results-{age}.tar.gz"))

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def do(self, step: Step) -> None:
        """Run a step, and write the archive whatever happens in it."""
        begin = time.monotonic()
        limit = min(step.limit, self.left)
        status, reason = "killed", "with all that would have followed"
        try:
            status, reason = self._done(step, limit)
        except Exception as error:  # of this code: no step is worth the others
            status, reason = "failed", f"{type(error).__name__}: {error}"
        finally:
            took = time.monotonic() - begin
            before, self.kernels = self.kernels, self._kernels()
            compiled = self.kernels - before
            self.outcomes.append(Outcome(step.name, status, round(took, 1), round(limit, 1), reason, compiled))
            print(f"{time.monotonic() - self.start:6.1f} s  {step.name}: {status} {reason}".rstrip(), flush=True)
            self.save()

    def _kernels(self) -> int:
        """How many the Triton cache has."""
        return len(list(Path(self.environment["TRITON_CACHE_DIR"]).glob("*/__grp__*")))

    def _done(self, step: Step, limit: float) -> tuple[str, str]:
        if limit < step.least:
            status = "left out" if step.optional else "missing"
            return status, f"{max(limit, 0):.0f} s are left, and it takes at least {step.least:.0f}"
        if step.tool and shutil.which(step.tool, path=self.environment.get("PATH")) is None:
            return "missing", f"no {step.tool} on the path"
        commands = step.commands()
        if not commands:
            return "left out", step.why_not
        deadline, statuses = time.monotonic() + limit, []
        with (self.work / f"{step.name}.log").open("ab") as log:
            for command in commands:
                for argv in self._turns(command):
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
        return ("failed", f"exit {', '.join(bad)}") if bad else ("ok", "")

    def _turns(self, command: Command) -> Iterator[list[str]]:
        yield list(command.argv)
        if command.again_on is not None:
            yield from ([*command.argv, "--resume"] for _ in range(4))

    def _finish(self, argv: Sequence[str], env: Mapping[str, str], deadline: float, log: Any) -> int | None:
        """The exit status, or None if the deadline came first."""
        child = subprocess.Popen(
            argv, cwd=self.root, env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(child.pid, signal.SIGINT)  # pytest and the bench then say where they were
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            return None
        finally:
            _signal(child.pid, signal.SIGKILL)  # with its children
            child.wait()

    def save(self) -> None:
        """Write the archive anew, whole or not at all."""
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
        """The steps, and the tables of what they measured."""
        try:
            tables = self.summarize(self.work)
        except Exception as error:  # the files that they come from are in the archive
            tables = f"no tables: {type(error).__name__}: {error}"
        return f"{self.steps_table()}\n\n{tables}"

    def steps_table(self) -> str:
        lines = [f"{'step':12} {'status':9} {'s':>6} {'limit':>6} {'compiled':>8}"]
        for o in self.outcomes:
            figures = f"{o.step:12} {o.status:9} {o.seconds:6.1f} {o.limit:6.1f} {o.compiled:8}"
            lines.append(f"{figures}  {o.reason}".rstrip())
        return "\n".join(lines)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def read(archive: Path) -> dict[str, bytes]:
    """The archive's files by name."""
    with tarfile.open(archive) as tar:
        return {m.name.removeprefix("results/"): tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]


def outcomes(archive: Path) -> dict[str, dict[str, Any]]:
    """Each step's outcome by its name."""
    return {o["step"]: o for o in json.loads(read(archive)["summary.json"])}
