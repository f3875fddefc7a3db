"""Triton's interpreter without what it repeats: the same results in half of the time."""

import operator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    """Patch the language once per launch, and keep what depends on types and shapes alone."""
    _keep_types()
    if hasattr(interpreter, "_LangPatchScope"):  # Triton 3.6 undoes no patch
        _patch_once()
    TritonSemantic.binary_op_sanitize_overflow_impl = _no_overflow


def _patch_once() -> None:
    """The interpreter patches the whole language again in each call of a function; only a launch's end undoes it."""
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[str] = set()

    def patch_once(fn: Any) -> Any:
        if fn.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(fn.__module__)
        return patch(fn)

    def restore_all(scope: Any) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_lang = patch_once
    interpreter._LangPatchScope.restore = restore_all


def _keep_types() -> None:
    """Make NumPy's type of a type once, a block's type once, and once per type what a tensor knows of its shape."""
    of, block, tensor = interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__
    types: dict[Any, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}

    def kept_type(given: Any) -> Any:
        scalar = given.element_ty if isinstance(given, tl.block_type) else given
        if isinstance(scalar, tl.pointer_type):
            return np.dtype(np.uint64)
        if scalar not in types:
            types[scalar] = of(scalar)
        return types[scalar]

    def kept_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = self.__dict__
        self.__dict__ = blocks[key]

    def kept_shape(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__
        if "of_tensors" not in known:
            tensor(self, handle, type)
            known["of_tensors"] = {"shape": self.shape, "numel": self.numel, "dtype": self.dtype}
        self.__dict__ = {"handle": handle, "type": type, **known["of_tensors"]}

    interpreter._get_np_dtype = kept_type
    tl.block_type.__init__ = kept_block
    tl.tensor.__init__ = kept_shape


def _no_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """An assertion that a sum, difference or product fits its integer type, without a dozen of the language's calls."""
    scalar = lhs.type.scalar
    if scalar.int_bitwidth < 64 and self.builder.options.sanitize_overflow:
        found = getattr(operator, binary_op.__name__)(*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
        fits = (found >= scalar.get_int_min_value()) & (found <= scalar.get_int_max_value())
        assert fits.all(), f"int{scalar.int_bitwidth} overflow in {binary_op.__name__}"
