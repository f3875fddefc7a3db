"""Both calls on a GPU, rehearsed end to end, and what a failing step costs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import adapter, cost, optimizer, report
from bench import step as training_step
from bench.gpu import measured, runner, steps, summary
from bench.gpu.runner import Command, Run, Step
from bench.sweep import CONTEXT_LOST

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NO_GIT = not (ROOT / ".git").exists()


def rehearse(call: str, out: Path) -> tuple[dict[str, Any], dict[str, bytes], str]:
    """The steps' outcomes, the archive's files, and what was printed."""
    environment = {**os.environ, "PYTHON": sys.executable}
    for name in ("PYTHONPATH", "TRITON_INTERPRET"):
        environment.pop(name, None)
    command = ["sh", ROOT / "bench" / "on_gpu.sh", call, "--rehearse", "--out", out, "--carried", out / "nothing"]
    done = subprocess.run(command, cwd=out, env=environment, check=False, capture_output=True, text=True)
    archive = out / runner.ARCHIVE
    files = runner.read(archive)
    logs = "\n".join(f"-- {name}\n{text.decode()[-3000:]}" for name, text in files.items() if name.endswith(".log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    assert list(out.iterdir()) == [archive]
    assert len(done.stdout) < 12_000
    return runner.outcomes(archive), files, done.stdout


def variants(run: bytes, tmp_path: Path) -> dict[str, set[str]]:
    """Each case's variants in one of the bench's files."""
    path = tmp_path / "run.json"
    path.write_bytes(run)
    return {case: {e.variant for e in entries} for (_, case), entries in report.load(path).groups.items()}


@pytest.mark.skipif(NO_GIT, reason="the old kernels come out of git")
def test_the_first_call_rehearsed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    outcomes, files, said = rehearse("first", out)
    assert outcomes.pop("build")["status"] == "left out"
    assert {name: o["status"] for name, o in outcomes.items()} == dict.fromkeys(
        ("probe", "compile", "correctness", "adapter", "optimizer", "kernels", "profile", "tests", "step"), "ok"
    )
    for name, text in files.items():
        if name.endswith(".json"):
            json.loads(text)
    measured = variants(files["adapter.json"], tmp_path)
    main = [names for case, names in measured.items() if "T=64" in case and "compile" not in case]
    assert len(main) == 3
    assert all({"eager autocast", "eager pure", "ours", "ours bare", "ours before", "copy"} == names for names in main)
    assert any("torch.compile" in names for names in measured.values())
    assert all("ours" in names for names in variants(files["optimizer.json"], tmp_path).values())
    whole = variants(files["step.json"], tmp_path)
    assert len(whole) == 2
    assert all({"frozen backbone", "eager adapters", "ours"} <= names for names in whole.values())
    assert json.loads(files["compile.json"])["variants"] == 1
    assert "compiled beforehand: 0 of 1 variants" in said
    assert "stand-in for ncu" in files["profile.log"].decode()
    assert "19.98" in said  # LitGPT's figures, in the same table as ours
    assert "ours before: error" in files["correctness.log"].decode()


def test_the_call_for_the_cost_of_a_7b_rehearsed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    outcomes, files, said = rehearse("cost", out)
    assert outcomes.pop("build")["status"] == "left out"
    assert {name: o["status"] for name, o in outcomes.items()} == dict.fromkeys(("probe", "compile", "cost"), "ok")
    measured = variants(files["cost.json"], tmp_path)
    assert len(measured) == 2
    names = {"frozen backbone", "ours", "ours, gated prompts", "ours, LLaMA-Adapter V2", "PEFT LoRA"}
    assert all(names <= found for found in measured.values())
    assert "LitGPT LoRA, Llama 2 7B, A100-SXM4-40GB (published)" in said


@pytest.mark.skipif(NO_GIT, reason="the old kernels come out of git")
def test_the_second_call_rehearsed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    outcomes, files, _ = rehearse("second", out)
    assert {name: o["status"] for name, o in outcomes.items()} == dict.fromkeys(
        ("probe", "compile", "sweep", "ab", "memcheck", "racecheck"), "ok"
    )
    rows = json.loads(files["sweep.json"])
    assert [(row["kernel"], row["table"]) for row in rows] == [
        (kernel, table) for kernel in ("forward_tiles", "hidden_tiles", "slice_tiles") for table in (True, False)
    ]
    assert all(row["us"] > 0 for row in rows)
    for name in ("ab.json", "ab-ADAPTERKERN_EARLY_LAUNCH=0.json"):
        (names,) = variants(files[name], tmp_path).values()
        assert names == {"ours bare", "ours bare [slice_tiles=16,32,8,1]", "ours before", "copy"}
    assert "--tool memcheck --error-exitcode 99" in files["memcheck.log"].decode()


# The sweep in the interpreter. argv: file, more arguments; without --resume, an error destroys the context.
SWEEP = """
import sys
from adapterkern.ops.kernels.tiles import Tiles
from bench import sweep
sweep.CANDIDATES["slice_tiles"] = (Tiles(48, 32, 4, 1), Tiles(16, 32, 4, 1))
sweep._alive = lambda device: "--resume" in sys.argv
small = ["-T", "16", "-d", "128", "-r", "16", "--device", "cpu", "--rounds", "1", "--kernel", "slice_tiles"]
sys.exit(sweep.main([*small, "--json", *sys.argv[1:]]))
"""


def test_a_candidate_that_raises_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}

    def sweep(*more: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-c", SWEEP, path, *more]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == (0 if more else CONTEXT_LOST), done.stderr
        return json.loads(path.read_text())

    stopped = sweep()
    assert ["us" in row for row in stopped] == [True, False]
    assert "Error" in stopped[1]["error"]  # no power of two
    whole = sweep("--resume")
    assert whole[:2] == stopped
    assert ["us" in row for row in whole] == [True, False, True]


def a_run(tmp_path: Path, seconds: float = 60.0) -> Run:
    for name in ("work", "cache"):
        (tmp_path / name).mkdir()
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    return Run(tmp_path / "work", tmp_path / "out", seconds, tmp_path, environment, lambda work: "tables")


def shell(text: str, **how: Any) -> Command:
    return Command(["sh", "-c", text, "sh"], **how)


def test_a_bad_step_loses_nothing_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.2)
    run = a_run(tmp_path)
    hanging = shell("trap '' INT; echo hung > work/hung.txt; sleep 60 & echo $! > work/pid; wait; sleep 60")
    tried = [
        Step("good", 5, lambda: [shell("echo 1 > work/good.txt")], 0),
        Step("failing", 5, lambda: [shell("exit 7"), shell("echo 2 > work/after.txt")], 0),
        Step("hanging", 1, lambda: [hanging, shell("echo 3 > work/never.txt")], 0),
        Step("toolless", 5, lambda: [shell("true")], 0, tool="no-such-tool"),
        Step("broken", 5, lambda: [shell("true")][1], 0),  # type: ignore[return-value]  # no list of commands
        Step("long", 5, lambda: [shell("true")], 500),
        Step("idle", 5, list, 0, why_not="no --ab was given"),
        Step("last", 5, lambda: [shell("echo 4 > work/last.txt; mkdir -p cache/x; touch cache/x/__grp__k.json")], 0),
    ]
    start = time.monotonic()
    for step in tried:
        run.do(step)
        assert list(runner.outcomes(run.archive))[-1] == step.name  # written after every one
    assert time.monotonic() - start < 30
    outcomes = runner.outcomes(run.archive)
    assert {name: o["status"] for name, o in outcomes.items()} == {
        "good": "ok", "failing": "failed", "hanging": "killed", "toolless": "missing", "broken": "failed",
        "long": "missing", "idle": "left out", "last": "ok",
    }  # fmt: skip
    assert outcomes["last"]["compiled"] == 1
    assert "exit 7" in outcomes["failing"]["reason"]
    assert "IndexError" in outcomes["broken"]["reason"]
    files = runner.read(run.archive)
    assert {"good.txt", "after.txt", "hung.txt", "last.txt", "summary.md"} <= set(files)
    assert "never.txt" not in files
    assert ended(int(files["pid"]))  # the children of a killed step go with it


def test_without_a_vital_step_nothing_more_is_started(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.do(Step("probe", 5, lambda: [shell("echo no GPU; exit 1")], 0, vital=True))
    run.do(Step("next", 5, lambda: [shell("touch work/next.txt")], 0))
    found = [(o.status, o.reason) for o in run.outcomes]
    assert found == [("failed", "exit 1: no GPU"), ("left out", "probe has failed")]
    assert not (tmp_path / "work" / "next.txt").exists()


def test_a_step_reports_what_pytest_counted_and_gets_its_time(tmp_path: Path) -> None:
    run = a_run(tmp_path, seconds=100)
    text = 'echo "== 3 passed, 31 skipped in 2 s =="; echo "$1" > work/seconds.txt'
    run.do(Step("tests", 200, lambda: [Command(["sh", "-c", text, "sh", "{seconds}"])], 0))
    assert run.outcomes[0].reason == "3 passed, 31 skipped in 2 s"
    assert 80 < int((tmp_path / "work" / "seconds.txt").read_text()) <= 85  # what is left of 100, less 15 to end


def test_an_archive_without_space_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(runner, "write_json", full)
        run.do(Step("good", 5, lambda: [shell("true")], 0))
    run.do(Step("next", 5, lambda: [shell("true")], 0))
    assert list(runner.outcomes(run.archive)) == ["good", "next"]


def test_a_torn_file_costs_its_own_table_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text('{"benchmarks": [')
    swept = {"kernel": "slice_tiles", "tiles": "T", "table": True, "us": 7.0}
    (tmp_path / "sweep.json").write_text(json.dumps([swept]))
    (tmp_path / "kernels.log").write_text("$ python3\n| launch | µs |\n|---|---|\n| slice | 9 |\n")
    text = summary.text(tmp_path)
    assert f"adapter.json: no table: ValueError: expected a saved run of the bench, got {tmp_path}/adapter.json" in text
    assert "7.0" in text
    assert "| slice | 9 |" in text


@pytest.mark.parametrize("missing", ["ours bare", "ours before", "copy"])
def test_a_case_without_one_of_its_variants_still_has_a_line(missing: str) -> None:
    info: dict[str, Any] = {"error": None, "budget": None}
    names = [n for n in ("ours", "ours bare", "ours before", "copy") if n != missing]
    assert report.DASH in summary._line("T=1", {n: report.Entry(n, [2e-6] * 5, info) for n in names})


def ended(process: int) -> bool:
    """Whether a process has ended within five seconds, or is a zombie."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_tables_that_fail_cost_no_archive(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.summarize = lambda work: str(1 / 0)
    run.do(Step("good", 5, lambda: [shell("true")], 0))
    assert "no tables: ZeroDivisionError" in runner.read(run.archive)["summary.md"].decode()


STOPPED = """
import os, signal, sys
from pathlib import Path
from bench.gpu import __main__ as cli, steps
from bench.gpu.runner import Command, Step

steps.first = lambda call: [
    Step("good", 9, lambda: [Command(["true"])], 0),
    Step("stopped", 9, lambda: [Command(["sh", "-c", f"kill {os.getpid()}; sleep 60"])], 0),
]
cli.main(["first", "--rehearse", "--out", sys.argv[1], "--carried", sys.argv[1]])
"""


def test_a_call_that_gets_sigterm_leaves_its_archive(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", STOPPED, tmp_path], env=environment, check=False, capture_output=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    outcomes = runner.outcomes(tmp_path / runner.ARCHIVE)
    assert {name: o["status"] for name, o in outcomes.items()} == {"good": "ok", "stopped": "killed"}


def test_a_step_with_the_status_to_go_on_is_run_again_with_resume(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    text = 'echo "$*" >> work/calls.txt; [ "$1" = --resume ] || exit 3'
    run.do(Step("sweep", 5, lambda: [shell(text, again_on=3)], 0))
    assert run.outcomes[-1].status == "ok"
    assert (tmp_path / "work" / "calls.txt").read_text() == "\n--resume\n"


def test_an_earlier_archive_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / runner.ARCHIVE).write_bytes(b"the first call's")
    a_run(tmp_path).do(Step("good", 5, lambda: [shell("true")], 0))
    assert sorted(p.read_bytes() == b"the first call's" for p in out.iterdir()) == [False, True]


@pytest.mark.parametrize(
    "pair",
    [
        "slice_tile=64,128,8,3",
        "slice_tiles=64,128",
        "slice_tiles=a,b,c,d",
        "NAME",
        "FOO=1",
        "ADAPTERKERN_EARLY_LUNCH=0",
    ],
)
def test_an_ab_that_nothing_reads_is_refused(pair: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got"):
        steps.Call(tmp_path, tmp_path, rehearse=True, ab=[pair])
    steps.Call(tmp_path, tmp_path, rehearse=True, ab=["ADAPTERKERN_EARLY_LAUNCH=0", "slice_tiles=64,64,8,2"])


def test_every_planned_variant_is_known() -> None:
    """Also what a rehearsal leaves out: on a GPU an unknown name would cost the whole step."""
    cuda = torch.device("cuda", 0)
    tiles = ["slice_tiles=64,128,8,3"]
    kernels = [*measured.plan("adapter", cuda, False, ()), *measured.plan("ab", cuda, False, tiles)]
    assert len(kernels) == 3 + 3 + 2 * len(adapter.ROWS) + 4
    _, weights = adapter.make_inputs(4, 16, 2, torch.bfloat16, torch.device("cpu"))
    for _, names in kernels:
        assert list(adapter._ways(names, weights, torch.bfloat16, None)) == list(names)
    ((case, ways),) = measured.plan("optimizer", cuda, False, ())
    assert set(ways) <= set(optimizer.names(case, cuda))
    whole = measured.plan("step", cuda, False, ())
    assert [(c.shape["batch"], c.shape["length"]) for c, _ in whole] == [(4, 1024), (1, 1304)]
    assert all(set(ways) <= set(training_step.names(case, cuda)) for case, ways in whole)
    assert set(cost.names(whole[0][0], cuda)) == set(cost._STEPS)
