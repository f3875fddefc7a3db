"""Adapters, LoRA and fine-tuning at equal parameters.

``run`` does the runs that have no row in runs.csv yet; stop it and call it again as you like. ``left`` counts them.
``costs`` times a step of each method: call it on a quiet machine. ``report`` prints the tables and draws the pictures.
"""

import os

from experiments.common import make_parser, parse
from experiments.quality import costs, pictures, plan, report, rows, work


def main() -> None:
    """Run, count, time or report."""
    parser = make_parser("quality", __doc__)
    parser.add_argument("action", choices=("run", "left", "costs", "report"))
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(plan.parts())}; default all")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="run: how many at a time, of one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="run: begin none after this time")
    parser.add_argument("--rounds", type=int, default=15, help="costs: at most this many")
    arguments = parse(parser)
    if unknown := set(arguments.parts) - set(plan.parts()):
        parser.error(f"part: expected some of {', '.join(plan.parts())}, got {', '.join(sorted(unknown))}")
    path, chosen = arguments.output / rows.NAME, arguments.parts or list(plan.parts())
    if arguments.action == "run":
        work.run_all(path, chosen, arguments.workers, arguments.minutes)
        return
    if arguments.action == "costs":
        costs.measure(arguments.output, arguments.rounds, seconds=180.0)
        return
    done = rows.read(path)
    for name in chosen:
        if arguments.action == "left":
            groups = plan.parts()[name]
            complete = len(report.results(done, groups))
            print(
                f"{name}: {complete} of {len(groups)} complete, {len(list(plan.pending(done, [name])))} runs to do now"
            )
        else:
            print(f"\n{name}\n\n{report.table(done, name)}")
    if arguments.action == "report":
        pictures.draw(done, arguments.output)


if __name__ == "__main__":
    main()
