"""The adapter as a PyTorch operator: schema, implementations, fake, autograd and autocast.

Two operators make one differentiable function:

    adapterkern::adapter_forward   x, parameters → y and what the backward needs (z, mean, rstd: nothing of size T×d)
    adapterkern::adapter_backward  dy, x, parameters, z, mean, rstd → the requested gradients

The Triton kernels read the parameters in the form that kernels/weights.py prepares and kernels/cache.py keeps between
calls. Where the cache cannot serve (in a CUDA graph, and in compiled code, which may become one), a third operator
prepares them for one forward and its backward:

    adapterkern::prepare_weights   parameters → the fields of kernels.weights.Prepared

The arguments that a plain call has not come last, so that the dispatcher omits them: residual, and the scale, which is
a tensor, ``scale``, or a number, ``factor``. Below the operator a tensor is the seventh of the parameters. What a
residual's gradient is, dy, needs no operator.

Precision. Parameters keep their own dtype (usually fp32), and so do their gradients. ``compute_dtype`` is
the dtype of the matrix products' operands: x's own dtype, or autocast's while autocast is on. y keeps x's dtype.
Statistics and sums are at least fp32 everywhere.

choice.py decides whether Triton kernels, the closed form or eager PyTorch runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from adapterkern.ops import closed_form, native, rows
from adapterkern.ops.checks import check_inputs
from adapterkern.ops.choice import (
    fused_enabled,
    in_transform,
    keys,
    keys_of_plain_tensors,
    operand_dtype,
    prefers_eager,
    runs_native,
    runs_triton,
)
from adapterkern.ops.reference import Weights, adapter_eager
from adapterkern.ops.stock import eager_autocast, eager_mixed, stock_dtype

_lib = torch.library.Library("adapterkern", "DEF")
_WEIGHTS = (
    "Tensor? norm_weight, Tensor? norm_bias, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias"
)
_lib.define(
    f"adapter_forward(Tensor x, {_WEIGHTS}, float eps, str activation, ScalarType? compute_dtype, bool save,"
    " bool x_free=False, Tensor? index=None, Tensor[]? prepared=None, Tensor? residual=None, Tensor? scale=None,"
    " float factor=1.0) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)"
)
_lib.define(
    f"adapter_backward(Tensor dy, Tensor x, Tensor z, Tensor mean, Tensor rstd, {_WEIGHTS},"
    " float eps, str activation, ScalarType compute_dtype, bool[] needed,"
    " bool x_free=False, Tensor? index=None, Tensor[]? prepared=None, bool residual=False, Tensor? scale=None,"
    " float factor=1.0) -> Tensor[]"
)
_lib.define(
    f"prepare_weights({_WEIGHTS}, ScalarType dtype, Tensor? scale=None, float factor=1.0)"
    " -> (Tensor A, Tensor a_sum, Tensor c, Tensor w_up, Tensor b_up)"
)
_forward = torch.ops.adapterkern.adapter_forward.default
_backward = torch.ops.adapterkern.adapter_backward.default
_prepare = torch.ops.adapterkern.prepare_weights.default


def adapter(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    fused: bool = True,
    x_free: bool = False,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """``y = x + W_up · act(W_down · LayerNorm(x) + b_down) + b_up`` (Houlsby et al. 2019, arXiv:1902.00751).

    With all arguments ``y = residual + scale · (W_up · act(W_down · LayerNorm(x) + b_down) + b_up)``: with a residual
    that is not x, the parallel adapter of He et al. (2022, arXiv:2110.04366). Equivalent to:

        h = act(F.linear(F.layer_norm(x, (d,), norm_weight, norm_bias, eps), down_weight, down_bias))
        y = residual + scale * F.linear(h, up_weight, up_bias)

    Args:
        x: the residual stream, ``(..., d)``; bf16, fp16, fp32 or fp64, any strides.
        norm_weight, norm_bias: LayerNorm's scale and shift, ``(d,)``. None, both: no LayerNorm, h is made of x itself.
        down_weight, down_bias: ``(r, d)`` and ``(r,)``, ``1 <= r <= 512``.
        up_weight, up_bias: ``(d, r)`` and ``(d,)``.
        eps: added to the variance.
        activation: ``"silu"``, ``"gelu"`` (exact), ``"relu"``, ``"tanh"`` or ``"identity"``.
        fused: ``False`` runs the stock PyTorch operations (eager) instead, with the same numbers to rounding.
            Forward-mode AD and torch.func's transforms (grad, vjp, jvp, vmap) run those too: the fused operator has no
            rules for them.
        x_free: keep y instead of x for the backward, which recovers x = y − W_up·h − b_up. This costs no memory if the
            model keeps y anyway (as a fused RMSNorm after the adapter does), but it rounds x once more. The gradients'
            error stays within eager's own bf16 error while the branch is at most about as large as x, and reaches three
            times that where the branch is 10× x. Rows with (almost) no variance lose all accuracy.
        index: mixes n adapters in one call. The parameters are stacked, ``(n, ...)`` each, and ``index`` holds the
            adapter of each sequence: int64 or int32, of shape ``x.shape[:k]`` for some k < x.dim(); −1 is none, y = x,
            or y = residual.
        residual: what the branch is added to, of x's shape, dtype and device, any strides; None is x.
        scale: a number, or a tensor of one element, which may require a gradient; with ``index`` a number or ``(n,)``.
            It is a factor of the prepared W_up and b_up, so that it costs nothing per row.

    Returns:
        y, ``(..., d)`` in x's dtype. Parameters of another dtype than x are cast to x's dtype (to autocast's while
        autocast is on) for the matrix products; their gradients have their own dtype.

    CUDA graphs: a replay uses the parameters' current values. The exception is parameters that require no gradient and
    that a call has used in these dtypes before the recording: then the graph reads what that call prepared, and sees
    new values only after the next call outside a graph.

    Raises:
        TypeError: an argument is not a dense tensor of a supported floating dtype, ``index`` is not a tensor of
            integers, or ``eps`` is not a number.
        ValueError: a shape, device or value does not fit; the message names the argument.
    """
    weights = Weights(norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias)
    check_inputs(x, weights, eps, activation, index, residual, scale)
    if x_free and residual is not None:
        raise ValueError("x_free: expected False with a residual, from whose sum x cannot be recovered, got True")
    tensors: Sequence[Tensor] = (x, *weights)
    more: tuple[Any, ...] = ()
    if residual is not None or norm_weight is None or type(scale) is not float or scale != 1:
        learned, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
        more = (None, residual, learned, factor)
        tensors = [t for t in (*tensors, residual, learned) if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not (fused and fused_enabled()) or prefers_eager(x, down_weight.shape[-2], save) or in_transform():
        if (dtype := stock_dtype(x, weights)) is not None:
            weights = Weights(*(w if w is None else w.to(dtype) for w in weights))  # type: ignore[arg-type]
        how: dict[str, Any] = {"eps": eps, "activation": activation}
        with eager_autocast(x):
            if index is not None:
                return eager_mixed(x, weights, index, residual, scale, how)
            return adapter_eager(x, weights, residual=residual, scale=scale, **how).to(x.dtype)
    if index is None and not x_free and _needs_no_dispatcher(*tensors):
        compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        args = (x, *weights, eps, activation, compute, save, *((False, None, *more) if more else ()))
        return (_Differentiable.apply(None, *args) if save else _run_forward(*args))[0]
    return _forward(x, *weights, eps, activation, None, save, x_free, index, *more)[0]


def _needs_no_dispatcher(x: Tensor, *others: Tensor) -> bool:
    """Whether calling the native kernels at once differs from calling the operator only in the time that it takes.

    Torch's dispatcher enters Python three times in a forward, under autocast, and twice in a backward: 68 of 350 µs of
    a small forward and backward. Subclasses of Tensor, tensors that are not what lies in memory, modes, transforms,
    tracers and profilers see the operator as before. A backward asks again: it may meet what its forward has not.
    """
    return (
        not torch.compiler.is_compiling()  # first: it cannot trace the rest
        and runs_native(x.device.type, x.dtype)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()
        and not torch.jit.is_tracing()
        and all(type(t) in (Tensor, nn.Parameter) and keys(t) in keys_of_plain_tensors() for t in (x, *others))
    )


# Implementations


def _run_forward(x, *args):  # type: ignore[no-untyped-def]
    """The operator's forward on any device; ``args`` follow the schema."""
    eps, activation, compute_dtype, save = args[6:10]
    _, index, prepared, residual, scale, factor = _optional(args, 10)
    weights = _with_scale(args[:6], scale)
    if not runs_triton(x.device.type, x.dtype):
        compute = operand_dtype(x, compute_dtype)
        how = eps, activation, compute, save, index, residual, factor
        return rows.adapter_forward(_on_rows(x), x, weights, *how)
    from adapterkern.ops.kernels import launch  # Triton takes a third of a second to import

    return launch.adapter_forward(
        x, weights, index, eps=eps, activation=activation, compute=compute_dtype or x.dtype, save=save,
        carried=prepared, residual=residual, factor=factor,
    )  # fmt: skip


def _run_backward(dy, x, z, mean, rstd, *args):  # type: ignore[no-untyped-def]
    """The operator's backward on any device; ``args`` follow the schema, and x is y if ``x_free``."""
    eps, activation, _, needed = args[6:10]
    x_free, index, prepared, residual, scale, factor = _optional(args, 10)
    weights = _with_scale(args[:6], scale)
    if runs_triton(x.device.type, x.dtype):
        from adapterkern.ops.kernels import launch

        grads = launch.adapter_backward(
            dy, x, z, mean, rstd, weights, index, activation=activation, needed=needed, x_free=x_free,
            carried=prepared, residual=bool(residual), factor=factor,
        )  # fmt: skip
    else:
        how = eps, activation, needed, x_free, index, bool(residual), factor
        grads = rows.adapter_backward(_on_rows(x), dy, x, z, mean, rstd, weights, *how)
    return [_no_grad(x if t is None else t) if g is None else g for t, g in zip((x, *weights), grads, strict=True)]


def _on_rows(x: Tensor) -> rows.Rows:
    return native if runs_native(x.device.type, x.dtype) else closed_form


def _optional(args, start):  # type: ignore[no-untyped-def]
    """(x_free, index, prepared, residual, scale, factor): the dispatcher omits the last that equal their default."""
    given = args[start:]
    return (*given, *(False, None, None, None, None, 1.0)[len(given) :])


def _with_scale(weights: Sequence[Tensor | None], scale: Tensor | None) -> Sequence[Tensor | None]:
    return weights if scale is None else (*weights, scale)


def _run_prepare(*args):  # type: ignore[no-untyped-def]
    """The preparation, on a device that runs the kernels; ``args`` follow the schema."""
    from adapterkern.ops.kernels import launch

    scale, factor = args[7:] + (None, 1.0)[len(args) - 7 :]
    return launch.prepare_weights(_with_scale(args[:6], scale), args[6], factor).tensors()


for _device_type in ("CPU", "CUDA"):
    _lib.impl("adapter_forward", _run_forward, _device_type)
    _lib.impl("adapter_backward", _run_backward, _device_type)
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
    weights, needed = _with_scale(args[:6], _optional(args, 10)[4]), args[9]
    tensors = (x, *(x if w is None else w for w in weights))
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


class _Differentiable(torch.autograd.Function):
    """The forward operator's gradient. Without a keyset it runs without torch's dispatcher, see _needs_no_dispatcher.

    Registered by hand: ``torch.library.register_autograd`` walks the schema in Python in every call, which took 48 of a
    call's 136 µs of host time (CPU, loaded machine).
    """

    @staticmethod
    def forward(ctx, keyset, *args):  # type: ignore[no-untyped-def]
        ctx.arguments = len(args)
        x, *weights = args[:7]
        ctx.eps, ctx.activation, compute_dtype = args[7:10]
        ctx.compute_dtype = compute_dtype or x.dtype
        ctx.x_free, index, prepared, residual, scale, ctx.factor = _optional(args, 11)
        ctx.residual = residual is not None
        ctx.by_dispatcher = keyset is not None
        if ctx.by_dispatcher:
            with torch._C._AutoDispatchBelowAutograd():
                carry = x, weights, ctx.compute_dtype, scale, ctx.factor
                if prepared is None and (prepared := _carried(*carry)) is not None:
                    args = (*args[:11], ctx.x_free, index, prepared, *args[14:])
                y, z, mean, rstd = _forward.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        else:
            y, z, mean, rstd = _run_forward(*args)
        ctx.save_for_backward(y if ctx.x_free else x, z, mean, rstd, index, scale, *weights, *(prepared or ()))
        ctx.mark_non_differentiable(z, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, z, mean, rstd

    @staticmethod
    def backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
        if dy is None:
            return (None,) * (1 + ctx.arguments)
        x, z, mean, rstd, index, scale, *rest = ctx.saved_tensors
        weights, prepared = rest[:6], rest[6:] or None
        needed = list(ctx.needs_input_grad[1:8])
        if scale is not None:
            needed.append(ctx.needs_input_grad[16])
        results = [None] * (1 + ctx.arguments)
        if ctx.residual:
            results[15] = dy
        if not any(needed):
            return tuple(results)
        how = ctx.eps, ctx.activation, ctx.compute_dtype, needed, ctx.x_free, index, prepared
        more = (ctx.residual, scale, ctx.factor) if ctx.arguments > 14 else ()
        direct = not (ctx.by_dispatcher or torch.is_grad_enabled())
        given = weights if scale is None and weights[0] is not None else [t for t in (*weights, scale) if t is not None]
        run = _run_backward if direct and _needs_no_dispatcher(x, dy, z, mean, rstd, *given) else _backward
        grads = run(dy, x, z, mean, rstd, *weights, *how, *more)
        grads = [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]
        results[1:8] = grads[:7]
        if scale is not None:
            results[16] = grads[7]
        return tuple(results)


class _DifferentiableOnce(torch.autograd.Function):
    """The backward operator under ``create_graph=True``: its values are right, differentiating them is an error."""

    @staticmethod
    def forward(ctx, keyset, *args):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_backward.redispatch(keyset & torch._C._after_autograd_keyset, *args))

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise NotImplementedError(
            "adapterkern.adapter: the fused backward is not differentiable a second time; "
            "pass fused=False where you need create_graph=True"
        )


def _register_autograd(name: str, function: type[torch.autograd.Function], tensors: int, last: slice) -> None:
    """``tensors``: the number of leading arguments that are tensors, or None; ``last``: the trailing ones."""
    op = getattr(torch.ops.adapterkern, name).default

    def kernel(keyset, *args):  # type: ignore[no-untyped-def]
        given = args[:tensors] + args[last]
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
            return function.apply(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _lib.impl(name, kernel, "Autograd", with_keyset=True)


_register_autograd("adapter_forward", _Differentiable, 7, slice(14, 16))
_register_autograd("adapter_backward", _DifferentiableOnce, 11, slice(19, 20))


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
            return _forward(x, *weights_and_how, compute_dtype, *rest)

    def backward(*args):  # type: ignore[no-untyped-def]
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return _backward(*args)

    _lib.impl("adapter_forward", forward, key)
    _lib.impl("adapter_backward", backward, key)


_register_autocast("cpu")
_register_autocast("cuda")
