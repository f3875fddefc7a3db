"""The adapter's forward and backward on a GPU, against what PyTorch users write.

Device time by CUDA events over a backlog: a sleep kernel holds the device while the host queues a round of calls, so
that a launch costs what it costs in a busy training step. Variants take turns within a round, and a ratio is the
median over rounds of theirs over ours. Each call of a round has inputs of its own, more of them than L2 holds.

The floor is 2 units of T·d·(bytes per element) forward and 3 backward at the bandwidth of a device-to-device copy.
The second roof, L2 to the multiprocessors, is measured by reading a 20 MB buffer over and over.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._functorch.config
import triton
import triton.language as tl
from torch import Tensor

import adapterkern as ak
from adapterkern.reference import Weights, adapter_eager

OURS = "ours"
ROUNDS, CALLS = 15, 8
UNITS = {"forward": 2, "backward": 3}


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 20th and 80th percentile over rounds."""

    median: float
    low: float
    high: float


def time_rounds(
    variants: dict[str, Callable[[int], object]], rounds: int = ROUNDS, calls: int = CALLS
) -> dict[str, list[float]]:
    """Device microseconds per call of each variant in each round; a variant is called with the number of its input."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 2):
        for name, call in variants.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(4_000_000)  # some 2 ms, in which the host queues the calls
            begin.record()
            for k in range(calls):
                call(k)
            end.record()
            end.synchronize()
            if i >= 2:  # the first rounds compile and warm up
                times[name].append(begin.elapsed_time(end) * 1e3 / calls)
    return times


def summary(times: Sequence[float]) -> Timing:
    """Median and the 20th and 80th percentile."""
    cuts = statistics.quantiles(times, n=5)
    return Timing(statistics.median(times), cuts[0], cuts[-1])


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy of 1 GB, read and written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    times = time_rounds({"copy": lambda k: target.copy_(source)}, rounds=7, calls=4)["copy"]
    return 2 * source.nbytes / (statistics.median(times) * 1e-6)


@triton.jit
def _read_kernel(p, p_out, n, times, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, times):
        for o in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            total += tl.load(p + (o + i * BLOCK) % n + tl.arange(0, BLOCK))
    tl.store(p_out + tl.program_id(0), tl.sum(total, 0))


def l2_bandwidth() -> float:
    """Bytes per second that all multiprocessors read of a buffer of 20 MB, which stays in L2."""
    buffer = torch.randn(5 * 2**20, device="cuda")
    programs = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs, device="cuda")
    times = 20

    def read(k: int) -> None:
        _read_kernel[(programs,)](buffer, out, buffer.numel(), times, BLOCK=4096, num_warps=8)

    return times * buffer.nbytes / (statistics.median(time_rounds({"l2": read}, rounds=7, calls=2)["l2"]) * 1e-6)


@dataclass(frozen=True)
class Case:
    """One shape; inputs rotate over more bytes than L2 holds."""

    T: int
    d: int
    r: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def unit(self) -> int:
        """Bytes of T·d elements."""
        return self.T * self.d * self.dtype.itemsize

    def inputs(self, sets: int) -> tuple[list[Tensor], list[Tensor], Weights]:
        """x and dy of every call, and fp32 parameters."""
        torch.manual_seed(0)
        xs, dys = ([torch.randn(self.T, self.d, device="cuda").to(self.dtype) for _ in range(sets)] for _ in range(2))
        shapes = ((self.d,), (self.d,), (self.r, self.d), (self.r,), (self.d, self.r), (self.d,))
        weights = (torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in shapes)
        return xs, dys, Weights(*(w.requires_grad_() for w in weights))


@dataclass(frozen=True)
class Variant:
    """One way to compute the adapter, and the parameters that it differentiates."""

    name: str
    call: Callable[[Tensor], Tensor]
    parameters: Weights


def variants_of(weights: Weights, dtype: torch.dtype, compiled: bool) -> list[Variant]:
    """What is compared. ``compiled`` adds torch.compile's best, without its CUDA graphs, which would hide host time."""
    low = Weights(*(w.detach().to(dtype).requires_grad_() for w in weights))

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype):
            return adapter_eager(x, weights)

    variants = [
        Variant(OURS, lambda x: ak.adapter(x, *weights), weights),
        Variant("ours x-free", lambda x: ak.adapter(x, *weights, x_free=True), weights),
        Variant("eager autocast", autocast, weights),
        Variant("eager pure", lambda x: adapter_eager(x, low), low),
    ]
    if compiled:
        best = torch.compile(lambda x: adapter_eager(x, low), mode="max-autotune-no-cudagraphs", dynamic=False)
        variants.append(Variant("torch.compile", best, low))
    return variants


def run(case: Case, compiled: bool, rounds: int = ROUNDS) -> list[dict[str, object]]:
    """Times of every variant, forward and backward: one row each."""
    sets = max(2, min(CALLS, 2**30 // case.unit))
    xs, dys, weights = case.inputs(sets)
    variants = variants_of(weights, case.dtype, compiled)
    leaves = [x.requires_grad_() for x in xs]
    ys = {v.name: [v.call(x) for x in leaves] for v in variants}

    def forward(v: Variant) -> Callable[[int], object]:
        return lambda k: v.call(leaves[k % sets])

    def backward(v: Variant) -> Callable[[int], object]:
        return lambda k: torch.autograd.grad(
            ys[v.name][k % sets], [leaves[k % sets], *v.parameters], dys[k % sets], retain_graph=True
        )

    rows: list[dict[str, object]] = []
    for phase, make in (("forward", forward), ("backward", backward)):
        times = time_rounds({v.name: make(v) for v in variants}, rounds)
        for name, measured in times.items():
            ratio = statistics.median(t / o for t, o in zip(measured, times[OURS], strict=True))
            row = {"phase": phase, "variant": name, **asdict(summary(measured)), "ratio": ratio}
            rows.append({"T": case.T, "d": case.d, "r": case.r, "dtype": str(case.dtype)[6:], **row})
    return rows


def main(argv: list[str]) -> None:
    """``python -m bench adapter``: time the table on the current GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench adapter", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("-T", type=int, nargs="+", default=[1, 128, 2048, 8192, 32768])
    parser.add_argument("-d", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("-r", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--compiled", action="store_true", help="add torch.compile (minutes to tune for each shape)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("python -m bench adapter: needs a GPU, and torch.cuda.is_available() is False")

    torch._functorch.config.donated_buffer = False  # a retained graph is run again
    copy, l2 = copy_bandwidth(), l2_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy {copy / 1e12:.2f} TB/s, L2 reads {l2 / 1e12:.2f} TB/s, bf16, times in µs")
    print("     T     d    r phase    variant            median     p20     p80  % of floor  × ours")
    rows = []
    for T, d, r in itertools.product(args.T, args.d, args.r):
        case = Case(T, d, r)
        for row in run(case, args.compiled, args.rounds):
            floor = UNITS[str(row["phase"])] * case.unit / copy * 1e6
            row["of_floor"] = floor / float(row["median"])  # type: ignore[arg-type]
            rows.append(row)
            times = f"{row['median']:9.1f} {row['low']:7.1f} {row['high']:7.1f} {100 * row['of_floor']:11.0f}"
            print(
                f"{T:>6} {d:>5} {r:>4} {row['phase']:<8} {row['variant']:<16} {times} {row['ratio']:7.2f}", flush=True
            )
    if args.json:
        head = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
        args.json.write_text(json.dumps({**head, "copy": copy, "l2": l2, "rows": rows}, indent=1))
