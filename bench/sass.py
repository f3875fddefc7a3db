"""The loops of a compiled kernel: instructions, loads that an iteration waits for, tensor-core instructions.

This is the only place that shows whether a loop is pipelined: a load whose latency each iteration waits for is an
``LDG`` in the loop's body, a pipelined one an ``LDGSTS`` (``cp.async``). Instructions per element are a lower bound of
the time: an SM issues four warp instructions per cycle, so T·d elements at n instructions each take
n·T·d / (128·SMs·clock).
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;?\s*$")
_BRANCH = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Loop:
    """The body of an innermost loop: warp instructions by kind."""

    instructions: int
    plain_loads: int  # LDG: the iteration waits for memory
    async_loads: int  # LDGSTS
    stores: int  # STG
    wgmma: int  # HGMMA
    mma: int  # HMMA

    def per_element(self, elements: int, warps: int) -> float:
        """Instructions per element, if one pass of the body makes a tile of ``elements`` with ``warps`` warps."""
        return self.instructions * warps * 32 / elements


def run_tool(name: str, cubin: bytes, *options: str) -> str:
    """The output of a CUDA tool that comes with Triton, for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack (more than 0 means spills)."""
    text = run_tool("cuobjdump", cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {text!r}")
    return int(found[1]), int(found[2])


def loops(cubin: bytes) -> list[Loop]:
    """The innermost loops, in code order."""
    return loops_of(run_tool("nvdisasm", cubin, "-c"))


def loops_of(sass: str) -> list[Loop]:
    """As ``loops``, from nvdisasm's text."""
    labels: dict[str, int] = {}
    names: list[str] = []
    operands: list[str] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := _INSTRUCTION.match(line):
            names.append(found[1].split(".")[0])
            operands.append(found[2])
    spans = []
    for end, (name, operand) in enumerate(zip(names, operands, strict=True)):
        target = _BRANCH.search(operand)
        if name == "BRA" and target and labels.get(target[1], end) < end:
            spans.append((labels[target[1]], end + 1))
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [_loop(Counter(names[a:b])) for a, b in sorted(set(inner))]


def _loop(count: Counter[str]) -> Loop:
    return Loop(count.total(), count["LDG"], count["LDGSTS"], count["STG"], count["HGMMA"], count["HMMA"])
