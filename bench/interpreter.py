"""Triton's interpreter without what it repeats: the same results in half of the time."""

import inspect
import operator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    """Patch the language once per launch, and keep what depends on types and shapes alone."""
    _keep_types()
    _keep_operands()
    if hasattr(interpreter, "_LangPatchScope"):  # Triton 3.6 undoes no patch
        _patch_once()
    TritonSemantic.binary_op_sanitize_overflow_impl = _no_overflow


def _patch_once() -> None:
    """The interpreter patches the whole language again in each call of a function, and undoes it after each launch."""
    patch = interpreter._patch_lang
    patched: set[str] = set()

    def patch_once(fn: Any) -> Any:
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            patch(fn)  # as in Triton 3.6, nothing undoes it: in this process no kernel is ever compiled
        return interpreter._LangPatchScope()

    def patch_attribute(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        """Without a filter of the arguments, and a check of the one that is given here, in each call."""
        call = inspect.unwrap(member, stop=lambda fn: not tl.core.is_builtin(fn))

        def interpreted(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return call(*args, **kwargs)

        scope.set_attr(obj, name, interpreted)

    interpreter._patch_lang = patch_once
    interpreter._patch_attr = patch_attribute


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
            blocks[key] = self.__dict__ | {"dims": key[1]}
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


def _keep_operands() -> None:
    """Two operands of the same type and shape stay as they are, and a number becomes a tensor of a type once.

    What the types do not tell at once is left to Triton, and so is every refusal.
    """
    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    equal = tl.dtype.__eq__
    shapes: dict[Any, tuple[int, ...]] = {}

    def checked(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,  # which halves do in fp32
    ) -> Any:
        how = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        left, right = isinstance(lhs, tl.tensor), isinstance(rhs, tl.tensor)
        if left and right and lhs.dtype is rhs.dtype and type(lhs.dtype) is tl.dtype and not div_or_mod:
            return self.broadcast_impl_value(lhs, rhs)
        one, number = (lhs, rhs) if left else (rhs, lhs)
        if left == right or type(number) not in (bool, int, float):
            return check(self, lhs, rhs, *how)
        kept = one.type.__dict__.setdefault("of_numbers", {})
        key = type(number), number, left, how
        if key not in kept:
            found = check(self, lhs, rhs, *how)
            if found[right] is not one:
                return found
            found[left].handle.data.flags.writeable = False
            kept[key] = found[left]
        return (one, kept[key]) if left else (kept[key], one)

    def spread(self: Any, x: Any, shape: tuple[int, ...]) -> Any:
        made = tl.block_type(x.dtype, [*shape])
        if x.type.is_block():
            return self.tensor(self.builder.create_broadcast(x.handle, [*shape]), made)
        return self.tensor(self.builder.create_splat(made, x.handle), made)

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = (x.type.__dict__.get("dims") for x in (lhs, rhs))
        if left == right and left is not None:
            return lhs, rhs
        if (left, right) not in shapes:
            found = broadcast(self, lhs, rhs)
            if found[0].type.is_block():
                shapes[left, right] = found[0].type.__dict__["dims"]
            return found
        shape = shapes[left, right]
        return lhs if left == shape else spread(self, lhs, shape), rhs if right == shape else spread(self, rhs, shape)

    TritonSemantic.binary_op_type_checking_impl = checked
    TritonSemantic.broadcast_impl_value = broadcasted
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _no_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """An assertion that a sum, difference or product fits its integer type, without a dozen of the language's calls."""
    scalar = lhs.type.scalar
    if scalar.int_bitwidth < 64 and self.builder.options.sanitize_overflow:
        found = getattr(operator, binary_op.__name__)(*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
        fits = (found >= scalar.get_int_min_value()) & (found <= scalar.get_int_max_value())
        assert fits.all(), f"int{scalar.int_bitwidth} overflow in {binary_op.__name__}"
