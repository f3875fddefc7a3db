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
from bench.adapter import make_inputs
from bench.measure import timer

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


def sweep(T: int, d: int, r: int, kernel: str, dtype: torch.dtype = torch.bfloat16) -> list[tuple[float, Tiles]]:
    """(µs, tiles) of every candidate that works, fastest first."""
    device = torch.device("cuda", torch.cuda.current_device())
    inputs, weights = make_inputs(T, d, r, dtype, device)
    how = {"eps": 1e-5, "activation": "silu", "compute": dtype, "save": True}
    with torch.no_grad():
        saved = [launch.adapter_forward(x, weights, None, **how) for x, _ in inputs]
    measured = timer(device, wall=False)
    turns = itertools.count()

    @torch.no_grad()
    def call(k: int) -> list[torch.Tensor | None]:
        x, dy = inputs[k % len(inputs)]
        if kernel == "forward_tiles":
            return list(launch.adapter_forward(x, weights, None, **how))
        z_mean_rstd = saved[k % len(inputs)][1:]
        return launch.adapter_backward(
            dy, x, *z_mean_rstd, weights, None, activation="silu", needed=[True] * 7, x_free=False
        )

    expected = [t.clone() for t in call(0) if t is not None]
    table, found = TABLES[kernel], []
    R, wide = padded_adapter_dim(r), torch.cuda.get_device_capability()[0] in (9, 10)
    for tiles in {table(dtype.itemsize, R, wide), *candidates(kernel, R)}:
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
        times = [measured(lambda: call(next(turns))) for _ in range(7)][2:]
        found.append((statistics.median(times) * 1e6, tiles))
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
        found = sweep(args.T, args.d, r, kernel)
        wide = torch.cuda.get_device_capability()[0] in (9, 10)
        chosen = TABLES[kernel](2, padded_adapter_dim(r), wide)
        print(f"r={r} {kernel} (µs of the whole pass)")
        for time, tiles in [f for i, f in enumerate(found) if i < 5 or f[1] == chosen]:
            print(f"  {time:8.1f}  {tiles}" + ("  <- the table's" if tiles == chosen else ""), flush=True)
        report += [{"r": r, "kernel": kernel, "time": time, "tiles": repr(tiles)} for time, tiles in found]
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
