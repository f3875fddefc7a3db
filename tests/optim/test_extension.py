"""The CUDA source itself, compiled for the host and run: what can be tested of the kernels without a GPU.

tests/optim/host_cuda/cuda_runtime.h runs a fiber per CUDA thread, in random order. Indexing, chunks, barriers and the
order of summation are those of the GPU, and so is what an early launch may read; speed, registers and the memory model
are not tested here.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from adapterkern.optim import backend
from tests.support.optim_oracle import hostile_gradients

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which("g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CXX is None, reason="needs g++"),
    pytest.mark.skipif(backend("cpu")[0] != "cpu twin", reason=f"the extension is missing: {backend('cpu')[1]}"),
]

# Prints a digest of a run's parameters, gradients and state for every kind of parameter.
# argv: the emulated module, or "twin".
RUN = """
import hashlib, importlib.util, itertools, sys, types
import torch
if sys.argv[1] != "twin":
    spec = importlib.util.spec_from_file_location("adapterkern._C", sys.argv[1])
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    on_device_0 = vars(kernels) | {"Where": lambda *_: kernels.Where(0, 1, 0, True)}
    sys.modules["adapterkern._C"] = types.SimpleNamespace(**on_device_0)
from tests.support.optim_oracle import TILE, hostile_gradients, parameters, set_grads
from adapterkern.optim import ClippedAdamW, backend
assert backend("cpu")[0] == "cpu twin"

def digest(params, optimizer):
    kept = [t for p in params for t in (p.detach(), p.grad, *optimizer.state[p].values())]
    kept += [optimizer.grad_norm, optimizer.skipped, optimizer._plan.buckets[0].passes.squared_norm]
    flat = [t.contiguous().view(-1).view(torch.uint8) for t in kept]
    return hashlib.sha256(torch.cat(flat).numpy().tobytes()).hexdigest()

sizes = [0, 1, 3, TILE - 1, TILE, TILE + 1, 1023, 1025, 20_000]
low = [(torch.bfloat16, "master"), (torch.float16, "master"), (torch.bfloat16, "stochastic")]
for (dtype, how), misaligned in itertools.product([(torch.float32, "master"), *low], [False, True]):
    params = parameters(sizes, dtype, misaligned)
    optimizer = ClippedAdamW(params, lr=1e-2, low_precision=how, seed=5, clear_grads=misaligned)
    for step in range(3):
        grads = set_grads(params, step)
        if step == 1:
            grads[-1][TILE] = float("inf")
        optimizer.step()
    print(dtype, how, misaligned, digest(params, optimizer))
for name, grad in hostile_gradients().items():
    params = parameters([grad.numel()])
    optimizer = ClippedAdamW(params)
    params[0].grad = grad
    optimizer.step()
    print(name, digest(params, optimizer))
for count, size in [(900, 1), (100, 4), (101, 101), (30, 1)]:  # tensors, and how many per group
    params = parameters([i % 7 for i in range(count)])
    rates = [1e-3 * (1 + i // 3) for i in range(0, count, size)]
    optimizer = ClippedAdamW([{"params": params[i * size : (i + 1) * size], "lr": lr} for i, lr in enumerate(rates)])
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    print(count, "tensors in groups of", size, digest(params, optimizer))
"""


# The adapter's half is not what is tested, and its templates of pybind11 take half of the build.
WITHOUT_ADAPTER = """
#include "bindings.cpp"
void bind_adapter(py::module_&) {}
void bind_clusters(py::module_&) {}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The optimizer's half of the extension, with its CUDA source compiled for the host."""
    folder = tmp_path_factory.mktemp("emulated")
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    (folder / "module.cpp").write_text(WITHOUT_ADAPTER)
    flags = "-std=c++20 -fno-math-errno -ffp-contract=off -fPIC -fvisibility=hidden -pthread -DADAPTERKERN_WITH_CUDA"
    places = [ROOT / name for name in ("csrc", "tests/optim/host_cuda", "tests/support")]
    places += [Path(sysconfig.get_path("include")), Path(pybind11.get_include())]
    command = [str(CXX), *flags.split(), *(f"-I{place}" for place in places)]
    sources = {
        folder / "module.cpp": "-O0",  # no kernel is in it
        ROOT / "csrc" / "clipped_adamw_cpu.cpp": "-O1",
        ROOT / "csrc" / "clipped_adamw_cuda.cu": "-O1",
    }
    for source, level in sources.items():
        subprocess.run([*command, level, "-x", "c++", "-c", source, "-o", folder / f"{source.stem}.o"], check=True)
    objects = [folder / f"{source.stem}.o" for source in sources]
    subprocess.run([*command, "-shared", *objects, "-o", module], check=True)
    return module


def test_the_cuda_kernels_and_the_twin_agree_to_the_bit(emulated: Path) -> None:
    def run(module: Path | str) -> list[str]:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{RUN}"
        done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    on_kernels, on_twin = run(emulated), run("twin")
    assert len(on_twin) == 12 + len(hostile_gradients())
    assert on_kernels == on_twin


SQUARES = """
#include <cstdio>
#include "clipped_adamw.h"
using namespace adapterkern;
int main() {
  for (uint32_t i = 0; i < 1u << 22; ++i) {
    const float x = bits_float(mix(i) & 0x7fffffff);
    const TwoTerms with = square<true>(x), without = square<false>(x);
    if (memcmp(&with, &without, sizeof with) && x <= 0x1.fffffep127f) return printf("%a", x), 1;
  }
}
"""


def test_squares_are_the_same_with_and_without_fma(tmp_path: Path) -> None:
    """The twin takes one way or the other, by the CPU's instruction set."""
    (tmp_path / "squares.cpp").write_text(SQUARES)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(CXX), *flags, tmp_path / "squares.cpp", "-o", tmp_path / "squares"], check=True)
    ran = subprocess.run([tmp_path / "squares"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"differs at {ran.stdout}"
