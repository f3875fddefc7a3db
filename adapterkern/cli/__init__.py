"""The command line: ``adapterkern COMMAND``, one file per command. Each command's ``--help`` shows its use."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence

from adapterkern import __version__, _ctrl_c, checks, ops
from adapterkern.cli import (
    ablate,
    budget,
    chat,
    demo,
    distill,
    doctor,
    evaluate,
    generate,
    multitask,
    predict,
    qa,
    route,
    serve,
    train,
)
from adapterkern.cli.config_file import with_file
from adapterkern.cli.cores import warn_of_threads
from adapterkern.cli.memory import keep_pages
from adapterkern.cli.options import Parser, UsageError
from adapterkern.cli.together import check_together
from adapterkern.cli.words import in_options
from adapterkern.ops import native

COMMANDS = (
    train,
    evaluate,
    predict,
    generate,
    chat,
    serve,
    multitask,
    route,
    qa,
    distill,
    demo,
    ablate,
    budget,
    doctor,
)

logger = logging.getLogger(__name__)

_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells have it
# Seconds in which a launcher ends the other processes, once the first has ended with the same error.
_OTHERS_WAIT = 15.0
_EXPECTED = (OSError, ValueError, ArithmeticError, NotImplementedError, ImportError)
_PLAIN = (*_EXPECTED, TypeError, RuntimeError)  # of any other kind, such as KeyError, the kind is part of the message


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0; 1 or 2 (usage) for an error that was reported; 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    _ctrl_c.raise_again()
    try:
        status = _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = _interrupted(argv)
    except BrokenPipeError:  # `adapterkern ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's own flush at the end is quiet, too
        status = _BROKEN_PIPE
    finally:
        _ctrl_c.end_at_once()
    return status


def _run(argv: Sequence[str]) -> int:
    parser: Parser = Parser()
    show, log = logging.StreamHandler(), logging.getLogger("adapterkern")
    level_before = log.level
    try:
        parser = _parser(argv)
        arguments = parser.read(with_file(argv, parser))
        parser = arguments.parser
        level = logging.WARNING if _rank() == 0 else logging.ERROR
        show.setFormatter(_Formatter(parser))
        logging.basicConfig(handlers=[show], level=level)
        if not getattr(arguments, "progress", True) and _rank() == 0:  # a training's lines are in its log
            log.setLevel(logging.INFO)
        for option in sorted(arguments.parser.repeated):
            logger.warning("%s: given more than once; the last one counts", option)
        check_together(arguments)
        _check_machine(arguments.command)
        keep_pages()
        return arguments.run(arguments)
    except SystemExit:  # --help and --version, which have been printed
        sys.stdout.flush()
        raise
    except UsageError as error:
        _report(str(error))
        return 2
    except BrokenPipeError:
        raise
    except Exception as error:
        if _has_interrupt(error):
            raise KeyboardInterrupt from error
        if os.environ.get("ADAPTERKERN_TRACEBACK"):
            raise
        from adapterkern.training.processes import OtherProcessError

        if not isinstance(error, OtherProcessError):
            text = str(error) if isinstance(error, _PLAIN) and str(error) else f"{type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError) and "adapterkern[train" not in text:
                text += "; pip install 'adapterkern[train]'"
            where = "" if isinstance(error, _EXPECTED) else " (ADAPTERKERN_TRACEBACK=1 shows where)"
            _report(f"{parser.prog}: {in_options(text, parser)}{where}")
        return 1
    finally:
        logging.getLogger().removeHandler(show)
        log.setLevel(level_before)


def _check_machine(command: str) -> None:
    """Refuse environment variables that no adapter could run under, and warn of too many threads."""
    ops.fused_enabled()
    ops.kernels_asked()
    checks.switch("ADAPTERKERN_EARLY_LAUNCH")
    native.instruction_set()
    if command not in (budget.NAME, doctor.NAME):  # one computes nothing, and the other says more
        warn_of_threads()


class _Formatter(logging.Formatter):
    """Warnings in the words of the command line."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return in_options(text, self.parser) if record.name.startswith("adapterkern") else text


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _report(message: str) -> None:
    """Print an error: once where several processes have the same one, as for a missing file."""
    if rank := _rank():
        time.sleep(_OTHERS_WAIT)
        message = f"process {rank}: {message}"
    print(message, file=sys.stderr, flush=True)


def _interrupted(argv: Sequence[str]) -> int:
    if _rank() == 0:
        print(" ".join(["adapterkern", *argv[:1]]) + ": interrupted", file=sys.stderr)
    return _ctrl_c.STATUS


def _has_interrupt(error: BaseException | None) -> bool:
    """Whether a library has made an error of its own from Ctrl-C."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _parser(argv: Sequence[str]) -> Parser:
    parser = Parser(prog="adapterkern", description="Bottleneck adapters on a frozen LLaMA.")
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
