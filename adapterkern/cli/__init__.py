"""The command line: ``adapterkern COMMAND``, a file a command. Each command's ``--help`` shows its use."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from adapterkern import __version__
from adapterkern.cli import ablate, budget, demo, distill, doctor, evaluate, multitask, qa, route, train

COMMANDS = (train, evaluate, multitask, route, qa, distill, demo, ablate, budget, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an error that was reported, 130 for an interrupted run."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(f"adapterkern {arguments.command}: {error}; pip install 'adapterkern[train]'", file=sys.stderr)
    except (OSError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("ADAPTERKERN_TRACEBACK"):
            raise
        print(f"adapterkern {arguments.command}: {error}", file=sys.stderr)
        print("(ADAPTERKERN_TRACEBACK=1 shows where)", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adapterkern", description="Bottleneck adapters on a frozen LLaMA.")
    parser.add_argument("--version", action="version", version=f"adapterkern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=description or summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    for module in COMMANDS:
        module.add(command)
    return parser
