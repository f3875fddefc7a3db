"""The command line of the bench; see ``python -m bench --help``."""

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from bench.report import Run

PARTS = ("adapter", "optimizer", "step", "cost", "memory", "traffic", "aot")
KEEP = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"  # glibc's variables; set by the user, they hold as they are
# An instruction set, as ADAPTERKERN_CPU_ISA names it, and how torch's own kernels, oneDNN and MKL are kept to it.
CAPPED = ("ADAPTERKERN_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
ISAS = {
    "avx2": ("avx2", "avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "avx512", "AVX512_CORE", "AVX512"),
    "avx512_bf16": ("avx512_bf16", "avx512", "AVX512_CORE_BF16", "AVX512"),
}
ALONE = ["traffic"], ["aot"]  # parts that are commands of their own as well
EPILOG = """
  python -m bench report A.json [B.json]   the tables of a saved run, or a comparison of two
  python -m bench results                  write bench/RESULTS.md from the newest results
  python -m bench traffic|aot OPTIONS      one of the two alone, with its own options
  python -m bench sweep                    time block sizes on a GPU
  python -m bench profiled                 one step of one adapter, for a profiler
  pytest bench                             the quick cases by pytest-benchmark, without taking turns
"""


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line; knows no abbreviations, since ``_without`` has to know the options."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog=f"python -m bench {prog}".rstrip(), allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")


def main(argv: list[str]) -> int:
    """Run the command that the arguments name; returns the exit status."""
    if argv[:1] == ["report"]:
        return _report(argv[1:])
    if argv[:1] == ["results"]:
        return _results(argv[1:])
    if argv[:1] in (["sweep"], ["profiled"]) or (argv[:1] in ALONE and {"-h", "--help"} & {*argv}):
        return _alone(argv)
    text = "Measure the variants of each case in turns and print the tables."
    plain = argparse.RawTextHelpFormatter
    cores = len(os.sched_getaffinity(0))
    parser = _Parser("", description=text, epilog=EPILOG, formatter_class=plain)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: under two minutes on two cores")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--device", help="cpu or cuda; default cuda if available")
    parser.add_argument("--threads", type=int, default=cores, help="CPU threads; default all cores")
    parser.add_argument("--isa", choices=ISAS, help="keep everything on a CPU to these instructions; default all")
    parser.add_argument(
        "--malloc", choices=("keep", "default"), default="keep",
        help="keep freed memory, as adapterkern's commands do, for every variant; or the C library's default",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="where to save; default bench/results for a whole run")
    parser.add_argument(
        "--append", action="store_true", help="add to the file --json, which must be of the same commit"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="repeat everything in so many processes, for an interval"
    )
    parser.add_argument("--baseline", metavar="VARIANT", help="denominator of the ratios; default eager under autocast")
    parser.add_argument("--peer-python", help="Python of an environment made from bench/peers/adapters.txt")
    args, others = parser.parse_known_args(argv)
    if others and args.parts in ALONE:
        return _alone(argv)
    unknown = [*others, *(p for p in args.parts if p not in PARTS)]
    if unknown:
        parser.error(f"expected parts of {', '.join(PARTS)}, got {' '.join(unknown)}")
    if args.processes < 1:
        parser.error(f"--processes: expected at least 1, got {args.processes}")
    if not 1 <= args.threads <= cores:
        parser.error(f"--threads: expected 1 to {cores}, the cores that this process may use, got {args.threads}")
    if args.processes > 1 and args.json is None:
        parser.error("--processes: expected --json FILE with it, got none")
    return _repeat(args, argv) if args.processes > 1 else _measure(args, parser)


def _alone(argv: list[str]) -> int:
    if argv[0] in ("traffic", "aot"):
        os.environ["TRITON_INTERPRET"] = str(int(argv[0] == "traffic"))  # before Triton is imported
    return importlib.import_module(f"bench.{argv[0]}").main(argv[1:]) or 0


def _repeat(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measure in several processes, and save what they found together."""
    from bench import engine, processes

    status, document = processes.measured(_without(argv, "--processes", "--json", "--append"), args.processes)
    if document is not None:
        before = engine.earlier_run(args.json, document["commit_info"].get("id")) if args.append else None
        engine.write(args.json, document, before)
        _show(args.json, args.baseline)
    return status


def _without(argv: Sequence[str], *options: str) -> list[str]:
    """The arguments without these options and their values (``--append`` has none)."""
    left, skip = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if skip or name in options:
            skip = not skip and name != "--append" and not equals
        else:
            left.append(argument)
    return left


def _show(path: Path, baseline: str | None) -> None:
    from bench import plots, report

    run = report.load(path)
    print(report.render(run, baseline))
    plots.draw(run, path.parent / "plots")
    print(f"{path}, plots in {path.parent / 'plots'}", file=sys.stderr)


def _measure(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    # Before torch is imported: a fixed number of threads, each bound to a core. Other processes get the list of cores,
    # since a child inherits the one core that its parent is bound to.
    os.environ["BENCH_CORES"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    os.environ["OMP_PROC_BIND"] = "true"
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")

    if args.isa is not None:
        os.environ["BENCH_ISA"] = args.isa
        os.environ.update(zip(CAPPED, ISAS[args.isa], strict=True))

    if args.malloc == "default":
        os.environ["BENCH_MALLOC"] = args.malloc

    import torch

    from adapterkern.cli.memory import keep_pages
    from bench import engine
    from bench.cases import COPY

    if args.malloc == "keep" and keep_pages():
        os.environ.update(dict.fromkeys(KEEP, str(1 << 30)))  # for peers, which are processes of their own
    torch.set_num_threads(args.threads)
    device = _device(args.device, parser)
    whole = not (args.parts or args.quick or args.only)
    path = args.json or engine.result_path(device, whole)
    options = engine.Options(
        tuple(args.parts or PARTS), device, args.quick, path, args.peer_python, args.only, args.append
    )
    try:
        run = engine.Engine(options)
    except ValueError as error:
        parser.error(str(error))
    options.plan = run.plan()
    rehearsed = args.quick or device.type != "cpu"  # then --only may be what has left nothing
    if options.parts == ("cost",) and not (options.plan or (args.only and rehearsed)):
        parser.error(f"cost: expected a GPU with room for a LLaMA-7B, or --quick for a rehearsal, got {device}")
    variants = {*(name for _, names in options.plan for name in names), *[COPY] * bool(options.plan)}
    if args.only and not options.plan:
        parser.error(f"--only: expected a part of a case's name, such as T=2048 or float32, got {args.only!r}")
    _check_baseline(args.baseline, variants, parser)
    status = run.run()
    if not path.exists():
        return status or 1
    _show(path, args.baseline)
    return status


def _device(asked: str | None, parser: argparse.ArgumentParser) -> "torch.device":
    import torch

    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    asked = asked or ("cuda" if there else "cpu")
    if asked not in ("cpu", *there, *["cuda"] * bool(there)):
        why = "" if there else ", since torch finds no CUDA device"
        parser.error(f"--device: expected {' or '.join(['cpu', *there])}{why}; got {asked}")
    return torch.device("cuda", torch.cuda.current_device()) if asked == "cuda" else torch.device(asked)


def _check_baseline(asked: str | None, variants: Iterable[str], parser: argparse.ArgumentParser) -> None:
    if asked is not None and asked not in (known := sorted(variants)):
        parser.error(f"--baseline: expected one of {', '.join(known) or 'no variants'}, got {asked!r}")


def _report(argv: list[str]) -> int:
    from bench import plots, report

    parser = _Parser("report")
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--baseline", metavar="VARIANT")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the first run's plots there")
    args = parser.parse_args(argv)

    def loaded(argument: str) -> "Run":
        try:
            return report.load(getattr(args, argument))
        except ValueError as error:
            parser.error(f"{argument}: {error}")

    run = loaded("run")
    if args.other is not None:
        if args.baseline is not None:
            parser.error(f"--baseline: has no effect beside a second run: expected none, got {args.baseline!r}")
        print(report.compare(run, loaded("other")))
    else:
        _check_baseline(args.baseline, {e.variant for entries in run.groups.values() for e in entries}, parser)
        print(report.render(run, args.baseline))
    if args.plots:
        plots.draw(run, args.plots)
    return 0


def _results(argv: list[str]) -> int:
    from adapterkern.files import replacing
    from bench import report

    parser = _Parser("results")
    parser.parse_args(argv)
    try:
        page = report.results_page(report.newest())
    except ValueError as error:
        parser.error(f"{report.RESULTS}: {error}")
    with replacing(report.PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(report.PAGE)
    return 0
