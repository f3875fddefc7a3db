"""Pictures of a saved run, as PNG and SVG.

The background is transparent and the ink a medium gray, so that a picture is readable on light and on dark pages.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from adapterkern.training.run.plot import INK, STYLE
from bench.cases import COPY
from bench.report import Entry, Run, quartiles

# a variant has the same color everywhere: ours is red, unknown ones take OTHERS in order
KNOWN = {
    "ours": "#e5484d", "ours x-free": "#f2908f", "ours + prefix cache": "#f2908f", "ours grouped": "#e5484d",
    "frozen backbone": "#9aa0a8", COPY: INK, "eager": "#3b82d6", "eager autocast": "#3b82d6",
    "eager adapters": "#3b82d6", "eager pure": "#5fb3c8", "torch.compile": "#27a376", "PEFT LoRA": "#e0861a",
    "AdapterHub adapters": "#9a7ae0", "clip + AdamW fused": "#3b82d6",
}  # fmt: skip
OTHERS = ("#e0861a", "#9a7ae0", "#d4569a", "#b59a1c", "#27a376", "#5fb3c8")
LARGER: Any = STYLE | {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "bench"}


def draw(run: Run, folder: Path) -> list[Path]:
    """Draw every picture that the run has figures for; returns the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(LARGER):
        for name, picture in PICTURES.items():
            figure = picture(run)
            if figure is None:
                continue
            figure.suptitle(_device(run), fontsize=9)
            for suffix in ("svg", "png"):
                figure.savefig(folder / f"{name}.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else {})
            written.append(folder / f"{name}.png")
    return written


def _device(run: Run) -> str:
    m = run.machine
    return f"{m['device']}" + ("" if m["cuda"] else f", {m['threads']} threads") + f", torch {m['versions']['torch']}"


def _cases(run: Run, part: str, **fixed: Any) -> list[tuple[dict[str, Any], list[Entry]]]:
    """The part's cases whose shape has these values, each with its valid entries."""
    found = []
    for (p, _), entries in run.groups.items():
        shape = entries[0].info["case"]["shape"]
        if p == part and all(shape[k] == v for k, v in fixed.items()):
            found.append((entries[0].info["case"], [e for e in entries if e.valid]))
    return found


def _colors(names: Iterable[str]) -> dict[str, str]:
    rest = iter(OTHERS)
    return {name: KNOWN.get(name) or next(rest) for name in names}


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 38)


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    return figure, list(axes)


def _bars(axis: Axes, entries: Sequence[Entry], values: Sequence[Sequence[float]], text: str) -> None:
    """A bar per entry; ``values`` are its length, or the whisker's low end, the length and the whisker's high end."""
    colors = _colors([e.variant for e in entries])
    for place, (e, (low, *_, high)) in enumerate(zip(entries, values, strict=True)):
        middle = values[place][len(values[place]) // 2]
        axis.barh(place, middle, color=colors[e.variant])
        axis.plot([low, high], [place, place], color=INK, linewidth=1.5)
        axis.annotate(f"  {middle:{text}}", (high, place), va="center", fontsize=9)
    axis.set_yticks(range(len(entries)), [e.variant for e in entries])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(v[-1] for v in values))


def _time_bars(run: Run, part: str, **fixed: Any) -> Figure | None:
    """Median times per case, with quartiles as whiskers and the copy of the floor's bytes as a line."""
    cases = _cases(run, part, **fixed)[:3]
    if not cases:
        return None
    figure, axes = _figure(len(cases), 5.2, 3.2)
    for axis, (case, entries) in zip(axes, cases, strict=True):
        shown = [e for e in entries if e.variant != COPY]
        slowest = max(e.median for e in shown)
        scale, unit = next(
            (s, u) for s, u, from_ in ((1, "s", 1), (1e3, "ms", 1e-3), (1e6, "µs", 0)) if slowest > from_
        )
        _bars(axis, shown, [[q * scale for q in quartiles(e.times)] for e in shown], ".3g")
        floor = next((e for e in entries if e.variant in (COPY, "frozen backbone")), None)
        if floor is not None:
            what = "copy of the floor's bytes" if floor.variant == COPY else floor.variant
            axis.axvline(floor.median * scale, color=INK, linestyle="--", linewidth=1.2, label=what)
            axis.legend(loc="lower right", bbox_to_anchor=(1, 1.0), fontsize=8)
        axis.set_xlabel(f"median time, {unit}")
        axis.set_title(_wrapped(case["name"]), fontsize=9, loc="left", pad=18)
    return figure


def adapter(run: Run) -> Figure | None:
    """The adapter's main shape."""
    main = _cases(run, "adapter")
    if not main:
        return None
    shape = {k: main[0][0]["shape"][k] for k in ("T", "d", "r", "dtype", "grouped")}
    return _time_bars(run, "adapter", **shape)


def scaling(run: Run) -> Figure | None:
    """Time against T and against r, both axes logarithmic."""
    cases = _cases(run, "adapter", grouped=False)
    if not cases:
        return None
    main = next((c["shape"] for c, _ in cases if c["shape"]["pass"] == "both"), cases[0][0]["shape"])
    passes = sorted({c["shape"]["pass"] for c, _ in cases}, key=["both", "forward", "backward"].index)
    series = []
    for key in ("T", "r"):
        for pass_ in passes:
            fixed = {k: main[k] for k in ("T", "d", "r", "dtype") if k != key}
            points = _cases(run, "adapter", **fixed, **{"pass": pass_, "grouped": False})
            points.sort(key=lambda p: p[0]["shape"][key])
            if len(points) > 1:
                series.append((key, pass_, fixed, points))
    if not series:
        return None
    names = list(dict.fromkeys(e.variant for *_, points in series for _, entries in points for e in entries))
    colors = _colors(names)
    figure, axes = _figure(len(series), 4.6, 3.8)
    for axis, (key, pass_, fixed, points) in zip(axes, series, strict=True):
        for name in names:
            line = [(c["shape"][key], e.median * 1e3) for c, entries in points for e in entries if e.variant == name]
            label = "copy of the floor's bytes" if name == COPY else name
            style = {"linestyle": "--"} if name == COPY else {"marker": "o", "markersize": 4}
            if line:
                axis.plot(*zip(*line, strict=True), color=colors[name], label=label, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([c["shape"][key] for c, _ in points], [str(c["shape"][key]) for c, _ in points])
        axis.set_xlabel({"T": "rows T", "r": "adapter_dim r"}[key])
        axis.set_ylabel("median time, ms")
        axis.set_title(f"{pass_}, " + ", ".join(f"{k}={v}" for k, v in fixed.items()), fontsize=9, loc="left")
    axes[0].legend(fontsize=8)
    return figure


def roofline(run: Run) -> Figure | None:
    """FLOPs per second over FLOPs per byte, under the roofs of a copy and of a large product."""
    cases = _cases(run, "adapter", grouped=False, dtype="bfloat16")
    product = run.machine["roofs"]["gemm_flops"]
    if not cases or product is None:
        return None
    figure, (axis,) = _figure(1, 6.4, 4.2)
    names = list(dict.fromkeys(e.variant for _, entries in cases for e in entries if e.variant != COPY))
    colors = _colors(names)
    intensities = [c["flops"] / c["floor_bytes"] for c, _ in cases]
    bandwidth = max(c["floor_bytes"] / e.median for c, entries in cases for e in entries if e.variant == COPY)
    ridge = product / bandwidth
    ends = [min(ridge, *intensities) / 2, ridge, max(ridge, *intensities) * 2]
    roof = f"copy {bandwidth / 1e9:.3g} GB/s, bf16 product {product / 1e9:.3g} GFLOP/s"
    axis.plot(ends, [min(bandwidth * i, product) / 1e9 for i in ends], color=INK, linestyle="--", label=roof)
    for name in names:
        points = [
            (c["flops"] / c["floor_bytes"], c["flops"] / e.median / 1e9)
            for c, entries in cases
            for e in entries
            if e.variant == name
        ]
        axis.plot(*zip(*points, strict=True), "o", markersize=5, alpha=0.85, color=colors[name], label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlabel("arithmetic intensity, FLOP per byte of the floor")
    axis.set_ylabel("GFLOP/s")
    axis.set_title("all bf16 adapter cases, each at its own intensity", fontsize=9, loc="left")
    axis.legend(fontsize=8)
    return figure


def memory(run: Run) -> Figure | None:
    """What is kept for the backward, by one adapter and by a training step."""
    counted = run.data["tables"].get("memory")
    steps = _cases(run, "step")[:2]
    panels = (counted is not None) + len(steps)
    if not panels:
        return None
    figure, axes = _figure(panels, 5.2, 3.2)
    if counted is not None:
        axis = axes.pop(0)
        rows = [Entry(r["variant"], [], r) for r in counted["rows"]]
        _bars(axis, rows, [[e.info["kept_units"]] * 2 for e in rows], ".2f")
        axis.set_xlabel("kept for the backward, units of x")
        axis.set_title(_wrapped(f"one adapter, {counted['case']}"), fontsize=9, loc="left")
    for axis, (case, entries) in zip(axes, steps, strict=True):
        _bars(axis, entries, [[e.info["kept_bytes"] / 2**20] * 2 for e in entries], ".0f")
        axis.set_xlabel("kept for the backward, MiB")
        axis.set_title(_wrapped(case["name"]), fontsize=9, loc="left")
    return figure


PICTURES: dict[str, Callable[[Run], Figure | None]] = {
    "adapter": adapter,
    "scaling": scaling,
    "roofline": roofline,
    "optimizer": lambda run: _time_bars(run, "optimizer"),
    "step": lambda run: _time_bars(run, "step"),
    "memory": memory,
}
