"""The bench's own promises: fair turns, counted memory, no speed without correctness, Ctrl-C that loses little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import report
from bench.cases import COPY, Case, Variant
from bench.measure import interleave, kept_for_backward, peak_bytes

CPU = torch.device("cpu")


def make_run(path: Path, error: float) -> report.Run:
    """A saved run of three variants that took 1, 2 and 3 ms; "ours" has ``error`` against a budget of 1e-3."""
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
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in "abc"]
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


def test_comparing_two_runs_leaves_out_what_is_wrong_in_either(tmp_path: Path) -> None:
    good, bad = make_run(tmp_path / "a.json", 1e-4), make_run(tmp_path / "b.json", 1.0)
    lines = report.compare(good, bad).splitlines()
    assert next(x for x in lines if ": eager" in x).split("|")[-2].strip() == "1.00"
    assert next(x for x in lines if ": ours" in x).split("|")[-2].strip() == report.DASH


def test_ctrl_c_keeps_the_cases_before_it(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(
        """
import sys, types, torch
from pathlib import Path
from bench import engine
from bench.cases import Case, Variant

def build(case, device):
    if case.name == "second":
        raise KeyboardInterrupt
    return [Variant("a", lambda: None), Variant("b", missing="nobody has it")]

part = types.ModuleType("part")
part.cases = lambda device, quick: [Case("fake", "first", {}, floor_bytes=4096), Case("fake", "second", {})]
part.names = lambda case, device: ["a", "b"]
part.build = build
sys.modules["part"], engine.TIMED["fake"] = part, "part"
engine.run(engine.Options(("fake",), torch.device("cpu"), True, Path(sys.argv[1]), None))
"""
    )
    root = Path(__file__).parent.parent
    out = tmp_path / "out.json"
    subprocess.run(
        [sys.executable, str(script), str(out)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=True
    )
    run = report.load(out)
    assert [e.variant for e in run.groups["fake", "first"]] == ["a", COPY]
    assert list(run.groups) == [("fake", "first")]
    assert run.data["missing"] == [{"case": "first", "variant": "b", "reason": "nobody has it"}]
