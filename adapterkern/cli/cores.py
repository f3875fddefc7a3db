"""How many cores the process may use, and what slows it down on them."""

import logging
import math
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_CGROUP = Path("/sys/fs/cgroup")
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_BUSY = 1.5  # load per core above which others take turns with this process


def usable_cores(cgroup: Path = _CGROUP) -> float:
    """The cores that the scheduler gives this process: its affinity, and in a container the quota."""
    cores: float = _cores_of_threads() or os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no container, or no quota: "max"
        return cores


def _cores_of_threads() -> int:
    """How many cores the threads of this process may use; 0 where the system does not say."""
    if any(name in os.environ for name in _BINDING):  # then OpenMP has left this thread one core, and others theirs
        torch.ones(1 << 17).sum()  # which starts them
    try:
        threads = map(int, os.listdir("/proc/self/task"))
        return len(set().union(*map(os.sched_getaffinity, threads)))
    except (AttributeError, OSError):  # another system, or a thread that has just ended
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def warn_of_threads() -> None:
    """Say in one line that torch has more threads than there are cores."""
    for line in advice(torch.get_num_threads(), usable_cores(), load=0.0):
        logger.warning("%s", line)


def counted(number: float, what: str) -> str:
    """``2 cores``, ``1 core``."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def advice(threads: int, cores: float, load: float) -> list[str]:
    """What to do about torch's number of ``threads``, and about the machine's ``load`` of the last minute."""
    lines = []
    if threads > math.ceil(cores):
        lines.append(
            f"torch uses {threads} threads, but this process may use {counted(cores, 'core')}, on which they wait for "
            f"each other: set OMP_NUM_THREADS={max(1, round(cores))}"
        )
    if load > _BUSY * cores:
        lines.append(
            f"the cores are busy: load {load:.1f} on {cores:g}. Everything takes longer; OMP_WAIT_POLICY=PASSIVE lets "
            "waiting threads sleep instead of taking the cores from each other, and no time measured now is right"
        )
    return lines
