"""The CPU kernels in another build: with address and undefined-behavior sanitizers, and with AMX's tiles emulated."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

from adapterkern.ops import native

ROOT = Path(__file__).parents[2]
HERE = native._C.instruction_sets() if native._C is not None else []
CXX = shutil.which((os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0])
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
# The adapter's half of the extension. pybind11's templates take longer than all kernels, and are not what is tested.
MODULE = """
#include "adapter_bindings.cpp"
PYBIND11_MODULE(_C, m) { bind_adapter(m), m.attr("VERSION") = 7; }
"""


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernels of all instruction sets that the installed build has, with sanitizers."""
    with monkeypatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        setup = runpy.run_path(str(ROOT / "setup.py"))
    sets = {name: flags for name, flags in setup["INSTRUCTION_SETS"].items() if name not in left_out()}
    (tmp_path / "module.cpp").write_text(MODULE)
    common = f"-std=c++17 -fPIC -fvisibility=hidden -g1 -I{ROOT / 'csrc'} -I{sysconfig.get_path('include')}"
    kernels = f"-O1 {SANITIZERS} -DAK_EMULATE_TILES {' '.join(f'-DAK_WITH_{name.upper()}' for name in sets)}"
    jobs = [(ROOT / "csrc" / "adapter_cpu.cpp", kernels), (tmp_path / "module.cpp", f"-O0 -I{pybind11.get_include()}")]
    for name, flags in sets.items():
        jobs.append((ROOT / "csrc" / f"adapter_cpu_{name}.cpp", f"{kernels} {setup['KERNEL_FLAGS']} {flags}"))

    def compiled(job: tuple[Path, str]) -> Path:
        source, flags = job
        made = tmp_path / f"{source.stem}.o"
        subprocess.run([str(CXX), *common.split(), *flags.split(), "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, jobs))
    module = tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([str(CXX), "-shared", "-pthread", *SANITIZERS.split(), *objects, "-o", module], check=True)
    return module


def left_out() -> list[str]:
    return [name.replace("_", "") for name in native.left_out()[0]]


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="neither this machine nor this build has an instruction set with kernels")
@pytest.mark.skipif(CXX is None, reason="there is no compiler here")
def test_sanitizers_find_nothing(extension: Path) -> None:
    def library(name: str) -> str:
        asked = [str(CXX), f"-print-file-name={name}"]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()

    environment = os.environ | {"OTHER_EXTENSION": str(extension), "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {"LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}", "PYTHONPATH": str(ROOT)}
    # -s: a sanitizer reports when the process ends at once, and what pytest has captured is lost.
    plugin = ["-p", "tests.support.other_extension", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-n", "0", *plugin, "tests/ops/sanitized_native.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if HERE[-1] in ("avx512_bf16", "amx") and not left_out():  # what the emulated tiles need
        assert "no amx" not in done.stdout
