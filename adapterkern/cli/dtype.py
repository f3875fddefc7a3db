"""``--dtype``: what ``auto`` stands for here, said in one line."""

import argparse
import os
from pathlib import Path

CHOICES = ("auto", "fp32", "bf16", "fp16")


def chosen_dtype(asked: str | None, precision: str = "fp32", resumed: Path | None = None) -> str:
    """``asked``; where that is auto or nothing, what is fast on this machine.

    fp32 with ``precision`` fp16, whose autocast is for fp32 weights, and in one of several processes, whose
    measurements may differ. A run in the folder ``resumed`` keeps its own.
    """
    if asked not in (None, "auto"):
        return asked

    import torch

    from adapterkern.cli.run import say
    from adapterkern.model.backbone import default_device
    from adapterkern.model.fast_dtype import fast_dtype

    of_run = _of_run(resumed)
    if of_run is not None:
        dtype, why = of_run, "as in the run that is resumed"
    elif precision == "fp16":
        dtype, why = "fp32", "--precision fp16 is for fp32 weights"
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dtype, why = "fp32", "one of several processes does not choose; --dtype does"
    else:
        dtype, why = fast_dtype(torch.device(default_device()))
    say(f"backbone in {dtype}: {why}")
    return dtype


def _of_run(directory: Path | None) -> str | None:
    """The dtype in a run's sources, which a run of several tasks has in a folder each."""
    from adapterkern.training.saved import SOURCES_NAME, load_sources

    found = sorted(directory.rglob(SOURCES_NAME)) if directory is not None and directory.is_dir() else []
    return load_sources(found[0].parent).dtype if found else None


def of_arguments(arguments: argparse.Namespace) -> str:
    """The same for a command of training."""
    return chosen_dtype(arguments.dtype, arguments.precision, Path(arguments.output_dir) if arguments.resume else None)
