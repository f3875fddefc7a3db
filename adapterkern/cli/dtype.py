"""``--dtype``: what ``auto`` stands for here, said in one line."""

import argparse
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

CHOICES = ("auto", "fp32", "bf16", "fp16")


def chosen_dtype(
    asked: str | None, precision: str = "fp32", resumed: Path | None = None, model: str | None = None
) -> str:
    """``asked``; where that is auto or nothing, what is fast on this machine for the weights of ``model``.

    fp32 with ``precision`` fp16, whose autocast is for fp32 weights, and in one of several processes, whose
    measurements may differ. A run in the folder ``resumed`` keeps its own.
    """
    if asked not in (None, "auto"):
        return asked

    import torch

    from adapterkern.cli.run import say
    from adapterkern.model.backbone import default_device, saved_dtype
    from adapterkern.model.fast_dtype import fast_dtype

    of_run = _of_run(resumed)
    if of_run is not None:
        dtype, why = of_run, "as in the run that is resumed"
    elif precision == "fp16":
        dtype, why = "fp32", "--precision fp16 is for fp32 weights"
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dtype, why = "fp32", "one of several processes does not choose; --dtype does"
    else:
        saved = None if model is None else saved_dtype(model)
        dtype, why = fast_dtype(torch.device(default_device()), saved)
    say(f"backbone in {dtype}: {why}")
    return dtype


def _of_run(directory: Path | None) -> str | None:
    """The dtype in a run's sources, which a run of several tasks has in a folder each."""
    from adapterkern.training.saved import SOURCES_NAME, load_sources

    found = sorted(directory.rglob(SOURCES_NAME)) if directory is not None and directory.is_dir() else []
    return load_sources(found[0].parent).dtype if found else None


def of_arguments(arguments: argparse.Namespace) -> str:
    """The same for a command of training."""
    resumed = Path(arguments.output_dir) if arguments.resume else None
    chosen = chosen_dtype(arguments.dtype, arguments.precision, resumed, arguments.model)
    _name_slow({"--dtype": chosen, "--precision": arguments.precision})
    return chosen


def _name_slow(asked: dict[str, str]) -> None:
    """Warn of what this machine only emulates: tens of times slower, where a user expects it to be faster."""
    import torch

    from adapterkern.model.backbone import DTYPES, default_device
    from adapterkern.model.fast_dtype import slow_dtype

    for option, name in asked.items():
        if why := slow_dtype(DTYPES[name], torch.device(default_device())):
            logger.warning("%s %s: slow here, since %s", option, name, why)
