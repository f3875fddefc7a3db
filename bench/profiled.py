"""One training step of one adapter with nothing around it, for a profiler: ``ncu --profile-from-start off … profiled``.

What ncu then says of each launch (bytes of device memory and of L2, hit rate, issue and tensor-core use, occupancy)
stands beside the prediction in NOTES.md.
"""

import argparse
import sys

import torch

import adapterkern as ak


def main(argv: list[str]) -> None:
    """``python -m bench profiled``: forward, backward and ClippedAdamW, twice to warm up and once between the marks."""
    parser = argparse.ArgumentParser(prog="python -m bench profiled", description=__doc__)
    parser.add_argument("-T", type=int, default=8192)
    parser.add_argument("-d", type=int, default=4096)
    parser.add_argument("-r", type=int, default=64)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("python -m bench profiled: needs a GPU, and torch.cuda.is_available() is False")
    torch.manual_seed(0)
    module = ak.Adapter(args.d, args.r, init="xavier", device="cuda")
    optimizer = ak.ClippedAdamW(module.parameters(), lr=1e-4)
    x, dy = (torch.randn(args.T, args.d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    for last in (False, False, True):
        torch.cuda.synchronize()
        if last:
            torch.cuda.profiler.start()
        module(x).backward(dy)
        optimizer.step()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()
