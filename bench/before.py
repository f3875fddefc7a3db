"""The kernels of an earlier commit, to compare the current ones with.

The package holds one generation. The other is the folder ``kernels`` taken from git. It needs nothing of the package
around it (relative imports, only torch and triton) and is imported under another name. Both generations run through the
same small autograd function, so that they have the same host path.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
COMMIT = "193c92f"  # the last one before the kernels' loads were pipelined
CARRIED = ROOT / ".gpu"  # what `sh bench/on_gpu.sh prepare` fills
VARIABLE = "BENCH_BEFORE"  # the folder that holds `kernels`, if it is not CARRIED / "old"
PACKAGE = "kernels_before"


def extract(commit: str, folder: Path) -> str:
    """Put the kernels of ``commit`` into ``folder``/kernels; returns the commit's full hash."""
    listed = _git("ls-tree", "-r", "--name-only", commit).decode().splitlines()
    found = [Path(path).parent for path in listed if path.endswith("kernels/launch.py")]
    if len(found) != 1:
        raise ValueError(f"commit {commit}: expected one kernels/launch.py, got {len(found)}")
    with tarfile.open(fileobj=BytesIO(_git("archive", f"{commit}:{found[0]}"))) as archive:
        archive.extractall(folder / "kernels", filter="data")
    return _git("rev-parse", f"{commit}^{{commit}}").decode().strip()


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def folder() -> Path:
    """The folder that holds ``kernels`` of the earlier commit."""
    return Path(os.environ.get(VARIABLE, CARRIED / "old"))


def launch() -> ModuleType | None:
    """``kernels.launch`` of the earlier commit, or None if it was not prepared."""
    if PACKAGE not in sys.modules:
        init = folder() / "kernels" / "__init__.py"
        if not init.is_file():
            return None
        spec = importlib.util.spec_from_file_location(PACKAGE, init, submodule_search_locations=[str(init.parent)])
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE}.launch")


def missing() -> str:
    """The reason why there is no earlier generation."""
    return f"no kernels of {COMMIT} in {folder().name}/: sh bench/on_gpu.sh prepare brings them"


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, launch: Any, x: Tensor, *weights: Tensor) -> Tensor:
        how = {"eps": 1e-5, "activation": "silu", "compute": x.dtype, "save": any(ctx.needs_input_grad)}
        y, *saved = launch.adapter_forward(x, weights, None, **how)
        ctx.launch = launch
        ctx.save_for_backward(x, *saved, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, z, mean, rstd, *weights = ctx.saved_tensors
        grads = ctx.launch.adapter_backward(
            dy, x, z, mean, rstd, weights, None,
            activation="silu", needed=ctx.needs_input_grad[1:], x_free=False,
        )  # fmt: skip
        return None, *grads


def through(launch: Any) -> Callable[[Tensor, Any], Tensor]:
    """The adapter as a function of x and its parameters, through one generation's ``launch`` and nothing else."""
    return lambda x, weights: _Through.apply(launch, x, *weights)
