"""What ``adapterkern budget --gpus`` prints: a step on several GPUs, its memory, its exchange, and what limits it."""

import argparse
import contextlib
from typing import NamedTuple

from adapterkern import checks
from adapterkern.cli.options import integer, number
from adapterkern.model.memory import Training
from adapterkern.model.scale import DDP, ENGINES, Exchanged, PerGpu, Scale
from adapterkern.model.speed import PEAK, Cluster, Step, step

OPTIONS = ("gpus_per_node", "link", "network", "flops", "utilization")  # which need --gpus
MOST_GPUS = 1 << 20
_HIDDEN = 0.1  # the share of a step from which on communication is what limits it
_CACHED = "cache"


def add_scale_options(group: argparse._ArgumentGroup) -> None:
    """Those of ``OPTIONS``, and ``--gpus``."""
    default = Cluster(1)
    group.add_argument(
        "--gpus", type=_counts, metavar="N,N,...", help="how many; also what they exchange, beside full fine-tuning"
    )
    group.add_argument(
        "--gpus-per-node", type=integer, default=default.per_node, metavar="N", help="with --gpus [%(default)s]"
    )
    text = "a GPU to the others of its node, one way [450GB/s]"
    group.add_argument("--link", type=_rate, default=int(default.link), metavar="RATE", help=text)
    text = "a node to the others, one way, all its adapters together [400GB/s]"
    group.add_argument("--network", type=_rate, default=int(default.network), metavar="RATE", help=text)
    peaks = ", ".join(f"{peak / 1e12:g}e12 in {dtype}" for dtype, peak in PEAK.items())
    text = f"operations per second of a GPU at its peak [an H100's: {peaks}]"
    group.add_argument("--flops", type=number, metavar="X", help=text)
    text = "the share of --flops that a step's products reach, assumed [%(default)s]"
    group.add_argument("--utilization", type=number, default=default.utilization, metavar="X", help=text)


def _counts(text: str) -> list[int]:
    return [integer(part) for part in text.split(",")]


def _rate(text: str) -> int:
    from adapterkern.cli.budget import size

    with contextlib.suppress(argparse.ArgumentTypeError):
        if text.endswith("/s"):
            return size(text.removesuffix("/s"))
    raise argparse.ArgumentTypeError(f"expected bytes per second such as 400GB/s, got {text!r}")


class _Row(NamedTuple):
    """A line of both tables."""

    run: str  # "adapter" or "full"
    engine: str
    taken: tuple[PerGpu, PerGpu]  # without and with --checkpoint-activations
    checkpointed: bool  # needed
    rows: int  # that fit
    exchanged: Exchanged
    step: Step


def clusters(arguments: argparse.Namespace) -> list[Cluster]:
    """Those of ``--gpus``. Raises ``ValueError`` that names the option."""
    checks.integer("--gpus-per-node", arguments.gpus_per_node, 1)
    for option in ("link", "network"):
        if getattr(arguments, option) < 1:
            raise ValueError(f"--{option}: expected a rate > 0, got 0")
    if arguments.flops is not None:
        checks.number("--flops", arguments.flops, "(0, inf)")
    checks.number("--utilization", arguments.utilization, "(0, 1]")
    if arguments.dtype not in PEAK:
        raise ValueError("--dtype: expected bf16 or fp32 with --gpus, got fp16, which neither FSDP2 nor ZeRO-3 trains")
    if len(set(arguments.gpus)) < len(arguments.gpus):
        raise ValueError(f"--gpus: expected each number once, got {','.join(map(str, arguments.gpus))}")
    found = []
    for gpus in arguments.gpus:
        checks.integer("--gpus", gpus, 1, MOST_GPUS)
        if gpus > arguments.gpus_per_node and gpus % arguments.gpus_per_node:
            raise ValueError(f"--gpus: expected a multiple of --gpus-per-node {arguments.gpus_per_node}, got {gpus}")
        cluster = Cluster(gpus, *(getattr(arguments, name) for name in OPTIONS))
        found.append(cluster if arguments.flops else cluster._replace(flops=PEAK[arguments.dtype]))
    return found


def show_scale(arguments: argparse.Namespace, training: Training, task: str, rows: int) -> None:
    """Print memory and steps of ``rows`` rows per GPU. Raises ``ValueError`` if none of them fits."""
    found = [(cluster, _rows(training, cluster, rows, arguments.memory)) for cluster in clusters(arguments)]
    adapter, whole = Scale(training, rows), Scale(training, rows, full=True)
    link, network = (f"{rate / 1e9:g} GB/s" for rate in (arguments.link, arguments.network))
    print(
        f"{arguments.model_config}: {whole.trained_params:,} parameters in {training.dtype}, "
        f"{adapter.trained_params:,} in adapters\n"
        f"{task}, --batch-size {rows}, --max-length {training.length}: a forward of each GPU per step\n"
        f"memory {gigabytes(arguments.memory)} GB, link {link}, nodes of {arguments.gpus_per_node}, network {network}\n"
    )
    names = " ".join(f"{name:>7}" for name in ("weights", "trained", "buffers", "kept", "ckpt", "work", "total"))
    width = max(4, len(str(max(arguments.gpus))))
    head = f"{'GPUs':>{width}} run     engine"
    print(f"GB of a GPU; c: --checkpoint-activations, without which it does not fit\n{head} {names} rows")
    for cluster, lines in found:
        for line in lines:
            if line.engine != _CACHED:
                print(f"{cluster.gpus:{width}} {_memory(line)}")
    speed = f"{found[0][0].flops / 1e12:g} TFLOP/s · {arguments.utilization:.0%}"
    names = f"{'gathered':>8} {'reduced':>8} {'compute':>9} {'exposed':>9} {'tokens/s':>14} limit"
    print(f"\nper step, derived at {speed}; gathered, reduced: GB received\n{head} {names}")
    for cluster, lines in found:
        for line in lines:
            print(f"{cluster.gpus:{width}} {_step(cluster, line, rows)}")
    if any(line.engine == _CACHED for _, lines in found for line in lines):
        print(
            f"{_CACHED}: DDP with the prefix cache, from the 2nd epoch on: without {adapter.cached_layers} of "
            f"{training.shape.num_layers} layers,\nfor {adapter.cached_bytes:,} bytes per token of the host's memory, "
            "whose transfer is not counted"
        )
    if not any(line.rows >= rows for _, lines in found for line in lines):
        least, gpus = min((t.total, cluster.gpus) for cluster, lines in found for line in lines for t in line.taken)
        raise ValueError(
            f"--memory: expected at least {gigabytes(least)} GB for --batch-size {rows} with --gpus {gpus}, got "
            f"{gigabytes(arguments.memory)} GB"
        )


def _rows(training: Training, cluster: Cluster, rows: int, memory: int) -> list[_Row]:
    found = []
    for full in (False, True):
        engines = [DDP] if cluster.gpus == 1 else list(ENGINES)
        plain, checkpointed = (Scale(training, rows, full, again) for again in (False, True))
        if not full and plain.cached_layers:
            engines.insert(1, _CACHED)
        for name in engines:
            engine = DDP if name == _CACHED else name
            taken = plain.memory(engine, cluster.gpus), checkpointed.memory(engine, cluster.gpus)
            again = taken[0].total > memory
            chosen = (checkpointed if again else plain)._replace(cached=name == _CACHED)
            most = chosen.most_rows(memory, engine, cluster.gpus)
            label = "one" if cluster.gpus == 1 and name == DDP else name
            exchanged = chosen.exchanged(engine, cluster.gpus)
            run = "full" if full else "adapter"
            found.append(_Row(run, label, taken, again, most, exchanged, step(chosen, engine, cluster)))
    return found


def _memory(line: _Row) -> str:
    plain, checkpointed = line.taken
    chosen = checkpointed if line.checkpointed else plain
    terms = (chosen.weights, chosen.trained, chosen.buffers, plain.kept, checkpointed.kept, chosen.workspace)
    shown = " ".join(f"{gigabytes(term):>7}" for term in (*terms, chosen.total))
    return f"{line.run:7} {line.engine:6} {shown}{'c' if line.checkpointed else ' '}{line.rows:4}"


def _step(cluster: Cluster, line: _Row, rows: int) -> str:
    took = line.step
    received = " ".join(f"{count / 1e9:8.3f}" for count in line.exchanged)
    head = f"{line.run:7} {line.engine:6} {received}"
    if line.rows < rows:
        return f"{head} {'-':>9} {'-':>9} {'-':>14} memory"
    limit = "compute"
    if took.exposed > _HIDDEN * (took.compute + took.exposed):
        across = cluster.gpus > cluster.per_node and cluster.bandwidth == cluster.network
        limit = "network" if across else "link"
    return f"{head} {_ms(took.compute)} {_ms(took.exposed)} {took.tokens_per_second:14,.0f} {limit}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:6,.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:6.1f} ms"


def gigabytes(count: int) -> str:
    """``count`` bytes in GB, two decimals."""
    return f"{count / 1e9:.2f}"
