"""The compiled extension, ``adapterkern._C``, and why there is none. Nothing needs it on import."""

import importlib
from typing import Any

_VERSION = 7  # of csrc/bindings.cpp


def load() -> tuple[Any, str]:
    """The module, and an empty text; or None and the reason: it was not built, or by another version of the package."""
    try:
        module = importlib.import_module("adapterkern._C")
    except ImportError as error:
        return None, f"the extension adapterkern._C cannot be imported ({error})"
    if getattr(module, "VERSION", 0) < _VERSION:
        return None, "the extension adapterkern._C is older than this package: install adapterkern again"
    return module, ""
