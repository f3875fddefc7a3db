"""The command line: ``adapterkern COMMAND``, one file per command. Each command's ``--help`` shows its use."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from adapterkern import __version__
from adapterkern.cli import ablate, budget, demo, distill, doctor, evaluate, multitask, qa, route, train

COMMANDS = (train, evaluate, multitask, route, qa, distill, demo, ablate, budget, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an error that was reported, 130 for an interrupted run."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else ""
    try:
        arguments = _parser(argv).parse_args(argv)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        hint = "" if "adapterkern[train]" in str(error) else "; pip install 'adapterkern[train]'"
        print(f"adapterkern {command}: {error}{hint}", file=sys.stderr)
    except (OSError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("ADAPTERKERN_TRACEBACK"):
            raise
        print(f"adapterkern {command}: {error}", file=sys.stderr)
        print("(ADAPTERKERN_TRACEBACK=1 shows where)", file=sys.stderr)
    return 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adapterkern", description="Bottleneck adapters on a frozen LLaMA.")
    parser.add_argument("--version", action="version", version=f"adapterkern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for command in COMMANDS:
        sub = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.HELP or command.SUMMARY,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=command.run)
        if command.NAME in argv[:1]:  # a command's options may come from modules that take seconds to import
            command.add_arguments(sub)
    return parser
