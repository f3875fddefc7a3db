"""What a step of each method costs: time, interleaved with the others; memory; bytes on disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save

from bench.cases import Case, Variant
from bench.measure import interleave, kept_for_backward, paired_ratio, peak_bytes, quartiles
from experiments.common import CPU, record, show
from experiments.quality import plan
from experiments.quality.methods import METHODS
from experiments.quality.report import NAMES, markdown
from experiments.quality.training import BATCH, World, begin, optimizer_of

NAME = "costs.json"
BASE = "lora"


def measure(folder: Path, rounds: int, seconds: float) -> None:
    """Time a step of each method on a batch of R8, in turns; write ``costs.json``."""
    world = World()
    variants = [_variant(world, method) for method in METHODS]
    times = interleave(Case("quality", "", {}, wall=True), variants, CPU, rounds, seconds)
    measured = []
    for variant in variants:
        low, middle, high = quartiles(times[variant.name])
        taken = {"lower_quartile": low, "median": middle, "upper_quartile": high}
        ratio = paired_ratio(times[variant.name], times[BASE])
        measured.append({"method": variant.name, **variant.info, "seconds": taken, f"times_of_{BASE}": ratio})
        show(measured[-1])
    tokens = int(world.set("r8").train.lengths[:BATCH].max())
    record(
        folder / NAME, texts=BATCH, tokens=tokens, budget=plan.LOW, rounds=min(map(len, times.values())), rows=measured
    )


def _variant(world: World, method: str) -> Variant:
    spec = next(group.at for group in plan.parts()["r8"] if group.at.method == method)
    model, texts = begin(world, spec), world.texts(spec.data, "train", spec.layers, spec.first)
    applied = model.applied
    optimizer = optimizer_of(applied, model.head, dataclasses.replace(spec, lr=1e-4, head_lr=1e-4))
    rows = np.arange(BATCH)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(texts, rows).backward()
        optimizer.step()

    frozen = [p for p in applied.suffix.parameters() if not p.requires_grad]
    kept = kept_for_backward(
        lambda: model.loss(texts, rows), [*frozen, *applied.parameters.values(), *model.head.parameters()]
    )["kept_bytes"]
    step()  # which makes the optimizer's state
    optimizer.zero_grad(set_to_none=True)  # so that gradients are among what a step allocates
    info: dict[str, Any] = {
        "parameters": applied.size,
        "peak_bytes": peak_bytes(step, CPU),
        "kept_bytes": kept,
        "state_bytes": 16 * applied.size,  # values, gradients and two moments
        "saved_bytes": len(save({name: p.detach().contiguous() for name, p in applied.parameters.items()})),
    }
    return Variant(method, run=step, info=info)


def table(path: Path) -> str:
    """``costs.json`` in Markdown."""
    lines = [["", "parameters", "ms per step", f"times {BASE}", "peak, MB", "kept, MB"]]
    lines[0] += ["trained with its state, MB", "file, MB"]
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        names = "peak_bytes", "kept_bytes", "state_bytes", "saved_bytes"
        bytes_ = (f"{row[name] / 1e6:.2f}" if name in row else "" for name in names)
        times = f"{1e3 * row['seconds']['median']:.0f}", f"{row[f'times_of_{BASE}']:.2f}"
        lines.append([NAMES[row["method"]], f"{row['parameters']:,}", *times, *bytes_])
    return markdown(lines)
