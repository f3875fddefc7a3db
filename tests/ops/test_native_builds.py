"""The CPU kernels in another build: with address and undefined-behavior sanitizers, and with AMX's tiles emulated."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from adapterkern.ops import native

ROOT = Path(__file__).parents[2]
HERE = native._C.instruction_sets() if native._C is not None else []
FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -DAK_EMULATE_TILES"
CXX = shutil.which((os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not HERE, reason="neither this machine nor this build has an instruction set with kernels")
@pytest.mark.skipif(CXX is None, reason="there is no compiler here")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    assert CXX is not None
    environment = os.environ | {"ADAPTERKERN_CXXFLAGS": FLAGS, "CUDA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    build = ["build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    made = [sys.executable, "setup.py", *build]
    subprocess.run(made, cwd=ROOT, env=environment, check=True, capture_output=True)
    (extension,) = (tmp_path / "lib").rglob("_C*.so")
    libraries = (
        subprocess.run([CXX, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    environment |= {"OTHER_EXTENSION": str(extension), "ASAN_OPTIONS": "detect_leaks=0"}
    plugin = ["-p", "tests.support.other_extension", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", *plugin, "tests/ops/test_native.py"],
        cwd=ROOT,
        env=environment | {"LD_PRELOAD": " ".join(libraries)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if HERE[-1] in ("avx512_bf16", "amx"):  # what the emulated tiles need
        assert "no amx" not in done.stdout
