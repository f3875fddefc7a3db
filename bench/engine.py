"""pytest-benchmark as the engine: its fixture, statistics and JSON, our interleaved rounds.

pytest-benchmark times one function after another, and here all variants of a case must take turns. So the rounds are
measured by ``measure.interleave`` when the first variant of a case comes up, and every variant then replays its own
into the fixture's pedantic mode, by a clock that stands still except when it is told how long something took.
"""

import dataclasses
import datetime
import importlib
import json
import sys
import time
from collections.abc import Callable
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
    append: bool = False  # to what the file has, of the same commit

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
        self._before = self._earlier_run()
        self._saved = False

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
        machine_info.pop("node", None)
        device, known = self.options.device, {"versions": {"torch": torch.__version__}, "cuda": torch.version.cuda}
        least = {"device": str(device), "threads": torch.get_num_threads(), **known}
        machine_info.update(least | self._or(machine, {}), quick=self.options.quick)
        machine_info["roofs"] = {"gemm_flops": self._or(gemm_flops, None), "l2_bytes": self._or(l2_bandwidth, None)}

    def _or(self, told: Callable[[torch.device], Any], otherwise: Any) -> Any:
        """What ``told`` says of the device. This runs when all is measured: no error may keep that from being saved."""
        try:
            return told(self.options.device)
        except Exception as error:
            self.say(f"{told.__name__} is left out: {type(error).__name__}: {error}")
            return otherwise

    def pytest_benchmark_update_commit_info(self, config: object, commit_info: dict[str, Any]) -> None:
        commit_info.update(self._commit)

    def pytest_benchmark_update_json(self, config: object, benchmarks: object, output_json: dict[str, Any]) -> None:
        output_json["tables"], output_json["missing"] = self.tables, self.missing
        if self._before is not None:
            again = {b["extra_info"]["case"]["name"] for b in output_json["benchmarks"]}
            kept = [b for b in self._before["benchmarks"] if b["extra_info"]["case"]["name"] not in again]
            output_json["benchmarks"] = kept + output_json["benchmarks"]
            output_json["tables"] = self._before["tables"] | self.tables
            output_json["missing"] = [m for m in self._before["missing"] if m["case"] not in again] + self.missing
        self._saved = True

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """pytest-benchmark writes nothing where no case was timed to its end; counted tables are worth a file."""
        if self._saved:
            return
        if not self.tables:
            self.say(f"nothing was measured to its end: {self.options.json} is as it was")
            return
        config, plugin = session.config, session.config._benchmarksession  # type: ignore[attr-defined]
        about = {"machine_info": plugin.get_machine_info(), "commit_info": dict(self._commit)}
        written = config.hook.pytest_benchmark_generate_json(config=config, benchmarks=[], include_data=True, **about)
        config.hook.pytest_benchmark_update_json(config=config, benchmarks=[], output_json=written)
        plugin.save_json(written)


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
