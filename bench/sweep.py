"""Block sizes, timed: every candidate for one kernel at a time, the others as the host table has them.

The table in `adapterkern.kernels.tiles` is written from what this prints; nothing tunes at run time. A candidate that
spills or does not fit is skipped, and so is one whose result differs from the table's by more than rounding.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from adapterkern.kernels import launch
from adapterkern.kernels.tiles import Tiles, forward_tiles, hidden_tiles, slice_tiles
from adapterkern.kernels.weights import padded_adapter_dim
from bench.adapter import Case, time_rounds

TABLES: dict[str, Callable[[int, int, bool], Tiles]] = {
    "forward_tiles": forward_tiles,
    "hidden_tiles": hidden_tiles,
    "slice_tiles": slice_tiles,
}


def candidates(kernel: str, R: int) -> list[Tiles]:
    """Sizes worth a try: accumulators within registers, 16 rows to 128."""
    rows, columns, warps, stages = (16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
    found = [Tiles(*c) for c in itertools.product(rows, columns, warps, stages)]
    if kernel == "slice_tiles":
        return [t for t in found if R * t.BD <= 16384 and t.BT <= 64 and t.num_stages < 4]
    return [t for t in found if t.BT * R <= 16384 and t.BD * R <= 16384 and t.BT >= 32]


def sweep(case: Case, kernel: str) -> list[tuple[float, Tiles]]:
    """(µs, tiles) of every candidate that works, fastest first."""
    xs, dys, weights = case.inputs(4)
    how = {"eps": 1e-5, "activation": "silu", "compute": case.dtype, "save": True}
    saved = [launch.adapter_forward(x, weights, None, **how) for x in xs]

    def call(k: int) -> list[torch.Tensor | None]:
        if kernel == "forward_tiles":
            return list(launch.adapter_forward(xs[k % 4], weights, None, **how))
        return launch.adapter_backward(
            dys[k % 4], xs[k % 4], *saved[k % 4][1:], weights, None, activation="silu", needed=[True] * 7, x_free=False
        )

    expected = [t.clone() for t in call(0) if t is not None]
    table, found = TABLES[kernel], []
    R, wide = padded_adapter_dim(case.r), torch.cuda.get_device_capability()[0] in (9, 10)
    for tiles in {table(case.dtype.itemsize, R, wide), *candidates(kernel, R)}:
        setattr(launch, kernel, lambda *_, tiles=tiles: tiles)
        try:
            got = [t for t in call(0) if t is not None]
        except OutOfResources:
            continue
        finally:
            setattr(launch, kernel, table)
        off = max(((g - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True))
        if off > 1e-2:
            print(f"  {tiles}: differs by {off:.1e}")
            continue
        setattr(launch, kernel, lambda *_, tiles=tiles: tiles)
        found.append((statistics.median(time_rounds({"": call}, rounds=5, calls=4)[""]), tiles))
        setattr(launch, kernel, table)
    return sorted(found, key=lambda f: f[0])


def main(argv: list[str]) -> None:
    """``python -m bench sweep``: print the best sizes of every kernel and where the table's stand."""
    parser = argparse.ArgumentParser(prog="python -m bench sweep", description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("-T", type=int, default=8192)
    parser.add_argument("-d", type=int, default=4096)
    parser.add_argument("-r", type=int, nargs="+", default=[64])
    parser.add_argument("--kernel", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("python -m bench sweep: needs a GPU, and torch.cuda.is_available() is False")
    report = []
    for r, kernel in itertools.product(args.r, args.kernel):
        found = sweep(Case(args.T, args.d, r), kernel)
        wide = torch.cuda.get_device_capability()[0] in (9, 10)
        chosen = TABLES[kernel](2, padded_adapter_dim(r), wide)
        print(f"r={r} {kernel} (µs of the whole pass)")
        for time, tiles in [f for i, f in enumerate(found) if i < 5 or f[1] == chosen]:
            print(f"  {time:8.1f}  {tiles}" + ("  <- the table's" if tiles == chosen else ""), flush=True)
        report += [{"r": r, "kernel": kernel, "time": time, "tiles": repr(tiles)} for time, tiles in found]
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
