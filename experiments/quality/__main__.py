"""Adapters, LoRA and fine-tuning at equal parameters.

``run`` does the runs that have no row in runs.csv yet; stop it and call it again as you like. ``left`` counts them.
``costs`` times a step of each method: call it on a quiet machine. ``report`` prints the tables, draws the pictures, and
puts the tables into a page. ``all`` is these three, and does not repeat what is in the folder.
"""

import os
from pathlib import Path

from adapterkern.files import write_text
from experiments.common import make_parser, parse
from experiments.quality import costs, pictures, plan, report, rows, work


def main() -> None:
    """Run, count, time, report, or all but count."""
    parser = make_parser("quality", __doc__, by_device=False)
    parser.add_argument("action", choices=("all", "run", "left", "costs", "report"))
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(plan.parts())}; default all")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="run: how many at a time, of one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="run: begin none after this time")
    parser.add_argument("--rounds", type=int, default=15, help="costs: at most this many")
    parser.add_argument("--page", type=Path, metavar="FILE", help="report: Markdown with places for the tables")
    arguments = parse(parser)
    if unknown := set(arguments.parts) - set(plan.parts()):
        parser.error(f"part: expected some of {', '.join(plan.parts())}, got {', '.join(sorted(unknown))}")
    if arguments.workers < 1:
        parser.error(f"--workers: expected at least 1, got {arguments.workers}")
    if arguments.page is not None and not arguments.page.is_file():
        parser.error(f"--page: expected a file, got {arguments.page}")
    path, chosen = arguments.output / rows.NAME, arguments.parts or list(plan.parts())
    action = arguments.action
    if action in ("run", "all"):
        work.run_all(path, chosen, arguments.workers, arguments.minutes)
        if action == "run":
            return
    done = rows.read(path)
    if action == "all" and (left := len(list(plan.pending(done, chosen)))):
        print(f"{left} runs are left to do now: no report yet")
        return
    if action == "costs" or (action == "all" and not (arguments.output / costs.NAME).exists()):
        costs.measure(arguments.output, arguments.rounds, seconds=180.0)
        if action == "costs":
            return
    if action == "left":
        for name in chosen:
            groups = plan.parts()[name]
            complete, now = sum(not g.missing(done) for g in groups), len(list(plan.pending(done, [name])))
            print(f"{name}: {complete} of {len(groups)} complete, {now} runs to do now")
        return
    shown = tables(done, arguments.output)
    for name, table in shown.items():
        if name in chosen or name not in plan.parts():
            print(f"\n{name}\n\n{table}")
    pictures.draw(done, arguments.output)
    if arguments.page is not None:
        write_text(arguments.page, report.fill(arguments.page.read_text(encoding="utf-8"), shown))


def tables(done: rows.Rows, folder: Path) -> dict[str, str]:
    """The tables of the rows and of a folder's costs, by their names in the page."""
    path = folder / costs.NAME
    found = {name: report.table(done, name) for name in plan.parts()}
    found |= {"short": report.short(done), "taken": report.taken(done)}
    found["sizes"] = report.sizes(done)  # has no runs on the test set
    return found | {"costs": costs.table(path) if path.exists() else report.NOT_DONE}


if __name__ == "__main__":
    main()
