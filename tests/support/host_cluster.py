"""The kernels by clusters (csrc/adapter_cluster_*.h), compiled for the host: see tests/ops/host_cluster."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import torch

from adapterkern.ops.kernels.weights import Prepared, padded_adapter_dim, padded_hidden_size
from adapterkern.ops.reference import Weights

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests" / "ops" / "host_cluster"
FORWARD, BACKWARD = (ROOT / "csrc" / f"adapter_cluster_{name}.h" for name in ("forward", "backward"))


def build(folder: Path, compiler: str = "g++") -> ModuleType:
    target = folder / f"host_cluster{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = "-std=c++20 -O1 -ffp-contract=off -shared -fPIC -fvisibility=hidden -Wall -Werror -Wno-unknown-pragmas"
    places = ROOT / "csrc", HOST, ROOT / "tests/support", sysconfig.get_path("include"), pybind11.get_include()
    command = [compiler, *flags.split(), "-DADAPTERKERN_WITH_CLUSTERS", *(f"-I{place}" for place in places)]
    subprocess.run([*command, HOST / "module.cpp", ROOT / "csrc" / "cluster_bindings.cpp", "-o", target], check=True)
    spec = importlib.util.spec_from_file_location("host_cluster", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(weights: Weights) -> Prepared:
    """What kernels/weights.py makes of parameters (n, …), in bf16."""
    gamma, beta, down, down_bias, up, up_bias = (w.float() for w in weights)
    n, r, d = down.shape
    R, D = padded_adapter_dim(r), padded_hidden_size(d)
    a, w_up = torch.zeros(n, R, D, dtype=torch.bfloat16), torch.zeros(n, D, R, dtype=torch.bfloat16)
    c, b_up = torch.zeros(n, R), torch.zeros(n, D)
    a[:, :r, :d] = (down * gamma[:, None]).bfloat16()
    c[:, :r] = (down * beta[:, None]).sum(2) + down_bias
    w_up[:, :d, :r] = up.bfloat16()
    b_up[:, :d] = up_bias
    return Prepared(a, a.float().sum(2), c, w_up, b_up)
