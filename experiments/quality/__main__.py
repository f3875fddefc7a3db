"""``python -m experiments.quality``: see the package."""

import os

from experiments.common import make_parser, parse
from experiments.quality import pictures, plan, report, rows, work


def main() -> None:
    """Run what is missing."""
    parser = make_parser("quality", __doc__)
    parser.add_argument("action", choices=("run", "left", "report"))
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(plan.parts())}; default all, in this order")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="runs at a time, of one thread"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    arguments = parse(parser)
    if unknown := set(arguments.parts) - set(plan.parts()):
        parser.error(f"parts: expected some of {', '.join(plan.parts())}, got {', '.join(sorted(unknown))}")
    path, chosen = arguments.output / rows.NAME, arguments.parts or list(plan.parts())
    if arguments.action == "left":
        done = rows.read(path)
        for name in chosen:
            print(name, len(list(plan.pending(done, [name]))), "runs can be done now")
        return
    if arguments.action == "report":
        done = rows.read(path)
        for name in chosen:
            print(f"\n{name}\n\n{report.table(done, name)}")
        pictures.draw(done, arguments.output)
        return
    work.run_all(path, chosen, arguments.workers, arguments.minutes)


if __name__ == "__main__":
    main()
