"""The extension's build: with and without a CUDA toolkit, incremental, free of torch, and of spilled registers."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
pytestmark = [pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree"), pytest.mark.slow]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    shutil.copy(ROOT / "setup.py", copy)
    (copy / "adapterkern").mkdir()
    (copy / "adapterkern" / "__init__.py").touch()
    return copy


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script that runs the compiler. Tests replace it; in the same place, so that a build need not begin anew."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    write(script)
    return script


def write(script: Path, first: str = "") -> None:
    script.write_text(f'#!/bin/sh\n{first}exec {shutil.which("c++")} "$@"\n')
    script.chmod(0o755)


def build(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=os.environ | env, capture_output=True, text=True, check=False)


def test_without_a_toolkit_the_cpu_twin_is_built_with_a_loud_warning_and_once(tree: Path, compiler: Path) -> None:
    # -O0 would leave the templates of the standard library among the symbols
    quick = {"CUDA_HOME": "/nonexistent", "CXX": str(compiler), "ADAPTERKERN_CXXFLAGS": "-O1"}
    first = build(tree, **quick)
    assert first.returncode == 0, first.stderr
    assert "built WITHOUT CUDA kernels" in first.stdout + first.stderr
    code = (
        "import adapterkern._C as c, sys; print(c.WITH_CUDA, c.cuda_unavailable(0)); assert 'torch' not in sys.modules"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True)
    assert loaded.stdout.startswith("False the extension was built without CUDA kernels")
    assert "no work to do" in build(tree, **quick).stdout
    (tree / "csrc" / "threads.h").touch()
    again = build(tree, **quick).stdout
    assert "clipped_adamw_cpu.cpp" in again  # headers count

    (library,) = (tree / "adapterkern").glob("_C.*.so")
    if nm := shutil.which("nm"):
        symbols = subprocess.run(
            [nm, "-D", "--defined-only", library], capture_output=True, text=True, check=True
        ).stdout
        ours = {line.split()[-1] for line in symbols.splitlines() if "adapterkern" in line or "PyInit" in line}
        assert ours == {"PyInit__C"}


def test_a_demanded_toolkit_that_is_missing_is_an_error(tree: Path) -> None:
    failed = build(tree, CUDA_HOME="/nonexistent", ADAPTERKERN_REQUIRE_CUDA="1")
    assert failed.returncode != 0
    assert "ADAPTERKERN_REQUIRE_CUDA=1, and the CUDA build failed: nvcc was found neither" in failed.stderr


def test_a_missing_compiler_is_named(tree: Path) -> None:
    failed = build(tree, PATH="/nonexistent", CXX="no-such-compiler")
    assert failed.returncode != 0
    assert "found no C++ compiler" in failed.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="has no instruction sets to leave out")
def test_instruction_sets_that_the_compiler_does_not_know_are_left_out(tree: Path, compiler: Path) -> None:
    write(compiler, 'case "$*" in *-mavx512bf16*) echo "unknown option" >&2; exit 1;; esac\n')
    # with the flags of the first test, whose objects it links again
    built = build(tree, CUDA_HOME="/nonexistent", CXX=str(compiler), ADAPTERKERN_CXXFLAGS="-O1")
    assert built.returncode == 0, built.stderr
    for name in ("avx512bf16", "amx"):
        assert f"no adapter kernels for {name}: {compiler} does not compile them (unknown option)" in built.stderr
    code = "import adapterkern._C as c; print(c.left_out(), {'avx512_bf16', 'amx'} & {*c.instruction_sets()})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True)
    assert loaded.stdout == "['avx512_bf16', 'amx'] set()\n"


def test_no_source_includes_torch() -> None:
    for source in (ROOT / "csrc").iterdir():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source


def compiled(source: str, arch: str, folder: Path, *flags: str) -> str:
    """What ptxas says of a source's kernels."""
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout  # type: ignore[list-item]  # skipped without nvcc
    if f"compute_{arch.removesuffix('a')}\n" not in listed:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    command: list[str | Path | None] = [
        NVCC,
        "-std=c++17",
        "-O3",
        *flags,
        f"-arch=sm_{arch}",
        "-Xptxas",
        "-v",
        "-cubin",
    ]
    command += ["-o", folder / "kernels.cubin", ROOT / "csrc" / source]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert set(stacks) == {("0", "0", "0")}
    return report


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["80", "90", "100", "120"])
def test_the_optimizer_s_kernels_compile_without_spills(arch: str, tmp_path: Path) -> None:
    report = compiled("clipped_adamw_cuda.cu", arch, tmp_path, "-fmad=false")
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == 5  # both passes, with room for few tensors and for many, and finish
    assert max(registers) <= 80  # three blocks of 256 threads on an SM


CUOBJDUMP = "backends/nvidia/bin/cuobjdump"  # of Triton's package


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["90a", "100a"])
def test_the_kernels_by_clusters_compile_without_spills(arch: str, tmp_path: Path) -> None:
    report = compiled("adapter_cluster.cu", arch, tmp_path)
    assert "setmaxnreg" not in report  # which ptxas names where it ignores it
    # Of a thread in 384, or of the backward in 512; then setmaxnreg moves them between the warp groups.
    registers = re.findall(r"(forward|backward)_kernelINS0_\d+\w+ConfigILi\d+.*\n.*\n.*Used (\d+) registers", report)
    assert sorted(registers) == [("backward", "128")] * 3 + [("forward", "168")] * 4
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("the rest is read by Triton's cuobjdump")
    tool = Path(triton.origin).parent / CUOBJDUMP
    code = subprocess.run(
        [tool, "-sass", tmp_path / "kernels.cubin"], capture_output=True, text=True, check=True
    ).stdout
    kernels = {}
    for text in code.split("Function : ")[1:]:
        name, R = re.search(r"(For|Back)wardConfigILi(\d+)", text).groups()
        kernels[name, int(R)] = text
    products = {key: len(re.findall(r"\bHMMA\.16816", text)) for key, text in kernels.items()}
    # R=64, 512 columns: two passes of 32 steps, each 2·2 products and, for the moments, 2·3 of which a warp takes half
    # or none; and 8·2·4 of the output. At R=128 half of the rows in each of two turns.
    forward = {("For", 16): 272, ("For", 32): 544, ("For", 64): 704, ("For", 128): 288}
    # R=64, 256 columns: 16 steps of 2·2 products; then of 16 rows and 32 columns 16 each of G, U and dx.
    assert products == forward | {("Back", 16): 28, ("Back", 32): 56, ("Back", 64): 112}
    for text in kernels.values():
        assert not re.search(r"\b(STL|LDL)\b", text)
        assert text.count("UBLKCP") >= 4  # rows in and out, partial products, row sums
