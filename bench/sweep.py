"""Times block sizes: each candidate for one kernel at a time, the other kernels with the host table's sizes.

The table in ``ops.kernels.tiles`` is written from this output; nothing is tuned at run time. A candidate that does not
compile, does not fit, raises, or gives a result that differs from the table's by more than rounding is recorded with
the reason, and the sweep continues. If the error destroyed the CUDA context, it continues in the next process, with
``--resume``.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from adapterkern.files import replacing
from adapterkern.ops.kernels import launch
from adapterkern.ops.kernels.tiles import Tiles, has_wide_products
from adapterkern.ops.kernels.weights import padded_adapter_dim
from bench.adapter import make_inputs
from bench.measure import timer
from bench.tiling import TABLES, replaced

CONTEXT_LOST = 3  # the exit status: call again with --resume
# (BT, BD, warps, stages), the most promising first; the current table's always come first.
# Everything an SM loads counts against L2 → SM bandwidth, and weights are loaded once per row tile: 2r/BT units, 2.0 at
# 64 rows of r = 64 and 1.0 at 128, besides the 3 of x and y. BD and warps trade registers for instructions per element.
# An H100 needs 18 KB in flight per SM at the least (3.3 TB/s for 700 ns).
_ROW_TILES = (
    Tiles(64, 64, 4, 4),  # the table of 193c92f
    Tiles(64, 128, 4, 3),  # half the steps of the loop, twice the bytes in flight
    Tiles(64, 128, 4, 4),
    Tiles(64, 128, 8, 3),
    Tiles(64, 128, 8, 4),
    Tiles(64, 256, 8, 2),
    Tiles(64, 256, 8, 3),
    Tiles(64, 64, 8, 4),  # half the registers per thread
    Tiles(64, 64, 8, 6),
    Tiles(64, 64, 4, 6),
    Tiles(128, 64, 8, 4),  # half the weights' reads
    Tiles(128, 128, 8, 2),
    Tiles(128, 128, 8, 3),
    Tiles(128, 64, 8, 6),
    Tiles(32, 128, 4, 4),  # no warp-group products; twice the blocks
    Tiles(32, 64, 4, 6),
)
CANDIDATES: dict[str, tuple[Tiles, ...]] = {
    "forward_tiles": _ROW_TILES,
    "hidden_tiles": _ROW_TILES,
    "slice_tiles": (
        Tiles(32, 128, 8, 3),  # the table of 193c92f
        Tiles(64, 128, 8, 2),  # two stages: 50 KB less shared memory
        Tiles(64, 128, 8, 3),
        Tiles(64, 128, 8, 4),
        Tiles(128, 128, 8, 2),
        Tiles(64, 64, 8, 3),  # half the sums in registers; twice the slices, so dz is read twice as often
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 4, 4),
        Tiles(64, 64, 8, 4),
        Tiles(128, 64, 8, 2),  # the fewest barriers per element
        Tiles(128, 64, 8, 3),
        Tiles(32, 128, 8, 4),
        Tiles(32, 64, 4, 4),  # two blocks per SM
    ),
}


def candidates(kernel: str, r: int, wide: bool = True) -> list[Tiles]:
    """The table's tiles for bf16, then the listed ones."""
    own = TABLES[kernel](2, padded_adapter_dim(r), wide)
    return list(dict.fromkeys([own, *CANDIDATES[kernel]]))


class Sweep:
    """The inputs of one shape, and the pass that each kernel belongs to."""

    def __init__(self, T: int, d: int, r: int, device: torch.device) -> None:
        dtype = torch.bfloat16
        self.inputs, self.weights = make_inputs(T, d, r, dtype, device)
        self.how: dict[str, Any] = {"eps": 1e-5, "activation": "silu", "compute": dtype, "save": True}
        self.turns = itertools.count()
        self.measured = timer(device, wall=False)
        with torch.no_grad():
            self.saved = [launch.adapter_forward(x, self.weights, None, **self.how)[1:] for x, _ in self.inputs]

    @torch.no_grad()
    def call(self, kernel: str, k: int) -> list[torch.Tensor]:
        """The pass that ``kernel`` is part of, on the k-th inputs."""
        k %= len(self.inputs)
        x, dy = self.inputs[k]
        if kernel == "forward_tiles":
            return [t for t in launch.adapter_forward(x, self.weights, None, **self.how) if t is not None]
        grads = launch.adapter_backward(
            dy, x, *self.saved[k], self.weights, None, activation="silu", needed=[True] * 7, x_free=False
        )
        return [g for g in grads if g is not None]

    def tried(self, kernel: str, tiles: Tiles, rounds: int, expected: list[torch.Tensor]) -> dict[str, Any]:
        """The pass with these tiles: {"us": median µs} or {"error": reason}."""
        try:
            with replaced(kernel, tiles):
                got = self.call(kernel, 0)
                off = max(((g - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True))
                if not off <= 1e-2:
                    return {"error": f"differs from the table's tiles by {off:.1e}"}
                run = lambda: self.call(kernel, next(self.turns))  # noqa: E731  # one function for all rounds
                times = [self.measured(run) for _ in range(rounds + 2)][2:]
            return {"us": statistics.median(times) * 1e6}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def _alive(device: torch.device) -> bool:
    """Whether the CUDA context still works."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def main(argv: list[str]) -> int:
    """``python -m bench sweep``: time the listed sizes of every kernel and print them, marking the table's."""
    parser = argparse.ArgumentParser(prog="python -m bench sweep", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all results to this file, after each candidate")
    parser.add_argument("--resume", action="store_true", help="skip candidates that --json has already")
    parser.add_argument("--device", default="cuda", help="cpu needs TRITON_INTERPRET=1 and is a rehearsal")
    parser.add_argument("-T", type=int, default=8192)
    parser.add_argument("-d", type=int, default=4096)
    parser.add_argument("-r", type=int, default=64)
    parser.add_argument("--kernel", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=20, help="candidates per kernel")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("python -m bench sweep: needs a GPU, and torch.cuda.is_available() is False")
        device = torch.device("cuda", torch.cuda.current_device())
    resumed = args.resume and args.json is not None and args.json.exists()
    rows: list[dict[str, Any]] = json.loads(args.json.read_text()) if resumed else []
    known = {(row["kernel"], row["tiles"]) for row in rows}
    sweep = Sweep(args.T, args.d, args.r, device)
    for kernel in args.kernel:
        tried = candidates(kernel, args.r, has_wide_products(device))[: args.most]
        expected = [t.clone() for t in sweep.call(kernel, 0)]
        for tiles in (t for t in tried if (kernel, repr(t)) not in known):
            found = sweep.tried(kernel, tiles, args.rounds, expected)
            rows.append({"kernel": kernel, "r": args.r, "tiles": repr(tiles), "table": tiles == tried[0], **found})
            if args.json:
                with replacing(args.json) as path:
                    path.write_text(json.dumps(rows, indent=1))
            if "error" in found and not _alive(device):
                print(f"{kernel} {tiles}: {found['error']}: the CUDA context is lost")
                return CONTEXT_LOST
    for kernel in args.kernel:
        print(f"r={args.r} {kernel} (µs of the whole pass)")
        mine = [row for row in rows if row["kernel"] == kernel]
        for row in sorted(mine, key=lambda row: row.get("us", float("inf"))):
            figure = f"{row['us']:8.1f}" if "us" in row else "       –"
            print(f"  {figure}  {row['tiles']}{'  <- the table’s' if row['table'] else ''} {row.get('error', '')}")
    return 0
