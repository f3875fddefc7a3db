"""One measurement in several processes, one after another: what differs between them is part of a figure's interval.

Each process measures the same cases in turns, as ever. The joined file has the rounds of all of them, and in
``extra_info["processes"]`` how many of each process.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_benchmark.stats import Stats


def measured(arguments: Sequence[str], count: int) -> tuple[int, dict[str, Any] | None]:
    """Run ``python -m bench`` with ``arguments`` ``count`` times; the worst exit status, and the joined document."""
    worst, found = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            print(f"process {number + 1} of {count}", file=sys.stderr, flush=True)
            path = Path(folder) / f"{number}.json"
            done = subprocess.run(
                [sys.executable, "-m", "bench", *arguments, "--json", str(path)], stdout=subprocess.DEVNULL
            )
            worst = max(worst, abs(done.returncode))
            if path.exists():
                found.append(json.loads(path.read_text()))
            elif done.returncode == 2:  # refused what it was asked, as the others will
                break
    return worst, joined(found) if found else None


def joined(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first document with the rounds of all, for what all have measured."""
    first, *others = ({b["name"]: b for b in d["benchmarks"]} for d in documents)
    benchmarks = []
    for name, benchmark in first.items():
        same = [benchmark, *(o[name] for o in others if name in o)]
        if len(same) < len(documents):
            continue
        stats = Stats()
        stats.data = [t for b in same for t in b["stats"]["data"]]
        errors = [e for b in same if (e := b["extra_info"].get("error")) is not None]
        info = benchmark["extra_info"] | {"processes": [len(b["stats"]["data"]) for b in same]}
        info |= {"error": max(errors)} if errors else {}
        stats_of_all = stats.as_dict() | {"data": stats.data, "iterations": 1}
        benchmarks.append(benchmark | {"extra_info": info, "stats": stats_of_all})
    busiest = max(documents, key=lambda d: d["machine_info"].get("busy_cores", 0.0))
    return documents[0] | {"machine_info": busiest["machine_info"], "benchmarks": benchmarks}
