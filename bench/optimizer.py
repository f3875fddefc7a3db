"""The optimizer bench: one clipped AdamW step, ours against what PyTorch users write.

    python -m bench.optimizer [--device cuda] [--json FILE]

Every variant makes the same step on its own parameters. Variants take turns, so that a change of the machine's speed
meets all of them, and a ratio is the median over rounds of (variant / ours) within one round. The floor is 28 bytes a
parameter (p, g, m, v read; p, m, v written) at the speed of a plain copy of as many bytes, measured in the same rounds;
on a CPU, whose copies read their target first, a step can beat that. On a GPU a time is device time over a backlog of
steps; `host` is what the CPU spends to issue one.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from adapterkern.optim import ClippedAdamW, backend

FLOOR_BYTES = 28
OURS, COPY = "ClippedAdamW", "copy"


@dataclass(frozen=True)
class Case:
    name: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return sum(self.sizes)


ADAPTER = (4096, 4096, 64 * 4096, 64, 4096 * 64, 4096)  # norm, down, up of one adapter: d = 4096, r = 64
LORA_QV = (8 * 4096, 4096 * 8, 8 * 4096, 1024 * 8)
LORA_ALL = tuple(
    16 * n for pair in [(4096, 4096), (4096, 1024)] * 2 + [(4096, 14336)] * 2 + [(14336, 4096)] for n in pair
)
CASES = (
    Case("16 adapters, LLaMA-7B", ADAPTER * 16),
    Case("LoRA r=16 on 7 projections, LLaMA-3-8B", LORA_ALL * 32),
    Case("LoRA r=8 on q and v, LLaMA-3-8B", LORA_QV * 32),
)


@dataclass
class Row:
    """Times in microseconds: median, 20th and 80th percentile over rounds. `ratio` is this variant's time over ours."""

    variant: str
    median: float
    low: float
    high: float
    host: float
    ratio: float
    of_floor: float


def _with_clip(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> Callable[[], None]:
    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def _with_grad_scale(params: list[nn.Parameter]) -> Callable[[], None]:
    """Clipping as a gradient scale of the fused kernel: PyTorch's best, for those who know."""
    optimizer = torch.optim.AdamW(params, fused=True)
    optimizer.found_inf = torch.zeros((), device=params[0].device)  # type: ignore[attr-defined]

    def step() -> None:
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        optimizer.grad_scale = (norm + 1e-6).clamp(min=1)  # type: ignore[attr-defined]
        optimizer.step()

    return step


def variants(case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    def params() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(n, device=device)) for n in case.sizes]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    a, b, c = params(), params(), params()
    half = 7 * case.elements // 2  # copying n floats moves 8n bytes: this copy moves the 28 bytes a parameter
    source = torch.empty(half, device=device).normal_()
    target = torch.empty_like(source)
    ours = ClippedAdamW(a)
    made: dict[str, Callable[[], object]] = {
        OURS: ours.step,
        "clip_grad_norm_ + AdamW(fused)": _with_clip(torch.optim.AdamW(b, fused=True), b),
        "AdamW(fused), clip as grad_scale": _with_grad_scale(params()),
        "clip_grad_norm_ + AdamW(foreach)": _with_clip(torch.optim.AdamW(c, foreach=True), c),
        COPY: lambda: target.copy_(source),
    }
    if device.type == "cuda":
        ours.step()  # state and tables are made outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours.step()
        made[f"{OURS}, replayed from a graph"] = graph.replay
    return made


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(time of a step, host time to issue it), in µs."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        took = (time.perf_counter() - start) * 1e6
        return took, took
    steps = 10
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)  # tens of milliseconds: the steps queue up behind it and then run back to back
    start = time.perf_counter()
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    host = (time.perf_counter() - start) * 1e6 / steps
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / steps, host


def measure(case: Case, device: torch.device, rounds: int) -> list[Row]:
    steps = variants(case, device)
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    hosts: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            took, host = timed(step, device)
            times[name].append(took)
            hosts[name].append(host)

    def ratio(name: str, to: str) -> float:
        return statistics.median(x / y for x, y in zip(times[name], times[to], strict=True))

    rows = []
    for name, taken in times.items():
        low, *_, high = statistics.quantiles(taken, n=5)
        host = statistics.median(hosts[name])
        rows.append(Row(name, statistics.median(taken), low, high, host, ratio(name, OURS), ratio(COPY, name)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": ": ".join(backend(device)),
        "floor_bytes": FLOOR_BYTES,
        "rounds": args.rounds,
    }
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    results = []
    for case in CASES:
        rows = measure(case, device, args.rounds)
        results.append(
            {"case": case.name, "tensors": len(case.sizes), "elements": case.elements}
            | {"rows": [asdict(r) for r in rows]}
        )
        print(f"\n{case.name}: {len(case.sizes)} tensors, {case.elements / 1e6:.2f} M fp32 parameters")
        print("| step | median µs | 20–80 % | host µs | time / ours | % of 28-byte floor |\n|---|--:|--:|--:|--:|--:|")
        for r in rows:
            spread = f"{r.low:.0f}–{r.high:.0f}"
            print(
                f"| {r.variant} | {r.median:.0f} | {spread} | {r.host:.0f} | {r.ratio:.2f} | {100 * r.of_floor:.0f} |"
            )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about | {"cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
