"""What commands do about the machine: the dtype, the C library's memory, the cores."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapterkern import cli, extension
from adapterkern.cli import cores, doctor, dtype, main, memory
from adapterkern.model import fast_dtype
from adapterkern.ops import native
from adapterkern.ops.choice import CLUSTERS
from adapterkern.training.saved import Sources, load_sources, save_sources
from tests.support import tiny_run
from tests.support.commands import write_texts


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How many times as fast as fp32 this machine multiplies bf16."""
    found = [2.0]
    monkeypatch.setattr(fast_dtype, "_speed", lambda low, threads: found[0])
    return found


def test_what_auto_stands_for(
    speed: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dtype.chosen_dtype("fp16") == "fp16"
    assert capsys.readouterr().out == ""  # what was asked for needs no line
    assert dtype.chosen_dtype(None) == dtype.chosen_dtype("auto") == "bf16"
    assert capsys.readouterr().out == 2 * "backbone in bf16: this CPU multiplies it 2.0 times as fast as fp32\n"
    assert dtype.chosen_dtype(None, "fp16") == "fp32"
    assert "--precision fp16" in capsys.readouterr().out
    save_sources(tmp_path, {"tasks/a": Sources("m", dtype="fp32"), "tasks/b": Sources("m", dtype="fp32")})
    assert dtype.chosen_dtype(None, resumed=tmp_path) == "fp32"
    assert "as in the run that is resumed" in capsys.readouterr().out
    assert dtype.chosen_dtype("bf16", resumed=tmp_path) == "bf16"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dtype.chosen_dtype(None) == "fp32"
    monkeypatch.delenv("WORLD_SIZE")
    speed[0] = 1.0
    assert dtype.chosen_dtype(None) == "fp32"


def test_a_run_remembers_its_dtype_and_resumes_in_it_on_another_machine(
    speed: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny_run.model().unload().save_pretrained(tmp_path / "llama")
    tiny_run.tokenizer().save_pretrained(tmp_path / "llama")
    texts = write_texts(tmp_path / "texts.jsonl", 12, 0)
    command = f"train --model {tmp_path}/llama --train {texts} --eval {texts} --output {tmp_path}/run --layers 3"
    command += " --adapter-dim 4 --batch-size 4 --max-length 16 --no-progress --no-plot"
    assert main([*command.split(), "--max-steps", "2", "--checkpoint-every", "1"]) == 0
    assert load_sources(tmp_path / "run").dtype == "bf16"
    speed[0] = 0.02
    capsys.readouterr()
    assert main([*command.split(), "--max-steps", "2", "--checkpoint-every", "1", "--resume"]) == 0
    assert "backbone in bf16: as in the run that is resumed" in capsys.readouterr().out
    assert "--dtype bf16: slow here, since this CPU multiplies it 0.02 times as fast as fp32" in caplog.messages
    assert "prefix cache: " in caplog.text  # without a bar the log has it
    assert main(["eval", f"{tmp_path}/run"]) == 0


# How many pages a process touches for the first time while it makes the same 64 MB tensor again.
FAULTS = """
import resource, sys, torch
from adapterkern.cli.memory import keep_pages
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    print(keep_pages(), end=" ")
for _ in range(4):
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(16 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_keep_their_pages() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in memory._OWN}

    def run(how: str, **more: str) -> str:
        argv = [sys.executable, "-c", FAULTS, how]
        return subprocess.run(argv, env=environment | more, text=True, capture_output=True, check=True).stdout

    kept, megabytes = run("keep").split()
    assert kept == "True"
    assert int(megabytes) < 8
    assert run("keep", MALLOC_MMAP_THRESHOLD_="1000000").split()[0] == "False"  # the user's own setting stays
    assert int(run("leave")) >= int(megabytes)


def test_a_command_keeps_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("adapterkern.cli.keep_pages", lambda: called.append(1))
    assert main(["doctor"]) == 0
    assert called


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory._OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_pages() is False


def test_a_container_s_quota_counts(tmp_path: Path) -> None:
    of_affinity = len(os.sched_getaffinity(0))
    assert cores.usable_cores(tmp_path) == of_affinity
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores.usable_cores(tmp_path) == of_affinity
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cores.usable_cores(tmp_path) == 0.5


def test_doctor_names_too_many_threads_and_busy_cores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cores.advice(2, 2.0, 2.5) == []
    (line,) = cores.advice(8, 1.0, 0.1)
    assert line == (
        "torch uses 8 threads, but this process may use 1 core, on which they wait for each other: "
        "set OMP_NUM_THREADS=1"
    )
    (line,) = cores.advice(8, 1.5, 0.1)
    assert "1.5 cores" in line
    assert line.endswith("OMP_NUM_THREADS=2")
    (line,) = cores.advice(2, 2.0, 3.1)
    assert "load 3.1 on 2" in line
    monkeypatch.setattr(cores, "usable_cores", lambda: 0.5)
    monkeypatch.setattr(os, "getloadavg", lambda: (40.0, 0.0, 0.0))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "load 40.0 on 0.5" in printed
    assert ("set OMP_NUM_THREADS=1" in printed) == (torch.get_num_threads() > 1)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="has one core, to which OpenMP binds all threads anyway")
def test_openmp_binds_each_thread_to_a_core_of_its_own() -> None:
    code = "import torch; from adapterkern.cli import cores; print(cores.usable_cores(), torch.get_num_threads())"
    environment = os.environ | {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    assert float(done.stdout.split()[0]) >= int(done.stdout.split()[1]) == 2


def test_commands_that_compute_warn_of_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 0.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (40.0, 0.0, 0.0))
    assert main(["train", "--model", "m", "--train", "t", "--output", "o"]) == 1
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        (
            "WARNING",
            "torch uses 2 threads, but this process may use 0.5 cores, on which they wait for each other: "
            "set OMP_NUM_THREADS=1",
        )
    ]
    caplog.clear()
    assert main(["budget", "--model-config", "llama-7b", "--max-params", "8e6"]) == 0
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ADAPTERKERN_CPU_ISA", "foo", "expected one of .*none.*, got 'foo'"),
        ("ADAPTERKERN_FUSED", "no", "expected 0 or 1, got 'no'"),
        ("ADAPTERKERN_EARLY_LAUNCH", "maybe", "expected 0 or 1, got 'maybe'"),
    ],
)
@pytest.mark.parametrize("command", ["train --model m --train t --output o", "eval run", "qa evaluate run",
                                     "demo", "ablate", "doctor"])  # fmt: skip
def test_the_environment_is_checked_before_anything_else(
    command: str, name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(cli, "keep_pages", lambda: pytest.fail("goes on"))
    monkeypatch.setattr(native, "instruction_set", native.instruction_set.__wrapped__)
    monkeypatch.setenv(name, value)
    assert main(command.split()) == 1
    prog = "qa evaluate" if command.startswith("qa") else command.split()[0]
    assert re.fullmatch(f"adapterkern {prog}: {name}: {message}\n", capsys.readouterr().err)


def test_what_doctor_says_of_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "cpuinfo", lambda field: "A Fast CPU" if field == "model name" else "")
    monkeypatch.setattr(cores, "usable_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(doctor, "_compiler", lambda: None)
    for name in [name for name in os.environ if name.startswith(doctor._VARIABLES)]:
        monkeypatch.delenv(name)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "  cpu           A Fast CPU, 1 thread on 1 core, " in out
    assert "  C++ compiler  none found (for --compile)\n" in out
    assert "environment\n  nothing set\n" in out
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["doctor"]) == 0
    assert "environment\n  OMP_NUM_THREADS=1\n  OMP_PROC_BIND=close\nwhat to do" in capsys.readouterr().out


def test_doctor_names_variables_that_nothing_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADAPTERKERN_KERNEL", "cluster")
    assert main(["doctor"]) == 0
    advice = capsys.readouterr().out.partition("what to do\n")[2]
    assert advice.startswith("  ADAPTERKERN_KERNEL is set and nothing reads it: expected one of ADAPTERKERN_API_KEY, ")


def test_the_variables_that_doctor_knows_are_those_that_are_read() -> None:
    root = Path(__file__).parents[2]
    sources = [root / "setup.py", *(root / "adapterkern").rglob("*.py")]
    sources.remove(root / "adapterkern" / "cli" / "doctor.py")
    read = {name for path in sources for name in re.findall(r'"(ADAPTERKERN_[A-Z_]*[A-Z])"', path.read_text())}
    assert read == doctor._OURS


TRITON = "Triton kernels: it is a GPU; no kernels by clusters: "


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU its own line says it")
@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (None, f"{TRITON}no card has shown it right and faster (ADAPTERKERN_KERNELS=cluster tries it)"),
        ("triton", f"{TRITON}ADAPTERKERN_KERNELS=triton is set"),
        ("cluster", f"{CLUSTERS}: ADAPTERKERN_KERNELS=cluster is set; a card shows whether it has room for them"),
    ],
)
def test_doctor_names_the_generation_of_gpu_kernels_without_a_gpu(
    asked: str | None, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ADAPTERKERN_KERNELS", raising=False)
    if asked is not None:
        monkeypatch.setenv("ADAPTERKERN_KERNELS", asked)
    monkeypatch.setattr(extension, "load", lambda: (SimpleNamespace(cluster_columns=lambda *_: 512), ""))
    assert main(["doctor"]) == 0
    assert f"  on a GPU      {why}\n" in capsys.readouterr().out


def test_doctor_asks_torch_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "my-g++")
    assert doctor._compiler() == "my-g++"

    def none() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert doctor._compiler() is None


def test_doctor_says_how_to_mend_a_missing_extension(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "MISSING", "the extension adapterkern._C cannot be imported (no such file)")
    monkeypatch.setattr(native, "instruction_set", native.instruction_set.__wrapped__)
    monkeypatch.delenv("ADAPTERKERN_CPU_ISA", raising=False)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "the extension adapterkern._C cannot be imported (no such file)" in out
    assert "left out" not in out
    advice = out.partition("what to do\n")[2].splitlines()
    assert advice[0].startswith("  for the CPU kernels and ClippedAdamW's: install adapterkern again, from its source ")
    assert "with a C++ compiler" in advice[0]
