"""How many cores the process may use, and what slows it down on them."""

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_BUSY = 1.5  # load per core above which others take turns with this process


def usable_cores(cgroup: Path = _CGROUP) -> float:
    """The cores that the scheduler gives this process: its affinity, and in a container the quota."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no container, or no quota: "max"
        return cores


def advice(threads: int, cores: float, load: float) -> list[str]:
    """What to do about torch's number of ``threads``, and about the machine's ``load`` of the last minute."""
    lines = []
    if threads > math.ceil(cores):
        lines.append(
            f"torch uses {threads} threads, but this process may use {cores:g} cores, on which they wait for each "
            f"other: set OMP_NUM_THREADS={max(1, round(cores))}"
        )
    if load > _BUSY * cores:
        lines.append(
            f"the cores are busy: load {load:.1f} on {cores:g}. Everything takes longer; OMP_WAIT_POLICY=PASSIVE lets "
            "waiting threads sleep instead of taking the cores from each other, and no time measured now is right"
        )
    return lines
