"""Measuring in a few minutes on a GPU: what to prepare, three calls, and one archive of results from each.

1. Here: PYTHON=<an interpreter with the machine's versions of Python, torch and triton> sh bench/on_gpu.sh prepare
   fills .gpu/, which git ignores: copy it with the sources. A cache made by other versions is useless there.
2. There: sh bench/on_gpu.sh first --out FOLDER, where FOLDER is copied back from that machine. results.tar.gz in it
   has every log and figure; the summary is also printed at the end. Allow a minute more than --seconds.
3. There: sh bench/on_gpu.sh second --out FOLDER [--ab ...], with --ab chosen from the first call's kernel times or
   profile, and --seconds less than the time that is left.
4. There: sh bench/on_gpu.sh cost --out FOLDER measures what a LLaMA-7B costs, beside LitGPT's published figures.

The kernels by clusters are checked and measured beside Triton's in both first and second. In 15 minutes there is time
for first and second, or for first and cost.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import before
from bench.gpu import carried, steps, summary
from bench.gpu.runner import Run

CUDA_BIN = "/usr/local/cuda/bin"  # where nvcc, ncu and compute-sanitizer are if they are not on the path
SHOWN = 11_000  # characters of the summary
# Replaces ncu and compute-sanitizer in a rehearsal: each option that they get here has one value.
STAND_IN = """#!/bin/sh
echo "stand-in for $(basename "$0")"
while [ "${1#--}" != "$1" ]; do shift 2; done
exec "$@"
"""


def main(argv: list[str]) -> int:
    """Run the command that the arguments name; returns the exit status."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="sh bench/on_gpu.sh", description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="fill the folder that is copied to the machine; needs git, no GPU")
    compared = "the commit whose kernels to compare with; default %(default).7s"
    prepare.add_argument("--old", default=before.COMMIT, metavar="COMMIT", help=compared)
    parts = list(carried.PARTS)
    prepare.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to fill; all")
    prepare.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that compile kernels")
    first = commands.add_parser("first", help="correctness, the main figures, the profile, a training step: 8 minutes")
    second = commands.add_parser("second", help="block sizes, A/B, memory errors: 4 minutes")
    cost = commands.add_parser("cost", help="gigabytes and minutes of a LLaMA-7B beside LitGPT's: 5 minutes")
    pairs = "slice_tiles=BT,BD,warps,stages (or another table), or an environment variable"
    second.add_argument("--ab", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=pairs)
    for call, seconds in ((first, 450), (second, 230), (cost, 300)):
        call.add_argument("--out", type=Path, help="folder of the archive; default bench/results/<device>")
        in_time = "no step starts that cannot finish in this time; default %(default)g"
        call.add_argument("--seconds", type=float, default=seconds, help=in_time)
        call.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU, in Triton's interpreter")
    for each in (prepare, first, second, cost):
        where = "what prepare fills and the calls read; default .gpu beside the sources"
        each.add_argument("--carried", type=Path, default=before.CARRIED, metavar="FOLDER", help=where)
    args = parser.parse_args(argv)
    args.carried = args.carried.resolve()
    if args.command == "prepare":
        return carried.prepare(args.carried, args.old, args.parts, args.processes)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # the archive is written on the way out
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _measure(args, Path(folder))


def _measure(args: argparse.Namespace, folder: Path) -> int:
    start = time.monotonic()
    out = (args.out or _default_out()).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"sh bench/on_gpu.sh {args.command}: --out: expected a folder that can be made, got {out}: {error}")
    work = folder / "work"
    work.mkdir()
    for warning in carried.mismatches(args.carried):
        print(f"warning: {warning}", flush=True)
    brought = args.carried
    if args.rehearse and not (brought / "old").is_dir():
        brought = folder / "carried"
        _rehearsed_old(brought)
    ab = getattr(args, "ab", [])
    if args.rehearse and args.command == "second" and not ab:
        ab = ["slice_tiles=16,32,8,1", "ADAPTERKERN_EARLY_LAUNCH=0"]
    try:
        call = steps.Call(work, brought, args.rehearse, ab)
    except ValueError as error:
        sys.exit(f"sh bench/on_gpu.sh {args.command}: {error}")
    patience = steps.PATIENCE if args.rehearse else 1
    run = Run(
        work, out, args.seconds * patience, before.ROOT, _environment(folder, brought, args.rehearse), summary.text,
        start,
    )  # fmt: skip
    for step in {"first": steps.first, "second": steps.second, "cost": steps.cost}[args.command](call):
        run.do(dataclasses.replace(step, limit=step.limit * patience))
    print(run.summary()[:SHOWN], f"\n{run.archive}", sep="\n", flush=True)
    return int(any(o.bad for o in run.outcomes))


def _environment(folder: Path, brought: Path, rehearse: bool) -> dict[str, str]:
    """The environment of every step's process; also unpacks the carried cache to its place."""
    cache = folder / "cache"
    cache.mkdir()
    path = f"{os.environ['PATH']}:{CUDA_BIN}"
    rehearsed = {}
    if rehearse:
        path = f"{_stand_ins(folder / 'bin')}:{path}"
        rehearsed = {"BENCH_COMPILER": "aot_eager", "OMP_NUM_THREADS": "2"}
    elif (brought / carried.CACHE).is_file():
        print(f"{carried.unpack_cache(brought / carried.CACHE, cache)} kernels carried", flush=True)
    return {
        **os.environ,
        **carried.environment(brought, cache),
        "PATH": path,
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": str(int(rehearse)),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "HF_HUB_OFFLINE": "1",
        **rehearsed,
    }


def _stand_ins(folder: Path) -> Path:
    folder.mkdir()
    for tool in ("ncu", "compute-sanitizer"):
        (folder / tool).write_text(STAND_IN)
        (folder / tool).chmod(0o755)
    return folder


def _rehearsed_old(folder: Path) -> None:
    """Take the old kernels from git, which a rehearsal has; without git they are reported as missing."""
    try:
        before.extract(before.COMMIT, folder / "old")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"warning: no old kernels: {error}", flush=True)


def _default_out() -> Path:
    import torch

    from bench.measure import results_folder

    if torch.cuda.is_available():
        return results_folder(torch.device("cuda"))
    return before.ROOT / "bench" / "results" / "rehearsal"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
