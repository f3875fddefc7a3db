"""``adapterkern doctor``."""

import argparse

from adapterkern.cli.options import AddCommand
from adapterkern.doctor import report


def add(command: AddCommand) -> None:
    command("doctor", run, "what is installed, what will run where, and why")


def run(arguments: argparse.Namespace) -> int:
    print("\n".join(report()))
    return 0
