"""Checks all generations' kernels in bf16 against fp64: ``python -m bench.gpu.check``."""

import argparse
import sys

import torch

from bench.adapter import BARE, BEFORE, CLUSTERS, adapter_case, build

# one row; rows and columns that no tile divides; one row more than half a wave of tiles, and than one wave
SHAPES = ((1, 4096, 64), (129, 577, 59), (8192, 4096, 64), (4225, 4096, 64), (8449, 1024, 64))
SMALL = ((1, 128, 16), (70, 130, 16))


def main(argv: list[str]) -> int:
    """Print both errors and budgets per shape; returns 1 if an error is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.check", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.rehearse else "cuda")
    bad = 0
    for T, d, r in SMALL if args.rehearse else SHAPES:
        for v in build(adapter_case(T, d, r, "bfloat16", "both"), device, (BARE, CLUSTERS, BEFORE)):
            if v.error is None or v.budget is None:
                print(f"T={T} d={d} r={r} {v.name}: {v.missing}")
                bad += v.failed
                continue
            over = not v.error <= v.budget
            print(f"T={T} d={d} r={r} {v.name}: error {v.error:.1e}, budget {v.budget:.1e}{' OVER' * over}", flush=True)
            bad += over
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
