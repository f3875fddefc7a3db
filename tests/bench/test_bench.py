"""What the bench guarantees: fair turns, counted memory, no speed without correctness, no loss on Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import adapter, cli, engine, measure, processes, report, step
from bench.cases import COPY, Case, Variant, error_budget
from bench.measure import interleave, kept_for_backward, peak_bytes

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def make_run(path: Path, error: float) -> report.Run:
    """A saved run of three variants that took 3, 2 and 1 ms; "ours" has ``error`` against a budget of 1e-3."""
    case = {"part": "adapter", "name": "both, T=8", "shape": {}, "floor_bytes": 10**6, "flops": 1, "wall": False}
    figures = {"eager": 1e-3, "ours": error, COPY: None}
    benchmarks = [
        {
            "extra_info": {"case": case, "variant": name, "error": e, "budget": None if e is None else 1e-3},
            "stats": {"data": [1e-3 * (3 - i)] * 5},
        }
        for i, (name, e) in enumerate(figures.items())
    ]
    machine = {"device": "a CPU", "threads": 2, "cuda": None, "quick": False, "versions": {"torch": "2"}}
    saved = {"benchmarks": benchmarks, "machine_info": machine, "commit_info": {"id": "0123456789"}}
    path.write_text(json.dumps(saved | {"datetime": "2026-01-02T03:04:05", "tables": {}, "missing": []}))
    return report.load(path)


def test_variants_take_turns_and_the_first_one_changes() -> None:
    calls: list[str] = []
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in "abc"]  # type: ignore[misc]  # mypy infers no lambda with a default
    variants.append(Variant("absent", missing="not here"))
    times = interleave(Case("adapter", "x", {}), variants, CPU, rounds=6, seconds=60)
    assert {name: len(t) for name, t in times.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = ["".join(calls[i : i + 3]) for i in range(len(calls) - 18, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab"] * 2


def test_a_slow_case_still_gets_five_rounds() -> None:
    times = interleave(Case("step", "x", {}), [Variant("a", clock=lambda: 1.0)], CPU, rounds=40, seconds=0)
    assert len(times["a"]) == 5


def test_what_a_graph_keeps_is_counted_once_and_without_parameters() -> None:
    x, w = (torch.randn(64, 32, requires_grad=True) for _ in range(2))
    kept = kept_for_backward(lambda: (x * w).exp().sin(), [w], x)
    # x, the product's exponential (saved by exp and by sin) and nothing else
    assert kept == {"kept_bytes": 2 * x.nbytes, "own_bytes": x.nbytes}


def test_peak_memory_is_what_lives_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.zeros(1 << 20).add(1.0)

    assert peak_bytes(run, CPU) == pytest.approx(2 << 22, rel=0.01)


def test_the_command_line_sets_the_environment_before_torch_reads_it() -> None:
    code = "import sys, bench.cli; print(sorted({'torch', 'triton', 'adapterkern.ops.choice'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_variant_over_its_error_budget_shows_no_speed(tmp_path: Path) -> None:
    line = {}
    for error in (1e-4, 2e-3):
        text = report.render(make_run(tmp_path / "run.json", error))
        line[error] = next(x for x in text.splitlines() if x.startswith("| ours"))
    assert "2.00 ms" in line[1e-4] or "2 ms" in line[1e-4]
    assert "0.67" in line[1e-4]
    assert "error over budget" in line[2e-3]
    assert "ms" not in line[2e-3]
    assert "0.67" not in line[2e-3]


def test_a_step_in_16_bits_is_judged_by_one_in_32() -> None:
    shape = (128, 256, 4, 4, 2, 256)
    names = [step.EAGER, step.OURS, step.CACHED]
    built = {}
    for dtype in ("float32", "bfloat16"):
        case = step.step_case("tiny", shape, (1, 3), (4, 24), CPU, dtype, classify=False)
        built[dtype] = {v.name: v for v in step.build(case, CPU, names, None)}
        assert not any(v.missing for v in built[dtype].values())
    eager = built["bfloat16"][step.EAGER].error
    assert eager is not None
    assert 1e-3 < eager < 5e-2  # its own rounding
    for name in (step.OURS, step.CACHED):
        rounded, same = built["bfloat16"][name], built["float32"][name]
        assert rounded.budget == error_budget(eager, torch.bfloat16)
        assert rounded.error == pytest.approx(eager, rel=0.5)
        assert same.budget == step.SAME
        assert same.error == pytest.approx(0, abs=step.SAME)


def test_comparing_two_runs_leaves_out_what_is_wrong_in_either(tmp_path: Path) -> None:
    good, bad = make_run(tmp_path / "a.json", 1e-4), make_run(tmp_path / "b.json", 1.0)
    lines = report.compare(good, bad).splitlines()
    assert next(x for x in lines if ": eager" in x).split("|")[-2].strip() == "1.00"
    assert next(x for x in lines if ": ours" in x).split("|")[-2].strip() == report.DASH


def test_a_figure_of_several_processes_has_an_interval(tmp_path: Path) -> None:
    def of_process(ours: float) -> dict[str, Any]:
        document = json.loads(make_run(tmp_path / "one.json", 1e-4).path.read_text())
        for b in document["benchmarks"]:
            b["name"] = b["extra_info"]["variant"]
            if b["name"] == "ours":
                b["stats"]["data"] = [3e-3 * ours] * 5
        return document

    documents = [of_process(r) for r in (0.5, 0.9, 0.6)]
    for document, load in zip(documents, (0.0, 1.3, 0.2), strict=True):
        document["machine_info"]["busy_cores"] = load
    together = processes.joined(documents)
    (tmp_path / "run.json").write_text(json.dumps(together))
    run = report.load(tmp_path / "run.json")
    eager, ours, _ = run.groups["adapter", "both, T=8"]
    assert ours.ratio(eager) == pytest.approx((0.6, 0.5, 0.9))
    assert ours.info["processes"] == [5, 5, 5]
    line = next(x for x in report.render(run).splitlines() if x.startswith("| ours"))
    assert "0.60 (0.50–0.90)" in line
    assert run.title.endswith("**the machine was busy: others used 1.3 cores**")
    del together["benchmarks"][1]
    assert [b["name"] for b in processes.joined([together, of_process(0.5)])["benchmarks"]] == ["eager", COPY]


def test_a_run_on_busy_cores_stays_flagged_when_more_is_appended(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "run.json"
    options = engine.Options((), CPU, True, path, None, append=True, roofs=False)
    seen = iter((1.2, 0.1))
    monkeypatch.setattr(engine, "busy_cores", lambda: next(seen))
    monkeypatch.setattr(engine, "get_commit_info", lambda: {"id": "0123456789"})
    loads = []
    for _ in range(2):
        run = engine.Engine(options)
        run.tables = {"counted": {}}
        run.save()
        loads.append(json.loads(path.read_text())["machine_info"]["busy_cores"])
    assert loads == [1.2, 1.2]


def test_cores_in_use_are_those_of_now() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert measure.busy_cores() > 0.3
    finally:
        busy.kill()
        busy.wait()


def test_each_process_gets_the_command_s_other_options() -> None:
    given = ["step", "--processes", "5", "--only", "16×48", "--append", "--json=a.json"]
    assert cli._without(given, "--processes", "--json", "--append") == ["step", "--only", "16×48"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--processes", "0"], "--processes: expected at least 1, got 0"),
        (["--proc", "3"], "got --proc 3"),  # each process would get it, and repeat itself
    ],
)
def test_numbers_of_processes_that_are_refused(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_measure", lambda _: 0)
    with pytest.raises(SystemExit):
        cli.main(["adapter", *given])
    assert message in capsys.readouterr().err


# Runs the engine over made-up parts. argv: file, parts, the case that is interrupted, the signal.
ENGINE = """
import os, signal, sys, types, torch
from pathlib import Path
from bench import engine, tables
from bench.cases import Case, Variant

def build(case, device, wanted):
    assert list(wanted) == ["a", "b"]
    if case.name == sys.argv[3]:
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
    return [Variant("a", lambda: None), Variant("b", missing="nobody has it")]

def broken(device):
    raise OSError("no such machine")

part = types.ModuleType("part")
part.cases = lambda device, quick: [Case("fake", "first", {}, floor_bytes=4096), Case("fake", "second", {})]
part.names = lambda case, device: ["a", "b"]
part.build = build
sys.modules["part"], engine.TIMED["fake"] = part, "part"

def counted(device, quick):
    yield {"rows": [1]}
    if sys.argv[3] == "counted":
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
    yield {"rows": []}

tables.COUNTED["counted"] = counted
engine.gemm_flops = engine.machine = broken
path, parts = Path(sys.argv[1]), tuple(sys.argv[2].split(","))
engine.run(engine.Options(parts, torch.device("cpu"), True, path, None, append=True))
"""


def run_engine(out: Path, parts: str, interrupted: str = "none", how: str = "SIGINT") -> str:
    """Run the engine above, which adds to the file; returns its stderr."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", ENGINE, str(out), parts, interrupted, how]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGKILL if how == "SIGKILL" else 0), done.stderr
    return done.stderr


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_what_ends_a_run_keeps_the_cases_before_it(how: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run_engine(out, "fake", "second", how)
    run = report.load(out)
    assert [e.variant for e in run.groups["fake", "first"]] == ["a", COPY]
    assert list(run.groups) == [("fake", "first")]
    assert run.data["missing"] == [{"case": "first", "variant": "b", "reason": "nobody has it"}]


def test_a_killed_table_keeps_the_rows_before(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run_engine(out, "counted", "counted", "SIGKILL")
    assert report.load(out).data["tables"] == {"counted": {"rows": [1]}}


def test_ctrl_c_before_the_first_case_is_over_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert f"nothing was measured completely: {out} is not written" in run_engine(out, "fake", "first")
    assert not out.exists()


def test_a_part_adds_to_the_file_of_another_and_a_broken_machine_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    said = run_engine(out, "counted")
    assert "broken is left out: OSError: no such machine" in said
    run_engine(out, "fake", "second")
    run_engine(out, "fake", "first")
    run_engine(out, "fake")  # again, and whole: the last of each counts
    run = report.load(out)
    assert [(case, e.variant) for case, entries in run.groups.items() for e in entries] == [
        (("fake", "first"), "a"),
        (("fake", "first"), COPY),
        (("fake", "second"), "a"),
    ]
    assert run.data["tables"] == {"counted": {"rows": []}}
    assert len(run.data["missing"]) == 2
    assert run.machine["device"] == "cpu"
    assert run.title.startswith("cpu, ")


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("echo RTX, 1, 2 MHz, 3 MHz, 4 MHz, 5 W", {"name": "RTX", "clocks.mem": "3 MHz"}),
        ("echo Insufficient Permissions; exit 4", {"missing": "nvidia-smi: exit 4: Insufficient Permissions"}),
        (None, {"missing": "[Errno 2] No such file or directory: 'nvidia-smi'"}),
    ],
    ids=["answers", "refuses", "missing"],
)
def test_nvidia_smi_is_asked_for_the_uuid_and_may_fail(
    answer: str | None, state: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer is not None:
        (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\necho "$*" >"$0.asked"\n{answer}\n')
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    properties = types.SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    got = measure._gpu_state(torch.device("cuda", 1))
    assert state.items() <= got.items()
    if answer is not None:
        assert "--id=GPU-12-34" in (tmp_path / "nvidia-smi.asked").read_text()


def test_max_autotune_is_for_the_main_shape_alone() -> None:
    gpu = torch.device("cuda")
    tuned = [c for c in adapter.cases(gpu, quick=False) if "torch.compile max-autotune" in adapter.names(c, gpu)]
    assert {tuple(c.shape.values())[:4] for c in tuned} == {(8192, 4096, 64, "bfloat16")}
    assert {c.shape["pass"] for c in tuned} == {"forward", "backward", "both"}


class _Device:
    """Replaces torch.cuda: a GPU that spins for some cycles, and a host that needs some per call."""

    def __init__(self, host_cycles: int, queue: int = 1024) -> None:
        self.host_cycles, self.queue = host_cycles, queue
        self.spun = self.queued = self.host = 0

    def _sleep(self, cycles: int) -> None:
        self.spun, self.queued, self.host = cycles, 0, 0

    def call(self) -> None:
        self.queued += 1
        self.host += self.host_cycles
        if self.queued >= self.queue:  # a full queue holds the host until the device moves on
            self.host = max(self.host, self.spun)

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802  # torch.cuda's name
        return types.SimpleNamespace(
            record=lambda: None,
            synchronize=lambda: None,
            query=lambda: self.host >= self.spun,
            elapsed_time=lambda other: 1e3 * self.queued,  # one second per call
        )

    def get_device_properties(self, device: torch.device) -> Any:
        return types.SimpleNamespace(L2_cache_size=8)


@pytest.mark.parametrize(
    ("host_cycles", "queue", "how"),
    [
        (1000, 1024, "8 calls queued behind 4 M cycles"),
        (1_500_000, 1024, "8 calls queued behind 16 M cycles"),  # the host needs 12 M
        (1000, 4, "2 calls queued behind 64 M cycles"),  # no spin is long enough for a full queue
        (10**9, 1024, "1 of the times with host time in them"),
    ],
)
def test_device_times_contain_no_host_time_or_say_so(
    host_cycles: int, queue: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = _Device(host_cycles, queue)
    for name in ("_sleep", "Event", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, getattr(device, name))
    timer = measure.EventTimer(CPU)
    assert timer(device.call) == 1.0
    assert how in timer.how(device.call)


def fake_parts(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    """Make "fake" a part whose variants ``build`` makes."""
    part = types.ModuleType("fake_part")
    part.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_part", part)
    monkeypatch.setitem(engine.TIMED, "fake", "fake_part")


def planned(path: Path, *cases: Case, **more: Any) -> engine.Options:
    """Options to measure these cases' variants "a" and "b"."""
    plan = [(case, ("a", "b")) for case in cases]
    return engine.Options(("fake",), CPU, True, path, None, plan=plan, roofs=False, **more)


def test_an_error_costs_its_own_variant_or_case_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(case: Case, device: torch.device, wanted: Sequence[str]) -> list[Variant]:
        if case.name == "broken":
            raise RuntimeError("out of memory")
        return [Variant("a", lambda: None), Variant.broken("b", ValueError("no such tile"))]

    fake_parts(monkeypatch, build)
    path = tmp_path / "x.json"
    assert engine.run(planned(path, Case("fake", "broken", {}), Case("fake", "good", {}))) == engine.FAILED
    run = report.load(path)
    assert {case: [e.variant for e in entries] for (_, case), entries in run.groups.items()} == {"good": ["a"]}
    assert run.data["missing"] == [{"case": "good", "variant": "b", "reason": "ValueError: no such tile"}]
    said = capsys.readouterr().err
    assert "failed: fake: broken" in said
    assert "out of memory" in said
    assert "failed: fake: good: b: ValueError: no such tile" in said


def test_no_case_starts_after_the_deadline(tmp_path: Path) -> None:
    case = Case("fake", "late", {}, floor_bytes=8)
    run = engine.Engine(planned(tmp_path / "x.json", case, deadline=0.0))
    assert run.run() == 0
    assert [(m["variant"], m["reason"]) for m in run.missing] == [(n, "no time was left") for n in ("a", "b", COPY)]


def test_a_saved_run_has_the_format_of_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_parts(monkeypatch, lambda *_: [Variant("a", lambda: None), Variant("b", lambda: None)])
    path = tmp_path / "x.json"
    assert engine.run(planned(path, Case("fake", "x", {}, floor_bytes=4096))) == 0
    made = json.loads(path.read_text())
    expected = next(run.data for run in report.newest() if run.machine["cuda"] is None)
    assert made.keys() == expected.keys()
    of_load = {"load_before", "busy_cores"}  # the first in older files
    assert made["machine_info"].keys() - of_load == expected["machine_info"].keys() - of_load - {"roofs"}
    assert made["machine_info"]["busy_cores"] >= 0
    assert made["commit_info"].keys() == expected["commit_info"].keys()
    entry, known = made["benchmarks"][0], expected["benchmarks"][0]
    assert entry.keys() == known.keys()
    assert entry["stats"].keys() == known["stats"].keys()
    assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) == 10
    assert entry["name"] == "test_time[fake: x: a]"
