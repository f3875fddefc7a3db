"""How it is measured.

Variants take turns inside one process, in an order that rotates per round: other load on the machine affects all of
them, and a ratio is the median over rounds of the ratio within one round. A plain copy of the case's floor bytes is one
of the variants, so "% of copy bandwidth" comes from the same rounds.

On a GPU the time of a round is device time between two events around a few calls, each with its own inputs. L2 is
overwritten before, and a spin kernel in front keeps the GPU busy until everything is queued, so that the host's launch
time does not count. This is checked each time (``EventTimer``), and the results record it (``timed``). CUDA graphs
would need no spin, but a captured forward of ours prepares its weights in every replay, and other variants have no
such work. Cases marked ``wall`` (training steps) include the host: its clock runs until the device is done. On a CPU
everything is timed by the host's clock, with a fixed number of threads.
"""

import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases import COPY, Case, Variant

CALLS = 8  # of one variant per round, on a GPU
MIN_ROUNDS = 5
Timer = Callable[[Callable[[], object]], float]
_GPU_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"


def timer(device: torch.device, wall: bool) -> Timer:
    """A function that runs its argument once and returns seconds."""
    if device.type == "cpu":
        return _host_time
    return _synchronized_time if wall else EventTimer(device)


def how_timed(measured: Timer, run: Callable[[], object]) -> str:
    """In words, what the times of ``run`` by ``measured`` contain."""
    if isinstance(measured, EventTimer):
        return measured.how(run)
    return "host clock" if measured is _host_time else "host clock until the device is done"


def _host_time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _synchronized_time(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclasses.dataclass
class _Backlog:
    """What keeps host time out of one variant's times: a spin of ``cycles`` before ``calls`` calls."""

    cycles: int = 4_000_000  # about 2 ms
    calls: int = CALLS
    leaked: int = 0  # times that may contain host time


class EventTimer:
    """Device seconds of one call, behind a spin that lasts until the last of a few calls is queued.

    The event before the calls must not have been reached by then. If it has, the spin is doubled, or at its maximum the
    number of calls is halved (the queue holds about 1,024 launches), and the time is measured again. At one call the
    time is kept and counted as leaked.
    """

    LONGEST = 64_000_000

    def __init__(self, device: torch.device) -> None:
        nbytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._backlogs: dict[Callable[[], object], _Backlog] = {}

    def __call__(self, run: Callable[[], object]) -> float:
        backlog = self._backlogs.setdefault(run, _Backlog())
        while True:
            seconds, queued_in_time = self._once(run, backlog)
            if queued_in_time:
                return seconds
            if backlog.cycles < self.LONGEST:
                backlog.cycles *= 2
            elif backlog.calls > 1:
                backlog.calls //= 2
            else:
                backlog.leaked += 1
                return seconds

    def _once(self, run: Callable[[], object], backlog: _Backlog) -> tuple[float, bool]:
        torch.cuda._sleep(backlog.cycles)
        self._flush.zero_()
        self._begin.record()
        for _ in range(backlog.calls):
            run()
        self._end.record()
        queued_in_time = not self._begin.query()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3 / backlog.calls, queued_in_time

    def how(self, run: Callable[[], object]) -> str:
        backlog = self._backlogs[run]
        if backlog.leaked:
            return f"device clock, {backlog.leaked} of the times with host time in them"
        return f"device clock, {backlog.calls} calls queued behind {backlog.cycles / 1e6:.0f} M cycles"


def copy_variant(nbytes: int, device: torch.device) -> Variant:
    """Reads half of ``nbytes`` and writes the other half; on a GPU, consecutive calls use different memory."""
    sets = max(2, min(8, 2**30 // nbytes)) if device.type == "cuda" else 1
    sources = [torch.ones(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(sets)]
    turns = itertools.cycle([(torch.zeros_like(source), source) for source in sources])

    def copy() -> object:
        target, source = next(turns)
        return target.copy_(source)

    return Variant(COPY, copy)


def interleave(
    case: Case, variants: Sequence[Variant], device: torch.device, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds per variant and round: as many rounds as fit into ``seconds``, between MIN_ROUNDS and ``rounds``."""
    measured = timer(device, case.wall)
    clocks: dict[str, Callable[[], float]] = {}
    for v in variants:
        if v.clock is not None:
            clocks[v.name] = v.clock
        elif v.run is not None:
            clocks[v.name] = functools.partial(measured, v.run)
    spent = sum(_warm_up(clock, seconds / 4 / len(clocks)) for clock in clocks.values())
    times: dict[str, list[float]] = {name: [] for name in clocks}
    order = list(clocks)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter() - spent
        for done in range(rounds):
            if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            for name in order:
                times[name].append(clocks[name]())
            order.append(order.pop(0))
    finally:
        gc.enable()
    for v in variants:
        if v.run is not None and v.clock is None:
            v.info["timed"] = how_timed(measured, v.run)
    return times


def _warm_up(clock: Callable[[], float], seconds: float) -> float:
    """Run until three consecutive times are within 10 % of each other or ``seconds`` are over, at least twice.

    Returns the seconds it took.
    """
    start = time.perf_counter()
    last: list[float] = []
    for count in itertools.count(1):
        last = [*last[-2:], clock()]
        stable = count >= 3 and max(last) < 1.1 * min(last)
        if stable or (count >= 2 and time.perf_counter() - start > seconds):
            return time.perf_counter() - start
    raise AssertionError


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak memory of one call, in bytes above what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    events = _profile(run, torch.profiler.ProfilerActivity.CPU, memory=True)
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def host_seconds(run: Callable[[], object], device: torch.device) -> float | None:
    """Host seconds to issue one call on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # no call waits for room in the queue or finds its result ready
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    took = (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    return took


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills that one call launches on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    events = _profile(run, torch.profiler.ProfilerActivity.CUDA)
    return sum(e.device_type() == torch.autograd.DeviceType.CUDA for e in events)


def _profile(run: Callable[[], object], activity: torch.profiler.ProfilerActivity, memory: bool = False) -> Any:
    # The profiler writes two lines to stderr each time, whatever its log level.
    stderr, quiet = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    try:
        with torch.profiler.profile(activities=[activity], profile_memory=memory) as profiler:
            run()
            if activity == torch.profiler.ProfilerActivity.CUDA:
                torch.cuda.synchronize()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(quiet)
    return profiler.profiler.kineto_results.events()


def kept_for_backward(
    forward: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor], x: torch.Tensor | None = None
) -> dict[str, int]:
    """What the graph of ``forward`` keeps for its backward, in bytes, without the parameters.

    ``kept_bytes``: every saved storage, counted once. ``own_bytes``: without x and the output, which the surrounding
    model may keep anyway; on a GPU this is the allocator's figure.
    """
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()  # t itself may be an output: a cycle that nothing collects

    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()  # alive until the end, so that no address is reused
    allocated = torch.cuda.memory_allocated() - before if torch.cuda.is_available() else 0
    for t in parameters:
        kept.pop(t.untyped_storage().data_ptr(), None)
    around = {t.untyped_storage().data_ptr() for t in (x, y) if t is not None}
    own = sum(nbytes for address, nbytes in kept.items() if address not in around)
    return {"kept_bytes": sum(kept.values()), "own_bytes": allocated - y.nbytes if y.is_cuda else own}


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def paired_ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """The median over rounds of times / to."""
    return statistics.median(a / b for a, b in zip(times, to, strict=True))


def device_name(device: torch.device) -> str:
    """As the device names itself; with the instruction set that a CPU is kept to, and with C's malloc as it is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from adapterkern.ops import native  # not above: a peer's process imports this module, too

    name = native.cpuinfo("model name") or platform.processor() or "cpu"
    with_isa = f"{name} with {os.environ['BENCH_ISA']} alone" if "BENCH_ISA" in os.environ else name
    return f"{with_isa}, default malloc" if "BENCH_MALLOC" in os.environ else with_isa


def results_folder(device: torch.device) -> Path:
    """``bench/results/<device>``."""
    return Path(__file__).parent / "results" / "-".join(re.sub(r"\(R\)|,", "", device_name(device)).split())


def machine(device: torch.device) -> dict[str, Any]:
    """What is needed to judge a time: device, clocks, threads, load, versions."""
    about: dict[str, Any] = {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "malloc": "keeps freed memory" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "default",
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "peft", "liger_kernel")},
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        about["gpu"] = _gpu_state(device)
    else:
        with open("/proc/cpuinfo") as file:
            about["clock_mhz"] = [float(line.split(":")[1]) for line in file if line.startswith("cpu MHz")]
    return about


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores others use: asked before our own work. A load average would still hold our last run."""
    import psutil

    return psutil.cpu_percent(interval=seconds) / 100 * (os.cpu_count() or 1)


def _gpu_state(device: torch.device) -> dict[str, str]:
    """What nvidia-smi reports, or why it does not. By UUID: its numbers ignore CUDA_VISIBLE_DEVICES."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader", f"--id={uuid}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"missing": str(error)}
    shown, names = done.stdout.strip().split(", "), _GPU_QUERY.split(",")
    if done.returncode or len(shown) != len(names):
        return {"missing": f"nvidia-smi: exit {done.returncode}: {(done.stdout + done.stderr).strip()}"}
    return dict(zip(names, shown, strict=True))


def _version(name: str) -> str | None:
    """Of a package, which is not imported for it: peft and transformers take seconds."""
    try:
        if version := getattr(sys.modules.get(name), "__version__", None):
            return str(version)
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # it may have come with another
        return "installed" if importlib.util.find_spec(name) else None
    except Exception as error:  # a broken package must not cost the run
        return f"broken ({type(error).__name__})"
