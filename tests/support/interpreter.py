"""Triton's interpreter without what it repeats: the same results in two thirds of the time."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Patch the language once per launch, and keep the table of NumPy's types.

    The interpreter patches every function of the language again in each call of a function by a kernel, although only
    a launch's end undoes it, and makes that table anew for each number that it handles.
    """
    if not hasattr(interpreter, "_LangPatchScope"):  # Triton 3.6 undoes nothing
        return
    patch, restore, of = interpreter._patch_lang, interpreter._LangPatchScope.restore, interpreter._get_np_dtype
    patched: set[str] = set()
    types: dict[Any, Any] = {}

    def patch_once(fn: Any) -> Any:
        if fn.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(fn.__module__)
        return patch(fn)

    def restore_all(scope: Any) -> None:
        patched.clear()
        restore(scope)

    def kept_type(given: Any) -> Any:
        scalar = given.element_ty if isinstance(given, tl.block_type) else given
        if isinstance(scalar, tl.pointer_type):
            return np.dtype(np.uint64)
        if scalar not in types:
            types[scalar] = of(scalar)
        return types[scalar]

    interpreter._patch_lang = patch_once
    interpreter._LangPatchScope.restore = restore_all
    interpreter._get_np_dtype = kept_type
