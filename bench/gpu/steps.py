"""The steps of the three calls, in order, with their time limits."""

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import before
from bench.gpu import carried
from bench.gpu.runner import Command, Step
from bench.sweep import CONTEXT_LOST
from bench.tiling import TABLES, parse

SMALL = ("-T", "64", "-d", "128", "-r", "16", "--device", "cpu")
# the tests without which no figure counts
CORRECT = "test_error_table or (test_shapes and bfloat16) or two_runs or side_stream or cuda_graph or beyond_int32"
SANITIZED = "test_more_tensors_and_groups or test_activations or test_mixed_adapters or (test_shapes and (577 or 3072))"
FEW = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}  # in each of eight processes
CLUSTERS = {"ADAPTERKERN_KERNELS": "cluster"}
PATIENCE = 4  # factor for a rehearsal's limits: its cores are shared
SECTIONS = ("WarpStateStats", "SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy")


@dataclasses.dataclass(frozen=True)
class Call:
    """The options of the command line."""

    work: Path
    carried: Path
    rehearse: bool
    ab: Sequence[str] = ()  # TABLE=TILES, all in one process; NAME=VALUE of the environment, one process each

    def __post_init__(self) -> None:
        for pair in self.ab:
            if pair in self.tiles:
                parse(pair)
            elif not _is_read(pair):
                expected = f"one of {', '.join(TABLES)} or an environment variable that something reads, and =VALUE"
                raise ValueError(f"--ab: expected {expected}, got {pair!r}")

    @property
    def tiles(self) -> list[str]:
        return [pair for pair in self.ab if pair.partition("=")[0] in TABLES]

    @property
    def settings(self) -> list[str]:
        return [pair for pair in self.ab if pair not in self.tiles]

    def module(self, name: str, *arguments: object, rehearsed: bool = True) -> list[str]:
        """``python -m name``, with --rehearse in a rehearsal."""
        more = ["--rehearse"] if self.rehearse and rehearsed else []
        return [sys.executable, "-m", name, *map(str, arguments), *more]

    def pytest(self, *arguments: str) -> list[str]:
        """pytest without the project's options, in eight processes if xdist is installed."""
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not self.rehearse else []
        return [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *workers, *arguments]


def _is_read(pair: str) -> bool:
    """Whether NAME=VALUE sets a variable of Triton, torch or CUDA, or one that the package's sources name."""
    name, given, _ = pair.partition("=")
    if not given or name.startswith(("TRITON_", "CUDA_", "PYTORCH_", "TORCH")):
        return bool(given)
    sources = (before.ROOT / "adapterkern").rglob("*.py")
    return re.fullmatch(r"ADAPTERKERN_\w+", name) is not None and any(f'"{name}"' in p.read_text() for p in sources)


def first(call: Call) -> list[Step]:
    """Correctness, the main figures, kernel times and profile, a training step."""
    tests = ["tests/ops/test_gpu.py", "tests/optim/test_cuda.py"]
    by_clusters = "tests/ops/test_gpu_clusters.py"
    generations: list[dict[str, str]] = [{}] if call.rehearse else [{}, CLUSTERS]
    return [
        _probe(call),
        _build_step(call),
        _compile(call, "first"),
        Step("correctness", 50, lambda: [
            Command(call.pytest(tests[0], by_clusters, "-k", f"test_gpu_clusters or {CORRECT}"), FEW),
            Command(call.module("bench.gpu.check")),
        ]),
        _timed(call, "adapter", 100),
        _timed(call, "optimizer", 35),
        Step("kernels", 25, lambda: [Command(_profiled(call, "--kernels"), env) for env in generations]),
        Step("profile", 60, lambda: [Command(["ncu", *_ncu(), *_profiled(call)], env) for env in generations],
             tool="ncu"),
        Step("tests", 60, lambda: [Command(call.pytest(*tests, "-k", f"not (test_gpu and ({CORRECT}))"), FEW)]),
        _timed(call, "step", 110),
    ]  # fmt: skip


def second(call: Call) -> list[Step]:
    """Block sizes, the A/B chosen after the first call, memory errors."""
    return [
        _probe(call),
        _compile(call, "second"),
        Step("sweep", 70, lambda: [Command(_sweep(call), again_on=CONTEXT_LOST)]),
        Step("ab", 70, lambda: _ab(call), optional=True, why_not="no --ab was given"),
        _sanitizer(call, "memcheck", 60),
        *([] if call.rehearse else [_sanitizer(call, "synccheck", 30, optional=True)]),
        _sanitizer(call, "racecheck", 45, optional=True),
    ]


def cost(call: Call) -> list[Step]:
    """What a 7B costs, beside LitGPT's published figures."""
    return [_probe(call), _build_step(call), _compile(call, "cost"), _timed(call, "cost", 240)]


def _probe(call: Call) -> Step:
    argv = call.module("bench.gpu.probe", "--carried", call.carried, "--json", call.work / "probe.json")
    return Step("probe", 40, lambda: [Command(argv)], 5, vital=True)  # takes 10 s, or as long as torch's first import


def _build_step(call: Call) -> Step:
    why_not = "adapterkern._C loads, or this is no GPU"
    return Step("build", 60, lambda: _build(call), 30, optional=True, why_not=why_not)


def _build(call: Call) -> list[Command]:
    if call.rehearse or carried.extension_loads():
        return []
    return [Command([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], {"ADAPTERKERN_CUDA_ARCH": "90"})]


def _compile(call: Call, name: str) -> Step:
    """Compile what the cache lacks. A rehearsal compiles one variant and runs the kernels in the interpreter."""
    argv = call.module("bench.gpu.warm", name, "--json", call.work / "compile.json", rehearsed=False)
    argv += ["--only", "1"] if call.rehearse else []
    argv += ["--ab", *call.tiles] if call.tiles else []
    return Step("compile", 60, lambda: [Command(argv, {"TRITON_INTERPRET": "0"})])


def _timed(call: Call, part: str, limit: float) -> Step:
    argv = call.module("bench.gpu.measured", part, "--json", call.work / f"{part}.json", "--seconds", "{seconds}")
    return Step(part, limit, lambda: [Command(argv)], 30)


def _profiled(call: Call, *arguments: str) -> list[str]:
    small = SMALL if call.rehearse else ()
    return call.module("bench", "profiled", *arguments, *small, rehearsed=False)


def _ncu() -> list[str]:
    options = ["--profile-from-start", "off", "--clock-control", "none"]
    return [*options, *(o for section in SECTIONS for o in ("--section", section))]


def _sweep(call: Call) -> list[str]:
    small = [*SMALL, "--rounds", "1", "--most", "2"] if call.rehearse else []
    return call.module("bench", "sweep", "--json", call.work / "sweep.json", *small, rehearsed=False)


def _ab(call: Call) -> list[Command]:
    """The tiles in one process; then each setting in its own process, to be compared with the first."""

    def measured(name: str) -> list[str]:
        tiles = ["--ab", *call.tiles] if call.tiles else []
        return call.module(
            "bench.gpu.measured", "ab", "--json", call.work / f"{name}.json", "--seconds", "{seconds}", *tiles
        )

    if not call.ab:
        return []
    return [
        Command(measured("ab")),
        *(Command(measured(f"ab-{pair.replace('/', '_')}"), dict([pair.split("=", 1)])) for pair in call.settings),
    ]


def _sanitizer(call: Call, tool: str, limit: float, optional: bool = False) -> Step:
    """Small sizes: the extension, every kernel of the adapter, a mixed batch."""
    # torch's start-up looks for functions that the driver lacks, which is no error; 99 differs from pytest's statuses
    argv = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--launch-timeout", "0"]
    argv += ["--report-api-errors", "no", sys.executable, "-m", "pytest", "-q", "-o", "addopts="]
    argv += [
        "-p",
        "no:cacheprovider",
        "tests/ops/test_gpu_clusters.py",
        "tests/optim/test_cuda.py",
        "tests/ops/test_gpu.py",
    ]
    argv += ["-k", SANITIZED]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, limit, lambda: [Command(argv, env)], 20, "compute-sanitizer", optional)
