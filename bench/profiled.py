"""One training step of a single adapter, for a profiler: ``ncu --profile-from-start off … profiled``.

ncu's figures per launch (bytes of device memory and of L2, hit rate, issue and tensor-core use, occupancy) can be
compared with the predictions in NOTES.md. ``--kernels`` prints the time per launch by torch's profiler; it needs no
ncu, which not every machine permits.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

import adapterkern as ak
from bench.report import table

STEPS = 10


def main(argv: list[str]) -> None:
    """``python -m bench profiled``: forward, backward and ClippedAdamW, two steps to warm up and one profiled."""
    parser = argparse.ArgumentParser(prog="python -m bench profiled", description=__doc__)
    parser.add_argument("-T", type=int, default=8192)
    parser.add_argument("-d", type=int, default=4096)
    parser.add_argument("-r", type=int, default=64)
    parser.add_argument("--device", default="cuda", help="cpu needs TRITON_INTERPRET=1 and is a rehearsal")
    parser.add_argument("--kernels", action="store_true", help=f"print the kernels' times in {STEPS} steps")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m bench profiled: needs a GPU, and torch.cuda.is_available() is False")
    torch.manual_seed(0)
    module = ak.Adapter(args.d, args.r, init="xavier", device=args.device)
    optimizer = ak.ClippedAdamW(module.parameters(), lr=1e-4)
    x, dy = (torch.randn(args.T, args.d, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()

    def step() -> None:
        module(x).backward(dy)
        optimizer.step()

    on_gpu = args.device == "cuda"
    for _ in range(2):
        step()
    if args.kernels:
        _print_kernels(step, on_gpu)
        return
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _print_kernels(step: Callable[[], Any], on_gpu: bool) -> None:
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.profiler.kineto_results.events():
        if not on_gpu or event.device_type() == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name(), []).append(event.duration_ns() / 1e3)
    by_total = sorted(times.items(), key=lambda item: -sum(item[1]))[:24]
    rows = [
        [name[:60], f"{len(each) / STEPS:g}", f"{statistics.median(each):.1f}", f"{sum(each) / STEPS:.1f}"]
        for name, each in by_total
    ]
    print(table(["launch", "per step", "median µs", "µs per step"], rows))
