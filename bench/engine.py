"""pytest-benchmark as the engine: its fixture, statistics and JSON, our interleaved rounds.

pytest-benchmark times one function after another, and here all variants of a case must take turns. So the rounds are
measured by ``measure.interleave`` when the first variant of a case comes up, and every variant then replays its own
into the fixture's pedantic mode, by a clock that stands still except when it is told how long something took.
"""

import dataclasses
import datetime
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

from bench.cases import COPY, Case, Variant
from bench.measure import copy_variant, device_name, host_seconds, interleave, launches, machine, peak_bytes
from bench.roofs import gemm_flops, l2_bandwidth

TIMED = {"adapter": "bench.adapter", "optimizer": "bench.optimizer", "step": "bench.step"}


@dataclasses.dataclass
class Options:
    """What the command line asked for."""

    parts: tuple[str, ...]
    device: torch.device
    quick: bool
    json: Path
    peer_python: str | None
    only: str = ""

    @property
    def rounds(self) -> int:
        return 10 if self.quick else 40

    def seconds(self, part: str) -> float:
        """How long the rounds of one case may take together."""
        return {"step": 36.0}.get(part, 6.0) / (4 if self.quick else 1)


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
        self._case: Case | None = None
        self._measured: dict[str, tuple[Variant, list[float], dict[str, Any]]] = {}
        self._done = self._total = 0
        self._start = time.monotonic()
        self._commit = get_commit_info()  # the one that runs; another may be made before it is over

    def plan(self) -> list[tuple[Case, str]]:
        """Every case with every name of a variant."""
        o = self.options
        found = []
        for part in (p for p in o.parts if p in TIMED):
            module = self._module(part)
            for case in module.cases(o.device, o.quick):
                if o.only in case.name:
                    found += [(case, name) for name in module.names(case, o.device)]
                    found += [(case, COPY)] * (case.floor_bytes > 0)
                    self._total += 1
        return found

    def _module(self, part: str) -> ModuleType:
        return importlib.import_module(TIMED[part])

    def measured(self, case: Case, name: str) -> tuple[Variant, list[float], dict[str, Any]]:
        """One variant, its times and its figures; the first call for a case measures all of its variants."""
        if case is not self._case:
            self._measure(case)
        return self._measured[name]

    def _measure(self, case: Case) -> None:
        o = self.options
        self._case, self._measured = None, {}  # let go of the last case's tensors
        self._done += 1
        self.say(f"[{self._done}/{self._total}] {case.part}: {case.name}")
        module = self._module(case.part)
        variants = module.build(case, o.device, o.peer_python) if case.part == "step" else module.build(case, o.device)
        if case.floor_bytes:
            variants.append(copy_variant(case.floor_bytes, o.device))
        try:
            times = interleave(case, variants, o.device, o.rounds, o.seconds(case.part))
            for v in variants:
                figures: dict[str, Any] = {"case": dataclasses.asdict(case), "variant": v.name, **v.info}
                figures |= {"error": v.error, "budget": v.budget}
                if v.run is not None and v.name != COPY:
                    figures |= {"peak_bytes": peak_bytes(v.run, o.device), "launches": launches(v.run, o.device)}
                    figures["host_seconds"] = host_seconds(v.run, o.device)
                self._measured[v.name] = v, times.get(v.name, []), figures
        finally:
            for v in variants:
                v.close()
        self._case = case

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:5.0f} s  {text}", file=sys.stderr, flush=True)

    # pytest's and pytest-benchmark's hooks

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.say(f"failed: {report.nodeid}\n{report.longreprtext}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say(report.longreprtext)

    def pytest_benchmark_update_machine_info(self, config: object, machine_info: dict[str, Any]) -> None:
        del machine_info["node"]
        device = self.options.device
        machine_info.update(machine(device), quick=self.options.quick)
        machine_info["roofs"] = {"gemm_flops": gemm_flops(device), "l2_bytes": l2_bandwidth(device)}

    def pytest_benchmark_update_commit_info(self, config: object, commit_info: dict[str, Any]) -> None:
        commit_info.update(self._commit)

    def pytest_benchmark_update_json(self, config: object, benchmarks: object, output_json: dict[str, Any]) -> None:
        output_json["tables"], output_json["missing"] = self.tables, self.missing


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
    arguments += ["no:terminal", "--benchmark-json", str(options.json), "--benchmark-disable-gc", "--capture=no"]
    return pytest.main(arguments, plugins=[Engine(options)])


def result_path(device: torch.device, whole: bool) -> Path:
    """``bench/results/<device>/<date>-<commit>.json`` for a whole run; a partial or quick one is not kept with them."""
    commit = str(get_commit_info().get("id", "unknown"))[:7]
    now = datetime.datetime.now(datetime.UTC)
    if not whole:
        return Path(".benchmarks") / f"{now:%Y-%m-%dT%H%M%S}-{commit}.json"
    folder = "-".join(device_name(device).replace("(R)", "").split())
    return Path(__file__).parent / "results" / folder / f"{now:%Y-%m-%d}-{commit}.json"
