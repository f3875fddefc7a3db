"""The counted tables: memory traffic, ahead-of-time compilation, and what the adapter keeps for its backward.

The first two run in their own processes: within one, Triton either interprets or compiles.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import adapter

ROOT = Path(__file__).parent.parent


def _in_process(part: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        call = f"from bench.{part} import main; main({[*arguments, '--json', str(path)]!r})"
        done = subprocess.run(
            [sys.executable, "-c", call], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"bench.{part} {arguments} failed:\n{done.stderr}")
        rows: dict[str, Any] = json.loads(path.read_text())
        return rows


def traffic(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Bytes that our kernels (counted in the interpreter) and eager PyTorch move."""
    yield _in_process("traffic", ["-d", "1024"] if quick else [], {"TRITON_INTERPRET": "1"})


def aot(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Registers, shared memory and tensor-core instructions of every kernel."""
    sms = ["90"] if quick else ["80", "90", "100"]
    yield _in_process("aot", ["-d", "4096", "-r", "64", "--dtype", "bfloat16", "--sm", *sms], {"TRITON_INTERPRET": "0"})


def memory(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """What one adapter keeps for its backward, in the main shape of the adapter part."""
    case = adapter.cases(device, quick)[0]
    unit = case.shape["T"] * case.shape["d"] * getattr(torch, case.shape["dtype"]).itemsize
    rows: list[dict[str, Any]] = []
    for name, i in adapter.kept(case, device):
        units = {"kept_units": i["kept_bytes"] / unit, "own_units": i["own_bytes"] / unit}
        rows.append({"variant": name, **i, **units})
        yield {"case": case.name.split(", ", 1)[1], "rows": rows}


# Each yields its table after every row, so that a stopped run keeps what was counted.
COUNTED: dict[str, Callable[[torch.device, bool], Iterator[dict[str, Any]]]] = {
    "traffic": traffic,
    "aot": aot,
    "memory": memory,
}
