"""The operator in PyTorch: schema, implementations, fake, autograd and autocast.

Two operators make one differentiable function:

    adapterkern::adapter_forward   x, parameters → y and what the backward needs (z, mean, rstd: nothing of size T×d)
    adapterkern::adapter_backward  dy, x, parameters, z, mean, rstd → the requested gradients

The Triton kernels read the parameters in the form that kernels/weights.py prepares and kernels/cache.py keeps between
calls. Where the cache cannot serve (in a CUDA graph, and in compiled code, which may become one), a third operator
prepares them for one forward and its backward:

    adapterkern::prepare_weights   parameters → the fields of kernels.weights.Prepared

The arguments that a plain call has not come last, so that the dispatcher omits them: residual; the scale, which is a
tensor, ``scale``, or a number, ``factor``; the gate, (T,) in fp32 (fp64 where x is); the rate of dropout and its seed.
Below the operator a tensor is the seventh of the parameters. What a residual's gradient is, dy, needs no operator.

Precision. Parameters keep their own dtype (usually fp32), and so do their gradients. ``compute_dtype`` is
the dtype of the matrix products' operands: x's own dtype, or autocast's while autocast is on. y keeps x's dtype.
Statistics and sums are at least fp32 everywhere.

choice.py decides whether Triton kernels, the closed form or eager PyTorch runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from adapterkern.ops import choice, closed_form, native, rows
from adapterkern.ops.call import Call
from adapterkern.ops.choice import keys, keys_of_plain_tensors, operand_dtype, runs_native, runs_triton
from adapterkern.ops.dropout import Drop

_lib = torch.library.Library("adapterkern", "DEF")
_WEIGHTS = (
    "Tensor? norm_weight, Tensor? norm_bias, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias"
)
_lib.define(
    f"adapter_forward(Tensor x, {_WEIGHTS}, float eps, str activation, ScalarType? compute_dtype, bool save,"
    " bool x_free=False, Tensor? index=None, Tensor[]? prepared=None, Tensor? residual=None, Tensor? scale=None,"
    " float factor=1.0, Tensor? gate=None, float dropout=0.0, Tensor? seed=None)"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)"
)
_lib.define(
    f"adapter_backward(Tensor dy, Tensor x, Tensor z, Tensor mean, Tensor rstd, {_WEIGHTS},"
    " float eps, str activation, ScalarType compute_dtype, bool[] needed,"
    " bool x_free=False, Tensor? index=None, Tensor[]? prepared=None, bool residual=False, Tensor? scale=None,"
    " float factor=1.0, Tensor? gate=None, float dropout=0.0, Tensor? seed=None) -> Tensor[]"
)
_lib.define(
    f"prepare_weights({_WEIGHTS}, ScalarType dtype, Tensor? scale=None, float factor=1.0)"
    " -> (Tensor A, Tensor a_sum, Tensor c, Tensor w_up, Tensor b_up)"
)
# x_free, index, prepared, residual, scale, factor, gate, dropout, seed
_DEFAULTS = False, None, None, None, None, 1.0, None, 0.0, None
forward_op = torch.ops.adapterkern.adapter_forward.default
backward_op = torch.ops.adapterkern.adapter_backward.default
_prepare = torch.ops.adapterkern.prepare_weights.default


def needs_no_dispatcher(x: Tensor, *others: Tensor) -> bool:
    """Whether calling the native kernels at once differs from calling the operator only in the time that it takes.

    Torch's dispatcher enters Python three times in a forward, under autocast, and twice in a backward: 68 of 350 µs of
    a small forward and backward. A backward asks again: it may meet what its forward has not.
    """
    # First whether it is compiled, which cannot trace the rest.
    return not torch.compiler.is_compiling() and runs_native(x.device.type, x.dtype) and nobody_listens(x, *others)


def nobody_listens(x: Tensor, *others: Tensor) -> bool:
    """Whether a call reads and writes memory, and nothing else sees it; not to be asked in compiled code.

    Subclasses of Tensor, tensors that are not what lies in memory, modes, transforms, tracers and profilers are to see
    operators.
    """
    return (
        not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()
        and not torch.jit.is_tracing()
        and all(
            type(t) in (Tensor, nn.Parameter) and keys(t) in keys_of_plain_tensors(x.device.type) for t in (x, *others)
        )
    )


# Implementations


def run_forward(x, *args):  # type: ignore[no-untyped-def]
    """The operator's forward on any device; ``args`` follow the schema."""
    eps, activation, compute_dtype, save = args[6:10]
    _, index, prepared, residual, scale, factor, gate, dropout, seed = _optional(args, 10)
    weights = _with_scale(args[:6], scale)
    if dropout and seed is None:
        raise ValueError(f"seed: expected a tensor of int64 with dropout={dropout}, got None")
    if not runs_triton(x.device.type, x.dtype):
        drop = None if seed is None else Drop(dropout, seed)
        call = Call(eps, activation, operand_dtype(x, compute_dtype), factor, gate, drop)
        return rows.adapter_forward(_on_rows(x), x, weights, call, save, index, residual)
    from adapterkern.ops.kernels import launch  # Triton takes a third of a second to import

    return launch.adapter_forward(
        x, weights, index, eps=eps, activation=activation, compute=compute_dtype or x.dtype, save=save,
        carried=prepared, residual=residual, factor=factor, gate=gate, dropout=dropout, seed=seed,
        by_clusters=choice.runs_clusters(x.device),
    )  # fmt: skip


def run_backward(dy, x, z, mean, rstd, *args):  # type: ignore[no-untyped-def]
    """The operator's backward on any device; ``args`` follow the schema, and x is y if ``x_free``."""
    eps, activation, _, needed = args[6:10]
    x_free, index, prepared, residual, scale, factor, gate, dropout, seed = _optional(args, 10)
    weights = _with_scale(args[:6], scale)
    if runs_triton(x.device.type, x.dtype):
        from adapterkern.ops.kernels import launch

        grads = launch.adapter_backward(
            dy, x, z, mean, rstd, weights, index, activation=activation, needed=needed, x_free=x_free,
            carried=prepared, residual=bool(residual), factor=factor, gate=gate, dropout=dropout, seed=seed,
            by_clusters=choice.runs_clusters(x.device),
        )  # fmt: skip
    else:
        call = Call(eps, activation, z.dtype, factor, gate, None if seed is None else Drop(dropout, seed))
        how = call, needed, x_free, index, bool(residual)
        grads = rows.adapter_backward(_on_rows(x), dy, x, z, mean, rstd, weights, *how)
    tensors = x, *weights, *(() if gate is None else (gate,))
    return [_no_grad(x if t is None else t) if g is None else g for t, g in zip(tensors, grads, strict=True)]


def _on_rows(x: Tensor) -> rows.Rows:
    return native if runs_native(x.device.type, x.dtype) else closed_form


def _optional(args, start):  # type: ignore[no-untyped-def]
    """From x_free to seed: the dispatcher omits the last that equal their default."""
    given = args[start:]
    return (*given, *_DEFAULTS[len(given) :])


def _with_scale(weights: Sequence[Tensor | None], scale: Tensor | None) -> Sequence[Tensor | None]:
    return weights if scale is None else (*weights, scale)


def _run_prepare(*args):  # type: ignore[no-untyped-def]
    """The preparation, on a device that runs the kernels; ``args`` follow the schema."""
    from adapterkern.ops.kernels import launch

    scale, factor = args[7:] + (None, 1.0)[len(args) - 7 :]
    return launch.prepare_weights(_with_scale(args[:6], scale), args[6], factor).tensors()


for _device_type in ("CPU", "CUDA"):
    _lib.impl("adapter_forward", run_forward, _device_type)
    _lib.impl("adapter_backward", run_backward, _device_type)
    _lib.impl("prepare_weights", _run_prepare, _device_type)


# Fake, autograd and autocast, the same for every device


def _no_grad(like: Tensor) -> Tensor:
    """The placeholder in an operator's results for a gradient that was not requested."""
    return like.new_empty(0)


@torch.library.register_fake("adapterkern::adapter_forward", lib=_lib)
def _fake_forward(x, *args):  # type: ignore[no-untyped-def]
    norm_weight, down_weight, compute_dtype, save = args[0], args[2], args[8], args[9]
    y = x.new_empty(x.shape)
    stats = closed_form.stats_dtype(x.dtype)
    if not save:
        return y, *(x.new_empty(0) for _ in range(3))
    rows = x.numel() // x.shape[-1]
    z = x.new_empty((rows, down_weight.shape[-2]), dtype=operand_dtype(x, compute_dtype))
    kept = 0 if norm_weight is None else rows
    return y, z, x.new_empty(kept, dtype=stats), x.new_empty(kept, dtype=stats)


@torch.library.register_fake("adapterkern::adapter_backward", lib=_lib)
def _fake_backward(dy, x, z, mean, rstd, *args):  # type: ignore[no-untyped-def]
    _, _, _, _, scale, _, gate, _, _ = _optional(args, 10)
    weights, needed = _with_scale(args[:6], scale), args[9]
    tensors = (x, *(x if w is None else w for w in weights), *(() if gate is None else (gate,)))
    return [t.new_empty(t.shape) if wanted else _no_grad(t) for t, wanted in zip(tensors, needed, strict=True)]


@torch.library.register_fake("adapterkern::prepare_weights", lib=_lib)
def _fake_prepare(*args):  # type: ignore[no-untyped-def]
    from adapterkern.ops.kernels.weights import empty_prepared

    return empty_prepared(args[2], args[6], args[0] is not None).tensors()


def _carried(
    x: Tensor, weights: Sequence[Tensor | None], dtype: torch.dtype, scale: Tensor | None, factor: float
) -> tuple[Tensor, ...] | None:
    """The prepared weights to hand on, if the backward would not find the forward's in the cache."""
    if not runs_triton(x.device.type, x.dtype):
        return None
    from adapterkern.ops.kernels import cache

    own = _with_scale(weights, scale)
    traced = type(x) is not Tensor and is_fake(x) and not cache.frozen(own)
    return _prepare(*weights, dtype, scale, factor) if traced or cache.must_carry(own, dtype, factor) else None


class Differentiable(torch.autograd.Function):
    """The forward operator's gradient. Without a keyset it runs without torch's dispatcher, see needs_no_dispatcher.

    Registered by hand: ``torch.library.register_autograd`` walks the schema in Python in every call, which took 48 of a
    call's 136 µs of host time (CPU, loaded machine).
    """

    @staticmethod
    def forward(ctx, keyset, *args):  # type: ignore[no-untyped-def]
        ctx.arguments = len(args)
        x, *weights = args[:7]
        ctx.eps, ctx.activation, compute_dtype = args[7:10]
        ctx.compute_dtype = compute_dtype or x.dtype
        ctx.x_free, index, prepared, residual, scale, ctx.factor, gate, ctx.dropout, seed = _optional(args, 11)
        ctx.residual = residual is not None
        ctx.by_dispatcher = keyset is not None
        if ctx.by_dispatcher:
            with torch._C._AutoDispatchBelowAutograd():
                carry = x, weights, ctx.compute_dtype, scale, ctx.factor
                if prepared is None and (prepared := _carried(*carry)) is not None:
                    args = (*args[:11], ctx.x_free, index, prepared, *args[14:])
                y, z, mean, rstd = forward_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        else:
            y, z, mean, rstd = run_forward(*args)
        kept = index, scale, gate, seed, *weights, *(prepared or ())
        ctx.save_for_backward(y if ctx.x_free else x, z, mean, rstd, *kept)
        ctx.mark_non_differentiable(z, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, z, mean, rstd

    @staticmethod
    def backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
        if dy is None:
            return (None,) * (1 + ctx.arguments)
        x, z, mean, rstd, index, scale, gate, seed, *rest = ctx.saved_tensors
        weights, prepared = rest[:6], rest[6:] or None
        needed = list(ctx.needs_input_grad[1:8])
        if scale is not None:
            needed.append(ctx.needs_input_grad[16])
        if gate is not None:
            needed.append(ctx.needs_input_grad[18])
        results = [None] * (1 + ctx.arguments)
        if ctx.residual:
            results[15] = dy
        if not any(needed):
            return tuple(results)
        how = ctx.eps, ctx.activation, ctx.compute_dtype, needed, ctx.x_free, index, prepared
        more = (ctx.residual, scale, ctx.factor, gate, ctx.dropout, seed) if ctx.arguments > 14 else ()
        direct = not (ctx.by_dispatcher or torch.is_grad_enabled())
        given = weights
        if more or weights[0] is None:
            given = [t for t in (*weights, scale, gate, seed) if t is not None]
        run = run_backward if direct and needs_no_dispatcher(x, dy, z, mean, rstd, *given) else backward_op
        grads = run(dy, x, z, mean, rstd, *weights, *how, *more)
        grads = [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]
        results[1:8] = grads[:7]
        if scale is not None:
            results[16] = grads[7]
        if gate is not None:
            results[18] = grads[-1]
        return tuple(results)


class _DifferentiableOnce(torch.autograd.Function):
    """The backward operator under ``create_graph=True``: its values are right, differentiating them is an error."""

    @staticmethod
    def forward(ctx, keyset, *args):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(backward_op.redispatch(keyset & torch._C._after_autograd_keyset, *args))

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise NotImplementedError(
            "adapterkern.adapter: the fused backward is not differentiable a second time; "
            "pass fused=False where you need create_graph=True"
        )


def _register_autograd(name: str, function: type[torch.autograd.Function], tensors: int, last: slice) -> None:
    """``tensors``: the number of leading arguments that may require a gradient; ``last``: the trailing ones."""
    op = getattr(torch.ops.adapterkern, name).default

    def kernel(keyset, *args):  # type: ignore[no-untyped-def]
        given = args[:tensors] + args[last]
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given):
            return function.apply(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _lib.impl(name, kernel, "Autograd", with_keyset=True)


_register_autograd("adapter_forward", Differentiable, 7, slice(14, 18))
_register_autograd("adapter_backward", _DifferentiableOnce, 11, slice(19, 22))


def _register_autocast(device_type: str) -> None:
    """Under autocast, the products' operands take autocast's dtype; x, y and the parameters keep theirs.

    Inside both operators autocast is off: they choose each dtype themselves.
    """
    key = f"Autocast{device_type.upper()}"
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def forward(x, *args):  # type: ignore[no-untyped-def]
        weights_and_how, compute_dtype, rest = args[:8], args[8], args[9:]
        if compute_dtype is None and x.dtype != torch.float64:
            compute_dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return forward_op(x, *weights_and_how, compute_dtype, *rest)

    def backward(*args):  # type: ignore[no-untyped-def]
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return backward_op(*args)

    _lib.impl("adapter_forward", forward, key)
    _lib.impl("adapter_backward", backward, key)


_register_autocast("cpu")
_register_autocast("cuda")
