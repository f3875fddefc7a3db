"""Names of a package that are imported when they are first used, since what they import takes seconds or an extra."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for ``package``.

    Args:
        homes: name → the module that has it, relative to ``package``.
    """

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "adapterkern":
                raise
            message = f"{package}.{name} needs {error.name}: pip install 'adapterkern[train]'"
            raise ModuleNotFoundError(message, name=error.name) from error

    return getattribute, lambda: sorted({*vars(sys.modules[package]), *homes})
