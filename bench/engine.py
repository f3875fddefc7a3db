"""pytest-benchmark as the engine: its fixture, statistics and JSON (written after every case), our interleaved rounds.

pytest-benchmark times one function after another, and here all variants of a case must take turns. So the rounds are
measured by ``measure.interleave`` when the first variant of a case comes up, and every variant then replays its own
into the fixture's pedantic mode, by a clock that stands still except when it is told how long something took.
"""

import dataclasses
import datetime
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info, safe_dumps

from adapterkern.files import replacing
from bench.cases import COPY, Case, Variant
from bench.measure import copy_variant, device_name, host_seconds, interleave, launches, machine, peak_bytes
from bench.roofs import gemm_flops, l2_bandwidth

TIMED = {"adapter": "bench.adapter", "optimizer": "bench.optimizer", "step": "bench.step"}


@dataclasses.dataclass
class Options:
    """What the command line asked for; the fields after ``append`` are for runs that have minutes (bench.gpu)."""

    parts: tuple[str, ...]
    device: torch.device
    quick: bool
    json: Path
    peer_python: str | None
    only: str = ""
    append: bool = False  # to what the file has, of the same commit
    plan: Sequence[tuple[Case, Sequence[str]]] | None = None  # these cases and variants instead of the parts' own
    case_seconds: float | None = None
    case_rounds: int | None = None
    roofs: bool = True  # measure them as well
    launches: bool = True  # count them, with a profiler that takes a while
    deadline: float = math.inf  # of time.monotonic(): no case starts after it

    @property
    def rounds(self) -> int:
        return self.case_rounds or (10 if self.quick else 40)

    def seconds(self, part: str) -> float:
        """How long the rounds of one case may take together."""
        return self.case_seconds or {"step": 36.0}.get(part, 6.0) / (4 if self.quick else 1)


class Replay:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


REPLAY = Replay()


class Engine:
    """The plugin: which cases and variants there are, one case's measurements at a time, what goes into the JSON."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tables: dict[str, Any] = {}
        self.missing: list[dict[str, str]] = []
        self._wanted: dict[Case, list[str]] = {}
        self._case: Case | None = None
        self._measured: dict[str, tuple[Variant, list[float], dict[str, Any]]] = {}
        self._error: Exception | None = None  # what kept the case from being measured
        self._done = self._total = 0
        self._start = time.monotonic()
        self._commit = get_commit_info()  # the one that runs; another may be made before it is over
        self._before = self._earlier_run()
        self._about: dict[str, Any] | None = None

    def _earlier_run(self) -> dict[str, Any] | None:
        path = self.options.json
        if not (self.options.append and path.exists()):
            return None
        before: dict[str, Any] = json.loads(path.read_text())
        expected, got = self._commit.get("id"), before["commit_info"].get("id")
        if expected != got:
            raise ValueError(f"--append: expected results of commit {expected} in {path}, got {got}")
        return before

    def plan(self) -> list[tuple[Case, str]]:
        """Every case with every name of a variant."""
        o = self.options
        self._wanted = {case: list(names) for case, names in self._cases() if o.only in case.name}
        self._total = len(self._wanted)
        return [
            (case, name) for case, names in self._wanted.items() for name in (*names, *[COPY] * (case.floor_bytes > 0))
        ]

    def _cases(self) -> Iterator[tuple[Case, Sequence[str]]]:
        o = self.options
        if o.plan is not None:
            yield from o.plan
            return
        for part in (p for p in o.parts if p in TIMED):
            module = self._module(part)
            for case in module.cases(o.device, o.quick):
                yield case, module.names(case, o.device)

    def _module(self, part: str) -> ModuleType:
        return importlib.import_module(TIMED[part])

    def measured(self, case: Case, name: str) -> tuple[Variant, list[float], dict[str, Any]]:
        """One variant, its times and its figures; the first call for a case measures all of its variants."""
        if case is not self._case:
            self._case, self._measured, self._error = case, {}, None  # lets go of the last case's tensors
            try:
                self._measure(case)
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return self._measured[name]

    def is_last(self, case: Case, name: str) -> bool:
        """Whether ``name`` is the case's last variant in the plan."""
        return name == (COPY if case.floor_bytes else self._wanted[case][-1])

    def _measure(self, case: Case) -> None:
        o = self.options
        self._done += 1
        self.say(f"[{self._done}/{self._total}] {case.part}: {case.name}")
        wanted = self._wanted[case]
        if time.monotonic() > o.deadline:
            variants = [Variant(name, missing="no time was left") for name in (*wanted, COPY)]
            self._measured = {v.name: (v, [], {}) for v in variants}
            return
        module = self._module(case.part)
        gc.collect()  # a model of the last case may lie in a cycle, and the next one beside it is too much
        more = (o.peer_python,) if case.part == "step" else ()
        variants = module.build(case, o.device, wanted, *more)
        if case.floor_bytes:
            variants.append(copy_variant(case.floor_bytes, o.device))
        try:
            times = interleave(case, variants, o.device, o.rounds, o.seconds(case.part))
            for v in variants:
                figures: dict[str, Any] = {"case": dataclasses.asdict(case), "variant": v.name, **v.info}
                figures |= {"error": v.error, "budget": v.budget}
                if v.run is not None and v.name != COPY:
                    figures["peak_bytes"] = peak_bytes(v.run, o.device)
                    figures["launches"] = launches(v.run, o.device) if o.launches else None
                    # a wall case's own time has the host's in it
                    figures["host_seconds"] = None if case.wall else host_seconds(v.run, o.device)
                self._measured[v.name] = v, times.get(v.name, []), figures
        finally:
            for v in variants:
                v.close()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:5.0f} s  {text}", file=sys.stderr, flush=True)

    # pytest's and pytest-benchmark's hooks

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.say(f"failed: {report.nodeid}\n{report.longreprtext}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say(report.longreprtext)

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config: Any = config

    def pytest_benchmark_update_machine_info(self, config: object, machine_info: dict[str, Any]) -> None:
        machine_info.pop("node", None)
        device, known = self.options.device, {"versions": {"torch": torch.__version__}, "cuda": torch.version.cuda}
        least = {"device": str(device), "threads": torch.get_num_threads(), **known}
        machine_info.update(least | self._or(machine, {}), quick=self.options.quick)
        if self.options.roofs:
            machine_info["roofs"] = {"gemm_flops": self._or(gemm_flops, None), "l2_bytes": self._or(l2_bandwidth, None)}

    def _or(self, told: Callable[[torch.device], Any], otherwise: Any) -> Any:
        """What ``told`` says of the device; no error may keep what is measured from being saved."""
        try:
            return told(self.options.device)
        except Exception as error:
            self.say(f"{told.__name__} is left out: {type(error).__name__}: {error}")
            return otherwise

    def save(self) -> None:
        """Write all that is measured so far, whole or not at all; a run that is killed keeps its last file."""
        benchmarks = self._config._benchmarksession
        if not (benchmarks.benchmarks or self.tables):
            return
        if self._about is None:
            self._about = benchmarks.get_machine_info()
        document = self._config.hook.pytest_benchmark_generate_json(
            config=self._config, benchmarks=benchmarks.benchmarks, include_data=True,
            machine_info=self._about, commit_info=self._commit,
        )  # fmt: skip
        document["tables"], document["missing"] = self.tables, self.missing
        if self._before is not None:
            again = {b["extra_info"]["case"]["name"] for b in document["benchmarks"]}
            kept = [b for b in self._before["benchmarks"] if b["extra_info"]["case"]["name"] not in again]
            document["benchmarks"] = kept + document["benchmarks"]
            document["tables"] = self._before["tables"] | self.tables
            document["missing"] = [m for m in self._before["missing"] if m["case"] not in again] + self.missing
        with replacing(self.options.json) as path:
            path.write_text(safe_dumps(document, indent=4))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.save()
        if not (session.config._benchmarksession.benchmarks or self.tables):  # type: ignore[attr-defined]
            self.say(f"nothing was measured to its end: {self.options.json} is as it was")


def replay(benchmark: Any, times: list[float]) -> None:
    """Give pytest-benchmark rounds that were measured before."""
    rounds = iter(times)
    benchmark.pedantic(lambda: REPLAY.advance(next(rounds)), rounds=len(times), iterations=1)


def run(options: Options) -> int:
    """Run the suite in this process; returns pytest's exit status."""
    options.json.parent.mkdir(parents=True, exist_ok=True)
    suite = str(Path(__file__).with_name("suite.py"))
    # No configuration file: the project's own is for its tests and names plugins that a bench does without.
    arguments = [suite, "-c", "/dev/null", "--rootdir", str(Path(suite).parent), "-p", "no:cacheprovider", "-p"]
    arguments += ["no:terminal", "--benchmark-disable-gc", "--capture=no"]
    return pytest.main(arguments, plugins=[Engine(options)])


def result_path(device: torch.device, whole: bool) -> Path:
    """``bench/results/<device>/<date>-<commit>.json`` for a whole run; a partial or quick one is not kept with them."""
    commit = str(get_commit_info().get("id", "unknown"))[:7]
    now = datetime.datetime.now(datetime.UTC)
    if not whole:
        return Path(".benchmarks") / f"{now:%Y-%m-%dT%H%M%S}-{commit}.json"
    folder = "-".join(device_name(device).replace("(R)", "").split())
    return Path(__file__).parent / "results" / folder / f"{now:%Y-%m-%d}-{commit}.json"
