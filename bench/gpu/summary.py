"""The results of a call on one screen, from the files that its steps have written so far."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import report
from bench.measure import paired_ratio
from bench.published import of_litgpt
from bench.report import DASH, Entry, seconds, table

LITGPT = "as LitGPT"
OURS = ("ours", "ours bare", "ours by clusters", "ours before")


def text(work: Path) -> str:
    """All tables, the main figures first; a case that has only our own kernels is one line."""
    tables: list[tuple[Callable[[Path], str], Path]] = [(probe, work / "probe.json"), (compiled, work / "compile.json")]
    tables += [(timed, work / f"{name}.json") for name in ("adapter", "step", "cost", "optimizer")]
    tables += [(sweep, work / "sweep.json"), *((timed, path) for path in sorted(work.glob("ab*.json")))]
    tables += [(launched, work / "kernels.log")]
    return "\n\n".join(filter(None, (_guarded(table_, path) for table_, path in tables)))


def _guarded(table_: Callable[[Path], str], path: Path) -> str:
    """A table, or the error in its file; the other tables are not affected, and the file is in the archive."""
    try:
        return table_(path)
    except Exception as error:
        return f"{path.name}: no table: {type(error).__name__}: {error}"


def launched(path: Path) -> str:
    """The time per launch: the table that the step printed."""
    if not path.exists():
        return ""
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join([line[:100] for line in lines if line.startswith("|")][:16])


def probe(path: Path) -> str:
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    lines = [f"{found['device']}; {versions}; {found['extension']}; {found['carried_kernels']} kernels carried"]
    return "\n".join([*lines, *(f"warning: {w}" for w in found["warnings"])])


def compiled(path: Path) -> str:
    """How many of the variants that the call launches the carried cache had."""
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    there = f"compiled beforehand: {found['hits']} of {found['variants']} variants"
    return f"{there}; {found['seconds']} s for the others and {found['launchers']} launchers"


def timed(path: Path) -> str:
    """A table per case of a saved run, and one table for all cases that only have our own kernels."""
    if not path.exists():
        return ""
    run = report.load(path)
    tables, lines = [], []
    for (part, case), entries in run.groups.items():
        if {e.variant for e in entries} <= {*OURS, report.COPY} and path.stem == "adapter":
            lines.append(_line(case, {e.variant: e for e in entries}))
        else:
            tables.append(f"{case}\n{_table(part, case, entries)}")
    if lines:
        tables.append(table(["", *OURS, "bare / before", "% of copy", "% by clusters"], lines))
    missing = dict.fromkeys(f"missing: {m['variant']} ({m['case']}): {m['reason'][:120]}" for m in run.data["missing"])
    return "\n\n".join([*(f"{path.stem}: {table_}" for table_ in tables), "\n".join(list(missing)[:8])]).rstrip()


def _table(part: str, case: str, entries: Sequence[Entry]) -> str:
    if part == "cost":
        return report.cost_table(entries, None)
    return step_table(case, entries) if part == "step" else kernel_table(entries)


def _line(case: str, entries: dict[str, Entry]) -> list[str]:
    """One case's times, the ratio of ours bare and ours before, and ours bare and by clusters in % of copy."""
    _, bare, by_clusters, before = OURS
    times = [seconds(entries[n].median) if n in entries and entries[n].valid else DASH for n in OURS]

    def over(name: str, to: str, format_: str, scale: int = 1) -> str:
        both = name in entries and to in entries
        return format(scale * paired_ratio(entries[name].times, entries[to].times), format_) if both else DASH

    def of_copy(name: str) -> str:
        return over(report.COPY, name, ".0f", 100)

    return [case, *times, over(bare, before, ".2f"), of_copy(bare), of_copy(by_clusters)]


def kernel_table(entries: Sequence[Entry]) -> str:
    floor = next((e for e in entries if e.variant == report.COPY), None)
    base = report.baseline_of(entries, "ours before")
    rows = []
    for e in entries:
        ratio = f"{paired_ratio(e.times, base.times):.2f}" if e.valid else DASH
        of_copy = f"{100 * paired_ratio(floor.times, e.times):.0f}" if floor and e.valid else DASH
        time = seconds(e.median) if e.valid else "error over budget"
        error = DASH if e.info["error"] is None else f"{e.info['error']:.1e}"
        leaked = " host time in it" if "host time" in e.info.get("timed", "") else ""
        rows.append([e.variant + leaked, time, ratio, of_copy, error])
    return table(["", "median", f"× {base.variant}", "% of copy", "error"], rows)


def step_table(case: str, entries: Sequence[Entry]) -> str:
    """Step time, tax, the model's peak memory, and minutes per 1,000 steps, with LitGPT's published gigabytes.

    Its minutes are of shorter texts: see ``bench/cost.py``.
    """
    base = report.baseline_of(entries, None)
    rows = []
    for e in entries:
        tax = f"{100 * (paired_ratio(e.times, base.times) - 1):+.1f} %" if e.valid else DASH
        peak = f"{(e.info['model_bytes'] + e.info['peak_bytes']) / 1e9:.2f}"
        time = seconds(e.median) if e.valid else "error over budget"
        rows.append([e.variant, time, tax, peak, f"{e.median * 1000 / 60:.2f}"])
    if LITGPT in case:
        rows += [[row.title, DASH, DASH, f"{row.gb:.2f}", DASH] for row in of_litgpt(1)]
    return table(["", "step", f"over {base.variant}", "peak GB", "min per 1,000"], rows)


def sweep(path: Path) -> str:
    if not path.exists():
        return ""
    tables = []
    tried = json.loads(path.read_text())
    for kernel in dict.fromkeys(row["kernel"] for row in tried):
        mine = sorted((r for r in tried if r["kernel"] == kernel), key=lambda r: r.get("us", float("inf")))
        rows = [[f"{r['tiles']}{' (the table)' * r['table']}", f"{r['us']:.1f}" if "us" in r else r["error"][:60]]
                for r in mine]  # fmt: skip
        tables.append(table([kernel, "µs of the pass"], rows))
    return "\n\n".join(tables)
