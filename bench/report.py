"""Saved runs as tables: one run, two compared, and README's section.

A ratio is the median over rounds of the ratio within a round. No speed is shown for a variant over its error budget.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cases import COPY
from bench.measure import paired_ratio, quartiles
from bench.published import Published

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS.parent / "RESULTS.md"
HEAD = """\
Written by `python -m bench results` from the newest run on each device; `python -m bench` makes one. Medians of
variants that take turns in one process; of several processes, the median and the range of theirs. *Error ≤ budget* is
the relative error against fp64, and the largest one allowed. *× NAME* is the time divided by NAME's. *GB/s of floor*:
the bytes that any implementation must read and write, divided by the time. *% of copy*: the time of a plain copy of
as many bytes, divided by the variant's. *Launches*: kernels, copies and fills that one call starts on a GPU. *Kept,
units of x*: the memory that waits for the backward, divided by the size of x. *ours x-free* keeps its output in place
of x. *ours bare* and *ours before* are the kernels alone, of this and of an earlier commit."""
NO_GPU = "**No GPU has been measured yet.**"
BUSY = 0.5  # cores that others use before a run (or, in older files, load) above which its figures are flagged
# the denominator of a case's ratios, unless --baseline names another: the first of these that it has
BASELINES = ("eager autocast", "eager", "loop over adapters", "frozen backbone", "clip + AdamW fused")
NO_RIVALS = (COPY, "frozen backbone")  # they do less work than the others
DASH = "–"
LONGEST = 1304  # tokens of a text in LitGPT's data


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variant of one case: its times in seconds, one per round, and its figures."""

    variant: str
    times: list[float]
    info: dict[str, Any]

    @property
    def valid(self) -> bool:
        error, budget = self.info.get("error"), self.info.get("budget")
        return error is None or budget is None or error <= budget

    @property
    def median(self) -> float:
        return quartiles(self.times)[1]

    def ratio(self, to: "Entry") -> tuple[float, ...]:
        """Of the times to another's, paired; of several processes the median of theirs, the least and the greatest."""
        counts = self.info.get("processes") or [len(self.times)]
        ends = list(itertools.accumulate(counts))
        parts = [slice(end - n, end) for n, end in zip(counts, ends, strict=True)]
        ratios = [paired_ratio(self.times[part], to.times[part]) for part in parts]
        return (ratios[0],) if len(ratios) == 1 else (statistics.median(ratios), min(ratios), max(ratios))


@dataclasses.dataclass(frozen=True)
class Run:
    """A saved run."""

    path: Path
    data: dict[str, Any]

    @property
    def machine(self) -> dict[str, Any]:
        info: dict[str, Any] = self.data["machine_info"]
        return info

    @property
    def groups(self) -> dict[tuple[str, str], list[Entry]]:
        """(part, case) → its variants, in the planned order."""
        found: dict[tuple[str, str], list[Entry]] = {}
        for b in self.data["benchmarks"]:
            info = b["extra_info"]
            key = info["case"]["part"], info["case"]["name"]
            found.setdefault(key, []).append(Entry(info["variant"], b["stats"]["data"], info))
        return found

    @property
    def title(self) -> str:
        m, versions = self.machine, self.machine["versions"]
        shown = ", ".join(f"{name} {v}" for name, v in versions.items() if v)
        where = m["device"] if m["cuda"] else f"{m['device']}, {m['threads']} thread{'s' if m['threads'] != 1 else ''}"
        commit = str(self.data["commit_info"].get("id", "unknown"))[:7]
        quick = ", quick" if m["quick"] else ""
        malloc = f"; malloc {m['malloc']}" if m.get("malloc", "default") != "default" else ""
        busy = ""
        if (cores := m.get("busy_cores", 0)) > BUSY:
            busy = f"; **the machine was busy: others used {cores:.1f} cores**"
        elif (load := m.get("load_before", 0)) > BUSY:  # the load average, in older files
            busy = f"; **the machine was busy: load {load:.1f}**"
        return f"{where}{malloc}; {shown}; commit {commit}, {self.data['datetime'][:10]}{quick}{busy}"


_FIELDS = ("commit_info", "benchmarks", "datetime", "tables", "missing", "machine_info")
_OF_MACHINE = ("device", "threads", "cuda", "quick", "versions")


def load(path: Path) -> Run:
    """The run saved at ``path``. Raises ``ValueError`` if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for name in _FIELDS:
            data[name]
        for name in _OF_MACHINE:
            data["machine_info"][name]
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = getattr(error, "strerror", None) or ("no JSON" if isinstance(error, ValueError) else f"no {name}")
        raise ValueError(f"expected a saved run of the bench, got {path}: {why}") from None
    return Run(path, data)


def newest() -> list[Run]:
    """The newest run of each device."""
    runs: dict[str, Run] = {}
    for path in sorted(RESULTS.glob("*/????-??-??-*.json")):
        run = load(path)
        known = runs.get(path.parent.name)
        if known is None or run.data["datetime"] > known.data["datetime"]:
            runs[path.parent.name] = run
    return list(runs.values())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    rows = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def filled_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns that no row fills."""
    kept = [i for i in range(len(head)) if any(row[i] != DASH for row in rows)]
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def baseline_of(entries: Sequence[Entry], wanted: str | None) -> Entry:
    """The entry named ``wanted``, or the first of BASELINES that there is, or the first entry."""
    by_name = {e.variant: e for e in entries}
    for name in (wanted, *BASELINES):
        if name in by_name:
            return by_name[name]
    return entries[0]


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale or unit == "µs":
            return f"{value / scale:.3g} {unit}" if value < 100 * scale else f"{value / scale:.0f} {unit}"
    raise AssertionError


def _times(e: Entry) -> list[str]:
    if not e.valid:
        return ["error over budget", DASH]
    low, middle, high = quartiles(e.times)
    return [seconds(middle), f"±{100 * (high - low) / 2 / middle:.0f} %"]


def _mib(nbytes: float | None) -> str:
    return DASH if nbytes is None else f"{nbytes / 2**20:.1f}"


def _error(e: Entry) -> str:
    return (
        DASH
        if e.info["error"] is None
        else f"{e.info['error']:.1e} ≤ {e.info['budget']:.1e}".replace("≤", "≤" if e.valid else ">")
    )


def kernel_table(entries: Sequence[Entry], baseline: str | None) -> str:
    """The table of one case of the adapter or optimizer part."""
    base = baseline_of(entries, baseline)
    floor = next((e for e in entries if e.variant == COPY), None)
    rows = []
    for e in entries:
        ratio = gbs = of_copy = DASH
        if e.valid:
            middle, *ends = e.ratio(base)
            ratio = f"{middle:.2f}" + (f" ({ends[0]:.2f}–{ends[1]:.2f})" if ends else "")
            gbs = f"{e.info['case']['floor_bytes'] / e.median / 1e9:.1f}"
            of_copy = f"{100 * paired_ratio(floor.times, e.times):.0f}" if floor else DASH
        launches = e.info.get("launches")
        more = [_mib(e.info.get("peak_bytes")), DASH if launches is None else str(launches), _error(e)]
        rows.append([e.variant, *_times(e), ratio, gbs, of_copy, *more])
    head = ["", "median", "spread", f"× {base.variant}", "GB/s of floor", "% of copy", "peak MiB", "launches"]
    return filled_table([*head, "error ≤ budget"], rows)


def step_table(entries: Sequence[Entry], baseline: str | None) -> str:
    """The table of one case of the step part; the tax is over the frozen backbone unless ``baseline`` is given."""
    base = baseline_of(entries, baseline)
    rows = []
    for e in entries:
        tax = rate = DASH
        if e.valid:
            middle, *ends = (100 * (ratio - 1) for ratio in e.ratio(base))
            tax = f"{middle:+.1f} %" + (f" ({ends[0]:+.1f} to {ends[1]:+.1f})" if ends else "")
            rate = f"{e.info['tokens'] / e.median:.0f}"
        trainable = f"{e.info['trainable']:,}"
        more = [trainable, _mib(e.info["kept_bytes"]), _mib(e.info.get("peak_bytes")), _error(e)]
        rows.append([e.variant, *_times(e), rate, tax, *more])
    head = ["", "step", "spread", "tokens/s", f"over {base.variant}", "trainable", "kept for backward MiB", "peak MiB"]
    return table([*head, "difference ≤ budget"], rows)


def minutes(e: Entry) -> float:
    """Per 1,000 iterations, each with its share of an update that is made after several."""
    return 1000 / 60 * (e.median + e.info["update_seconds"] / e.info["case"]["shape"]["accumulate"])


def cost_table(entries: Sequence[Entry], baseline: str | None) -> str:
    """The table of one case of the cost part, with LitGPT's rows of the same micro-batch.

    Of these it has the memory beside the longest texts and the minutes beside short ones, which they are of.
    """
    base = baseline_of(entries, baseline)
    rows = []
    for e in entries:
        peak = f"{(e.info['model_bytes'] + e.info['peak_bytes']) / 1e9:.2f}"
        over = f"{100 * (e.ratio(base)[0] - 1):+.1f} %"
        rows.append([e.variant, f"{e.info['trainable']:,}", peak, f"{minutes(e):.2f}", over, *_times(e)])
    longest = base.info["case"]["shape"]["length"] >= LONGEST
    for row in (Published(**fields) for fields in base.info["published"]):
        gb = "out of memory" if row.gb is None else f"{row.gb:.2f}"
        per_1000 = DASH if row.minutes is None else f"{row.minutes:.2f}"
        shown = [gb, DASH] if longest else [DASH, per_1000]
        rows.append([row.title, f"{row.trainable:,}", *shown, *[DASH] * 3])
    return table(["", "trainable", "peak GB", "min per 1,000", f"over {base.variant}", "iteration", "spread"], rows)


def memory_table(counted: dict[str, Any]) -> str:
    rows = [[r["variant"], f"{r['kept_units']:.2f}", f"{r['own_units']:.2f}", _mib(r["own_bytes"])]
            for r in counted["rows"]]  # fmt: skip
    return table([counted["case"], "kept, units of x", "without x and y", "MiB"], rows)


def traffic_table(counted: dict[str, Any], fixed: bool = False) -> str:
    """``fixed`` adds the column of what does not grow with T."""
    kinds = ["activations", "weights", "rows", *["fixed"] * fixed]
    rows = []
    for r in counted["rows"]:
        floor = {"forward": 2, "backward": 3}.get(next((w for w in r["name"].split() if w.endswith("ward")), ""))
        over = f"{r['activations'] / floor:.2f}" if floor else DASH
        rows.append([r["name"], *(f"{r[k]:.2f}" for k in kinds), str(r["launches"]), over])
    shape = f"T={counted['T']}, d={counted['d']}, r={counted['r']}, bf16"
    return table([shape, *kinds, "launches", "× floor"], rows)


def aot_table(counted: dict[str, Any]) -> str:
    keys = ("registers", "stack", "shared", "warps", "wgmma", "mma", "cp_async")
    head = [f"triton {counted['triton']}", "r", "d", "sm", *(k.replace("_", ".") for k in keys)]
    return table(head, [[r["kernel"], *(str(r[k]) for k in ("r", "d", "sm", *keys))] for r in counted["rows"]])


COUNTED = {"memory": memory_table, "traffic": traffic_table, "aot": aot_table}
TITLES = {
    "adapter": "The adapter",
    "optimizer": "Clipped AdamW",
    "step": "A training step",
    "cost": "What a 7B costs",
    "memory": "Kept for the backward by one adapter",
    "traffic": "Memory traffic, in units of T·d·(bytes per element)",
    "aot": "Compiled ahead of time, bf16",
}


def timed_table(part: str, entries: Sequence[Entry], baseline: str | None = None) -> str:
    """The table of one case."""
    return {"step": step_table, "cost": cost_table}.get(part, kernel_table)(entries, baseline)


def contests(run: Run) -> Iterator[tuple[str, str, Entry, Entry]]:
    """Part, case, the best of ours and the best of the others, for each case that has both."""
    for (part, case), entries in run.groups.items():
        timed = [e for e in entries if e.valid and e.variant not in NO_RIVALS]
        ours = [e for e in timed if e.variant.startswith("ours")]
        others = [e for e in timed if e not in ours]
        if ours and others:
            best, rival = (min(group, key=lambda e: e.median) for group in (ours, others))
            yield part, case, best, rival


def losses(run: Run) -> list[str]:
    """The cases in which something else is faster than the best of ours, by more than 2 %."""
    return [
        f"{part}, {case}: {best.variant} takes {ratio:.2f} times as long as {rival.variant}"
        for part, case, best, rival in contests(run)
        if (ratio := best.ratio(rival)[0]) > 1.02
    ]


def contest_table(run: Run) -> str:
    """Every case of the adapter: the best of ours against the best of the others."""
    rows = [
        [case, best.variant, seconds(best.median), rival.variant, seconds(rival.median), f"{best.ratio(rival)[0]:.2f}"]
        for part, case, best, rival in contests(run)
        if part == "adapter"
    ]
    return table(["", "best of ours", "median", "best of the others", "median", "×"], rows)


def _lost(run: Run) -> list[str]:
    found = losses(run)
    return ["Where something else is faster:\n\n" + "\n".join(f"- {line}" for line in found)] if found else []


def render(run: Run, baseline: str | None = None) -> str:
    """All of a run's tables."""
    parts = [f"# {run.title}"]
    for (part, case), entries in run.groups.items():
        parts += [f"## {TITLES[part]}: {case}", timed_table(part, entries, baseline)]
    for part, counted in run.data["tables"].items():
        parts += [f"## {TITLES[part]}", COUNTED[part](counted)]
    missing = {f"{m['variant']}: {m['reason']}" for m in run.data["missing"]}
    parts += _lost(run) + [f"Not measured: {'; '.join(sorted(missing))}."] * bool(missing)
    return "\n\n".join(parts) + "\n"


def compare(old: Run, new: Run) -> str:
    """The medians of both runs per case. Their rounds are not paired, so small differences mean little."""
    before = {key: {e.variant: e for e in entries} for key, entries in old.groups.items()}
    rows = []
    for key, entries in new.groups.items():
        for e in entries:
            was = before.get(key, {}).get(e.variant)
            if was is None:
                continue
            both = e.valid and was.valid
            change = f"{e.median / was.median:.2f}" if both else DASH
            rows.append([f"{key[0]}: {key[1]}: {e.variant}", _times(was)[0], _times(e)[0], change])
    note = "" if old.machine["device"] == new.machine["device"] else "\nDifferent devices.\n"
    return f"A: {old.title}\nB: {new.title}\n{note}\n{table(['', 'A', 'B', 'B / A'], rows)}\n"


def results_page(runs: Sequence[Run]) -> str:
    """``bench/RESULTS.md``: for each device's newest run the training steps and their picture, the main adapter case,
    the first optimizer case, all adapter cases in short, the cases in which something else is faster, and the counted
    tables, folded.
    """
    parts = ["# Results", HEAD]
    if not any(run.machine["cuda"] for run in runs):
        parts.append(NO_GPU)
    for run in runs:
        file = run.path.relative_to(RESULTS.parent)
        parts += [f"## {run.machine['device']}", f"{run.title} ([all figures]({file}))"]
        picture = file.parent / "plots" / "step.png"
        if (RESULTS.parent / picture).exists():
            parts.append(f"![Training steps]({picture})")
        groups = run.groups
        chosen = [key for key in groups if key[0] in ("step", "cost")]
        chosen += [key for key in groups if key[0] == "adapter" and key[1].startswith("both")][:1]
        chosen += [key for key in groups if key[0] == "optimizer"][:1]
        for part, case in chosen:
            parts += [f"{TITLES[part]}: {case}", timed_table(part, groups[part, case])]
        if any(part == "adapter" for part, _ in groups):
            parts += ["The adapter, all cases:", contest_table(run)]
        parts += _lost(run)
        for part, counted in run.data["tables"].items():
            if part == "aot":
                counted = counted | {"rows": [r for r in counted["rows"] if r["sm"] == 90]}
            folded = f"<details><summary>{TITLES[part]}</summary>\n\n{COUNTED[part](counted)}\n\n</details>"
            if folded not in parts:
                parts.append(folded)
    return "\n\n".join(parts) + "\n"
