"""The engine of ``python -m bench``: measures case by case and saves after each one.

The variants of a case take turns (``measure.interleave``), which pytest-benchmark cannot do: it times one function
after another, and is there for ``pytest bench`` (test_suite.py). The file has the format of pytest-benchmark's, so that
``pytest-benchmark compare`` reads it, and besides it the counted tables and the variants that are missing.
"""

import contextlib
import dataclasses
import datetime
import gc
import importlib
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest_benchmark
import torch
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import get_commit_info, safe_dumps

from adapterkern.files import replacing
from bench import report, tables
from bench.cases import COPY, Case, Variant
from bench.measure import (
    MIN_ROUNDS,
    busy_cores,
    copy_variant,
    host_seconds,
    interleave,
    launches,
    machine,
    peak_bytes,
    results_folder,
)
from bench.roofs import gemm_flops, l2_bandwidth

TIMED = {"adapter": "bench.adapter", "optimizer": "bench.optimizer", "step": "bench.step", "cost": "bench.cost"}
FAILED, INTERRUPTED = 1, 2  # exit statuses
Plan = Sequence[tuple[Case, Sequence[str]]]


@dataclasses.dataclass
class Options:
    """What to measure; the fields after ``append`` are for runs that have minutes (bench.gpu)."""

    parts: tuple[str, ...]
    device: torch.device
    quick: bool
    json: Path
    peer_python: str | None
    only: str = ""
    append: bool = False  # keep the other cases of the file, which must be of the same commit
    plan: Plan | None = None  # these cases and variants instead of the parts' own
    case_seconds: float | None = None
    case_rounds: int | None = None
    roofs: bool = True  # measure the device's peak FLOPs and L2 bandwidth
    launches: bool = True  # count the launches, which needs a profiler and takes a while
    deadline: float = math.inf  # of time.monotonic(): no case starts after it

    @property
    def rounds(self) -> int:
        """The most rounds per case."""
        return self.case_rounds or (10 if self.quick else 40)

    def seconds(self, part: str) -> float:
        """The most seconds for all rounds of one case."""
        return self.case_seconds or {"step": 36.0, "cost": 36.0}.get(part, 6.0) / (4 if self.quick else 1)


def part_cases(part: str, device: torch.device, quick: bool) -> Iterator[tuple[Case, Sequence[str]]]:
    """The cases of a timed part, each with the names of its variants."""
    module = importlib.import_module(TIMED[part])
    for case in module.cases(device, quick):
        yield case, module.names(case, device)


def build(case: Case, device: torch.device, names: Sequence[str], peer_python: str | None) -> list[Variant]:
    """The variants of a case, and the copy of its floor's bytes if it has one."""
    module = importlib.import_module(TIMED[case.part])
    more = (peer_python,) if case.part == "step" else ()
    variants: list[Variant] = module.build(case, device, names, *more)
    if case.floor_bytes:
        variants.append(copy_variant(case.floor_bytes, device))
    return variants


class Engine:
    """One run: what it has measured so far, and the file that it saves them to."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.benchmarks: list[dict[str, Any]] = []
        self.tables: dict[str, Any] = {}
        self.missing: list[dict[str, str]] = []
        self.failed = False
        self._start = time.monotonic()
        self._commit = get_commit_info()  # now: another may be made before the run is over
        self._before = earlier_run(options.json, self._commit.get("id")) if options.append else None
        known = self._before["machine_info"].get("busy_cores", 0.0) if self._before else 0.0
        self._busy = max(known, self._or(os.getloadavg()[0], busy_cores))
        self._about: dict[str, Any] | None = None

    def run(self) -> int:
        """Count the tables, measure the cases; returns the exit status. An error costs its own case or table alone."""
        try:
            for part in self.options.parts:
                if part in tables.COUNTED:
                    with self._kept_going(part):
                        self._count(part)
            plan = self.plan()
            for number, (case, names) in enumerate(plan, 1):
                title = f"{case.part}: {case.name}"
                self.say(f"[{number}/{len(plan)}] {title}")
                with self._kept_going(title):
                    self.measure(case, names)
                self.save()
        except KeyboardInterrupt:
            status = INTERRUPTED
        else:
            status = FAILED if self.failed else 0
        self.save()
        if not (self.benchmarks or self.tables):
            left = "is unchanged" if self.options.json.exists() else "is not written"
            self.say(f"nothing was measured completely: {self.options.json} {left}")
        return status

    @contextlib.contextmanager
    def _kept_going(self, what: str) -> Iterator[None]:
        """An error inside is printed and sets the exit status."""
        try:
            yield
        except Exception:
            self._fail(f"{what}\n{traceback.format_exc()}")

    def _fail(self, text: str) -> None:
        self.failed = True
        self.say(f"failed: {text}")

    def _count(self, part: str) -> None:
        self.say(part)
        for counted in tables.COUNTED[part](self.options.device, self.options.quick):
            self.tables[part] = counted
            self.save()

    def plan(self) -> list[tuple[Case, Sequence[str]]]:
        """Every case that is wanted, with the names of its variants."""
        o = self.options
        planned = list(o.plan or ())
        if o.plan is None:
            for part in (p for p in o.parts if p in TIMED):
                with self._kept_going(part):
                    planned += part_cases(part, o.device, o.quick)
        return [(case, names) for case, names in planned if o.only in case.name]

    def measure(self, case: Case, names: Sequence[str]) -> None:
        """Measure the variants of one case; those that cannot run are added to ``missing``."""
        o = self.options
        if time.monotonic() > o.deadline:
            late = [*names, COPY] if case.floor_bytes else names
            self.missing += [{"case": case.name, "variant": name, "reason": "no time was left"} for name in late]
            return
        gc.collect()  # the last case's model may be in a cycle, and two models may not fit
        variants = build(case, o.device, names, o.peer_python)
        try:
            times = interleave(case, variants, o.device, o.rounds, o.seconds(case.part))
            found = [self._benchmark(case, v, times[v.name]) for v in variants if not v.missing]
        finally:
            for v in variants:
                v.close()
        self.benchmarks += found
        for v in variants:
            if v.missing:
                self.missing.append({"case": case.name, "variant": v.name, "reason": v.missing})
            if v.failed:
                self._fail(f"{case.part}: {case.name}: {v.name}: {v.missing}")

    def _benchmark(self, case: Case, v: Variant, times: list[float]) -> dict[str, Any]:
        """One variant's entry in the file, its memory and launches measured."""
        o = self.options
        figures: dict[str, Any] = {"case": dataclasses.asdict(case), "variant": v.name, **v.info}
        figures |= {"error": v.error, "budget": v.budget}
        if v.run is not None and v.name != COPY:
            figures["peak_bytes"] = peak_bytes(v.run, o.device)
            figures["launches"] = launches(v.run, o.device) if o.launches else None
            # the time of a wall case includes the host's
            figures["host_seconds"] = None if case.wall else host_seconds(v.run, o.device)
        stats = Stats()
        stats.data = times
        group = f"{case.part}: {case.name}"
        param = f"{group}: {v.name}"
        timer = v.info.get("timed", "the variant's own clock")
        return {
            "group": group,
            "name": f"test_time[{param}]",  # as `pytest bench` calls it
            "fullname": f"bench/test_suite.py::test_time[{param}]",
            "params": {"case": case.name, "name": v.name},
            "param": param,
            "extra_info": figures,
            "options": {"disable_gc": True, "timer": timer, "min_rounds": MIN_ROUNDS, "max_time": o.seconds(case.part)},
            "stats": stats.as_dict() | {"data": times, "iterations": 1},
        }

    def say(self, text: str) -> None:
        """Print a line of progress to stderr."""
        print(f"{time.monotonic() - self._start:5.0f} s  {text}", file=sys.stderr, flush=True)

    def _machine_info(self) -> dict[str, Any]:
        o = self.options
        info: dict[str, Any] = self._or({}, pytest_benchmark_generate_machine_info)
        info.pop("node", None)
        known = {"versions": {"torch": torch.__version__}, "cuda": torch.version.cuda}
        least = {"device": str(o.device), "threads": torch.get_num_threads(), **known}
        info |= least | self._or({}, machine, o.device) | {"quick": o.quick, "busy_cores": self._busy}
        if o.roofs:
            roofs = {"gemm_flops": gemm_flops, "l2_bytes": l2_bandwidth}
            info["roofs"] = {name: self._or(None, roof, o.device) for name, roof in roofs.items()}
        return info

    def _or(self, otherwise: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
        """What ``ask`` returns; an error must not prevent that the measurements are saved."""
        try:
            return ask(*arguments)
        except Exception as error:
            self.say(f"{ask.__name__} is left out: {type(error).__name__}: {error}")
            return otherwise

    def save(self) -> None:
        """Write everything measured so far, atomically: a run that is killed keeps its last file."""
        if not (self.benchmarks or self.tables):
            return
        if self._about is None:
            self._about = self._machine_info()
        document = {
            "machine_info": self._about,
            "commit_info": self._commit,
            "benchmarks": self.benchmarks,
            "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": pytest_benchmark.__version__,
            "tables": self.tables,
            "missing": self.missing,
        }
        write(self.options.json, document, self._before)


def earlier_run(path: Path, commit: str | None) -> dict[str, Any] | None:
    """The document at ``path``, None if there is none; ``ValueError`` if it is no saved run, or of another commit."""
    if not path.exists():
        return None
    try:
        before = report.load(path).data
    except ValueError as error:
        raise ValueError(f"--append: {error}") from None
    if (got := before["commit_info"].get("id")) != commit:
        raise ValueError(f"--append: expected results of commit {commit} in {path}, got {got}")
    return before


def write(path: Path, document: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Save ``document``, atomically, with the cases and tables of ``before`` that it does not have."""
    if before is not None:
        again = {b["extra_info"]["case"]["name"] for b in document["benchmarks"]}
        kept = [b for b in before["benchmarks"] if b["extra_info"]["case"]["name"] not in again]
        document = document | {
            "benchmarks": kept + document["benchmarks"],
            "tables": before["tables"] | document["tables"],
            "missing": [m for m in before["missing"] if m["case"] not in again] + document["missing"],
        }
    with replacing(path) as temporary:
        temporary.write_text(safe_dumps(document, indent=4))


def run(options: Options) -> int:
    """Measure in this process; returns the exit status."""
    return Engine(options).run()


def result_path(device: torch.device, whole: bool) -> Path:
    """``bench/results/<device>/<date>-<commit>.json`` for a whole run; ``.benchmarks/`` for a partial or quick one."""
    commit = str(get_commit_info().get("id", "unknown"))[:7]
    now = datetime.datetime.now(datetime.UTC)
    if not whole:
        return Path(".benchmarks") / f"{now:%Y-%m-%dT%H%M%S}-{commit}.json"
    return results_folder(device) / f"{now:%Y-%m-%d}-{commit}.json"
