"""What the bench's command line refuses, one row each; and what its pages say beside the figures."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkern.cli import memory
from bench import cli, engine, processes, report
from tests.bench.test_bench import make_run

CORES = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process stays as it is, the machine has no GPU, and nothing is measured."""
    for name in ("BENCH_CORES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KINETO_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "keep_pages", lambda: False)
    monkeypatch.setattr(engine, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(engine.Engine, "run", lambda self: pytest.fail("measures"))
    monkeypatch.chdir(tmp_path)
    make_run(Path("good.json"), 1e-4)
    Path("other.json").write_text("[]")
    Path("half.json").write_text(json.dumps({name: {} for name in report._FIELDS}))
    Path("text.json").write_text("no JSON")
    Path("bytes.json").write_bytes(b"\xff")


SAVED = "expected a saved run of the bench, got"
NO_ROOM = "expected a GPU with room for a LLaMA-7B, or --quick for a rehearsal, got cpu"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("report nope.json", f"python -m bench report: run: {SAVED} nope.json: No such file or directory"),
        ("report .", f"python -m bench report: run: {SAVED} .: Is a directory"),
        ("report text.json", f"python -m bench report: run: {SAVED} text.json: no JSON"),
        ("report bytes.json", f"python -m bench report: run: {SAVED} bytes.json: no JSON"),
        ("report other.json", f"python -m bench report: run: {SAVED} other.json: no commit_info"),
        ("report half.json", f"python -m bench report: run: {SAVED} half.json: no device"),
        ("report good.json nope.json", f"python -m bench report: other: {SAVED} nope.json: No such file or directory"),
        (
            "report good.json --baseline foo",
            "python -m bench report: --baseline: expected one of copy, eager, ours, got 'foo'",
        ),
        (
            "report good.json good.json --baseline ours",
            "python -m bench report: --baseline: has no effect beside a second run: expected none, got 'ours'",
        ),
        ("results now", "python -m bench results: unrecognized arguments: now"),
        ("--device cuda", "python -m bench: --device: expected cpu, since torch finds no CUDA device; got cuda"),
        ("--device tpu", "python -m bench: --device: expected cpu, since torch finds no CUDA device; got tpu"),
        (
            "optimizer --device cpu --quick --only nothing",
            "python -m bench: --only: expected a part of a case's name, such as T=2048 or float32, got 'nothing'",
        ),
        (
            "adapter --device cpu --quick --baseline foo",
            "python -m bench: --baseline: expected one of copy, eager autocast, eager pure, ours, ours x-free, "
            "torch.compile, got 'foo'",
        ),
        (
            "adapter --device cpu --json text.json --append",
            f"python -m bench: --append: {SAVED} text.json: no JSON",
        ),
        (
            f"--threads {CORES + 1}",
            f"python -m bench: --threads: expected 1 to {CORES}, the cores that this process may use, got {CORES + 1}",
        ),
        (
            "--threads 0",
            f"python -m bench: --threads: expected 1 to {CORES}, the cores that this process may use, got 0",
        ),
        ("--processes 2", "python -m bench: --processes: expected --json FILE with it, got none"),
        ("cost", f"python -m bench: cost: {NO_ROOM}"),
        ("cost --only 1304", f"python -m bench: cost: {NO_ROOM}"),
        (
            "step,adapter",
            "python -m bench: expected parts of adapter, optimizer, step, cost, memory, traffic, aot, got step,adapter",
        ),
    ],
)
def test_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"{message}\n"


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli._Parser("")
    assert cli._device(None, parser) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cli._device(None, parser) == cli._device("cuda", parser) == torch.device("cuda:1")
    assert cli._device("cuda:0", parser) == torch.device("cuda:0")
    with pytest.raises(SystemExit):
        cli._device("cuda:2", parser)
    assert "--device: expected cpu or cuda:0 or cuda:1; got cuda:2" in capsys.readouterr().err


def test_a_variant_of_any_case_is_a_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.Engine, "run", lambda self: 0)
    monkeypatch.setattr(cli, "_show", lambda path, baseline: pytest.fail("there is no file"))
    assert cli.main(["adapter", "--device", "cpu", "--quick", "--baseline", "copy", "--json", "new.json"]) == 1
    assert not Path("new.json").exists()


def test_the_page_s_path_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "PAGE", Path("page.md").absolute())
    assert cli.main(["results"]) == 0
    assert capsys.readouterr().out == f"{Path('page.md').absolute()}\n"
    assert Path("page.md").read_text(encoding="utf-8").startswith(f"# Results\n\n{report.HEAD}\n")


@pytest.mark.parametrize(
    ("about", "flag"),
    [
        ({}, ""),
        ({"busy_cores": 0.4}, ""),
        ({"busy_cores": 1.84}, "; **the machine was busy: others used 1.8 cores**"),
        ({"load_before": 0.4}, ""),
        ({"load_before": 1.84}, "; **the machine was busy: load 1.8**"),
    ],
)
def test_what_a_title_says_of_a_busy_machine(about: dict[str, float], flag: str) -> None:
    run = report.load(Path("good.json"))
    run.machine.update(about)
    assert run.title == f"a CPU, 2 threads; torch 2; commit 0123456, 2026-01-02{flag}"
    run.machine["threads"] = 1
    assert run.title == f"a CPU, 1 thread; torch 2; commit 0123456, 2026-01-02{flag}"


@pytest.mark.parametrize(("launches", "shown"), [(None, False), (0, True), (7, True)])
def test_a_column_that_no_row_fills_is_left_out(launches: int | None, shown: bool) -> None:
    entries = report.load(Path("good.json")).groups["adapter", "both, T=8"]
    entries[1].info["launches"] = launches
    head, _, *rows = report.kernel_table(entries, None).splitlines()
    columns: list[Any] = [cell.strip() for cell in head.strip("|").split("|")]
    assert ("launches" in columns) == shown
    assert columns[-1] == "error ≤ budget"
    if shown:
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        assert [row[columns.index("launches")] for row in cells] == [report.DASH, str(launches), report.DASH]


def test_the_page_explains_its_columns() -> None:
    for name in ("GB/s of floor", "% of copy", "Launches", "Kept, units of x", "ours x-free", "ours bare"):
        assert f"*{name}*" in report.HEAD.replace("\n", " ")


@pytest.mark.parametrize(("status", "processes_run"), [(2, 1), (1, 3)])
def test_what_one_process_refuses_is_not_asked_of_the_others(
    status: int, processes_run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    done: subprocess.CompletedProcess[str] = subprocess.CompletedProcess([], status)
    monkeypatch.setattr(processes.subprocess, "run", lambda *given, **_: asked.append(given) or done)
    assert processes.measured(["--baseline", "foo"], 3) == (status, None)
    assert len(asked) == processes_run
