"""PEFT's method comparison (MetaMathQA) with our adapters among its experiments.

With PEFT installed from a clone, as the suite needs, and adapterkern beside it:

    cd peft/method_comparison/MetaMathQA
    cp -r ADAPTERKERN/bench/peers/experiments/adapterkern experiments/
    python ADAPTERKERN/bench/peers/method_comparison.py -v experiments/adapterkern/llama-3.2-3B-dim52

The arguments are those of the suite's run.py, which is what runs, from the current folder: its data, loop, optimizer,
evaluations and result file; ``make RUN_SCRIPT=...`` runs it too. Three things are replaced, for experiments whose
adapter_config.json has the ``peft_type`` below, and beside it fields of ``ak.AdapterConfig``:

- ``PeftConfig.from_pretrained`` reads that file;
- ``utils.get_model`` puts adapters on what it returns without a PEFT configuration, the bare backbone;
- ``utils.get_file_size`` takes the size of our file of weights.

Our parameters are fp32, and nothing of ours needs compilation: ``autocast_adapter_dtype: false`` and ``compile: true``
in training_params.json are refused.
"""

import dataclasses
import functools
import importlib
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import peft

import adapterkern as ak
from adapterkern.files import read_json
from adapterkern.model.files.folder import WEIGHTS_NAME

TYPE = "ADAPTERKERN"
PROGRAM = "method_comparison.py"


@dataclasses.dataclass
class Entry:
    """What stands in for a ``PeftConfig``: the suite passes it on, and writes ``to_dict`` into its result."""

    config: ak.AdapterConfig
    peft_type: str = TYPE
    task_type: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"peft_type": self.peft_type, "task_type": self.task_type, **self.config.to_dict()}


def read_config(otherwise: Callable[..., Any], folder: str, **more: Any) -> Any:
    """The ``Entry`` of a folder's adapter_config.json, or what PEFT makes of it.

    Raises:
        ValueError: a field is none of ``ak.AdapterConfig``, or out of range.
    """
    path = Path(folder) / peft.utils.CONFIG_NAME
    fields = read_json(path, ours=False)
    if fields.pop("peft_type", None) != TYPE:
        return otherwise(folder, **more)
    try:
        return Entry(ak.AdapterConfig.from_dict(fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def get_model(otherwise: Callable[..., Any], *, peft_config: Any, **how: Any) -> Any:
    """The suite's backbone with our adapters."""
    if not isinstance(peft_config, Entry):
        return otherwise(peft_config=peft_config, **how)
    for name, expected in (("compile", False), ("autocast_adapter_dtype", True)):
        if how.get(name, expected) is not expected:
            raise ValueError(f"{name}: expected {expected} with {TYPE}, got {how[name]!r}")
    return ak.LlamaAdapter(otherwise(peft_config=None, **how), peft_config.config)


def get_file_size(
    otherwise: Callable[..., int], model: Any, *, clean: bool, print_fn: Callable[..., None], **more: Any
) -> int:
    """Bytes of the weights that ``save_pretrained`` writes; the folder stays unless ``clean``.

    0 if they cannot be written, after a line that says so: the suite writes its results later.
    """
    if not isinstance(model, ak.LlamaAdapter):
        return otherwise(model, clean=clean, print_fn=print_fn, **more)
    folder = Path(tempfile.mkdtemp())
    try:
        model.save_pretrained(folder)
        return (folder / WEIGHTS_NAME).stat().st_size
    except OSError as error:
        print_fn(f"adapterkern: the weights could not be written, {error}")
        return 0
    finally:
        if clean:
            shutil.rmtree(folder)
        else:
            print_fn(f"Saved adapterkern checkpoint to {folder}")


@contextmanager
def replaced(utils: Any) -> Iterator[None]:
    """The three names, while the suite runs."""
    of_peft = functools.partial(read_config, peft.PeftConfig.from_pretrained)
    with (
        mock.patch.object(peft.PeftConfig, "from_pretrained", of_peft),
        mock.patch.object(utils, "get_model", functools.partial(get_model, utils.get_model)),
        mock.patch.object(utils, "get_file_size", functools.partial(get_file_size, utils.get_file_size)),
    ):
        yield


def main(argv: list[str]) -> None:
    """Run the suite's run.py, of the current folder, with these arguments."""
    if missing := [name for name in ("run.py", "utils.py") if not Path(name).is_file()]:
        sys.exit(
            f"{PROGRAM}: current folder: expected method_comparison/MetaMathQA of a clone of PEFT, got {Path.cwd()}, "
            f"without {missing[0]}"
        )
    sys.path.insert(0, os.getcwd())
    with replaced(importlib.import_module("utils")), mock.patch.object(sys, "argv", ["run.py", *argv]):
        runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
