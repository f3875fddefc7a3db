"""The adapter as a PyTorch operator: schema, input checks, fake, autograd, autocast and the CPU implementation.

Two operators make one differentiable function:

    adapterkern::adapter_forward   x, parameters → y and what the backward needs (z, mean, rstd: nothing of size T×d)
    adapterkern::adapter_backward  dy, x, parameters, z, mean, rstd → the gradients that are asked for

Precision. Parameters keep their own dtype (fp32 as a rule) and their gradients come back in it. ``compute_dtype`` is
the dtype of the matrix products' operands: x's own dtype, or autocast's where autocast is on. y keeps x's dtype.
Statistics and sums are at least fp32 everywhere.

The CPU implementation is built from the ATen operations that are fast there (native LayerNorm, mkldnn's products) and
the closed form, which trades passes over T×d numbers for a few over r×d: it pays where T is many times r. Small inputs
on CPU take the stock composition instead (``uses_composition``), which has the least overhead.
"""

import contextlib
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern.reference import ACTIVATIONS, Weights, adapter_eager

MAX_ADAPTER_DIM = 512
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_lib = torch.library.Library("adapterkern", "DEF")
_WEIGHTS = (
    "Tensor norm_weight, Tensor norm_bias, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias"
)
_lib.define(
    f"adapter_forward(Tensor x, {_WEIGHTS}, float eps, str activation, ScalarType? compute_dtype, bool save)"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)"
)
_lib.define(
    f"adapter_backward(Tensor dy, Tensor x, Tensor z, Tensor mean, Tensor rstd, {_WEIGHTS},"
    " float eps, str activation, ScalarType compute_dtype, bool[] needed) -> Tensor[]"
)
_forward = torch.ops.adapterkern.adapter_forward.default
_backward = torch.ops.adapterkern.adapter_backward.default


def fused_enabled() -> bool:
    """False when ``ADAPTERKERN_FUSED=0`` in the environment turns every fused path off, for bisecting."""
    return os.environ.get("ADAPTERKERN_FUSED", "1") != "0"


def adapter(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    fused: bool = True,
) -> Tensor:
    """``y = x + W_up · act(W_down · LayerNorm(x) + b_down) + b_up`` (Houlsby et al. 2019, arXiv:1902.00751).

    Equivalent to::

        h = act(F.linear(F.layer_norm(x, (d,), norm_weight, norm_bias, eps), down_weight, down_bias))
        y = x + F.linear(h, up_weight, up_bias)

    Args:
        x: the residual stream, ``(..., d)``; bf16, fp16, fp32 or fp64, any strides.
        norm_weight, norm_bias: LayerNorm's scale and shift, ``(d,)``.
        down_weight, down_bias: ``(r, d)`` and ``(r,)``, ``1 <= r <= 512``.
        up_weight, up_bias: ``(d, r)`` and ``(d,)``.
        eps: added to the variance.
        activation: ``"silu"``, ``"gelu"`` (exact), ``"relu"``, ``"tanh"`` or ``"identity"``.
        fused: ``False`` runs the stock PyTorch composition instead, with the same numbers to rounding.

    Returns:
        y, ``(..., d)`` in x's dtype. Parameters of another dtype than x are used in x's dtype (autocast's dtype where
        autocast is on) for the matrix products; their gradients have their own dtype.

    Raises:
        TypeError: an argument is not a tensor of a supported floating dtype.
        ValueError: a shape, device or activation does not fit; the message names the argument.
    """
    weights = Weights(norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias)
    check_inputs(x, weights, eps, activation)
    if not (fused and fused_enabled()) or uses_composition(x, down_weight.shape[0]):
        with eager_autocast(x):
            return adapter_eager(x, weights, eps=eps, activation=activation).to(x.dtype)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    return _forward(x, *weights, eps, activation, None, save)[0]


def uses_composition(x: Tensor, adapter_dim: int) -> bool:
    """Whether ``fused=True`` still runs the stock composition, because x is on CPU and too small for the op to pay.

    On 2 cores (AMD EPYC, AVX-512), forward + backward of the op took 0.79 to 1.02 of the composition's time in bf16 and
    fp32 above these bounds, and up to 2.3 times at one row. Compiled code always holds the op: no guard on a shape.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return x.numel() < 1 << 21 or x.numel() < 8 * adapter_dim * x.shape[-1]


def eager_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast to x's dtype, if x has a low-precision dtype and autocast is off: fp32 modules then take x as it is."""
    kind = x.device.type
    if x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(kind):
        return torch.autocast(kind, dtype=x.dtype)
    return contextlib.nullcontext()


def check_inputs(x: Tensor, weights: Weights, eps: float, activation: str) -> None:
    """Raise the ``TypeError`` or ``ValueError`` that names the first argument that does not fit."""
    for name, t in (("x", x), *weights._asdict().items()):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected dtype bfloat16, float16, float32 or float64, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {t.device}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (..., d) with d >= 1, got {tuple(x.shape)}")
    d = x.shape[-1]
    if weights.down_weight.dim() != 2:
        raise ValueError(f"down_weight: expected shape (r, {d}), got {tuple(weights.down_weight.shape)}")
    r = weights.down_weight.shape[0]
    if not 1 <= r <= MAX_ADAPTER_DIM:
        raise ValueError(f"down_weight: expected 1 <= r <= {MAX_ADAPTER_DIM} rows, got {r}")
    expected = Weights((d,), (d,), (r, d), (r,), (d, r), (d,))  # type: ignore[arg-type]
    for name, t, shape in zip(Weights._fields, weights, expected, strict=True):
        if t.shape != shape:
            raise ValueError(f"{name}: expected shape {shape} for x of shape {tuple(x.shape)}, got {tuple(t.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")


def _operand_dtype(x: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """What the products multiply and z is kept in. CPUs emulate fp16 products, some ten times slower than fp32 ones."""
    dtype = compute_dtype or x.dtype
    return torch.float32 if dtype == torch.float16 and x.device.type == "cpu" else dtype


def _stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# CPU implementation


def _cpu_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    eps: float,
    activation: str,
    compute_dtype: torch.dtype | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute, stats = _operand_dtype(x, compute_dtype), _stats_dtype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    normed, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], norm_weight.to(stats), norm_bias.to(stats), eps)
    z = F.linear(normed.to(compute), down_weight.to(compute), down_bias.to(compute))
    branch = F.linear(ACTIVATIONS[activation].fn(z), up_weight.to(compute), up_bias.to(compute))
    y = branch.add_(rows) if compute == x.dtype else (rows + branch).to(x.dtype)
    if not save:
        return y.view(x.shape), *_no_saved(x)
    return y.view(x.shape), z, mean.view(-1), rstd.view(-1)


def _cpu_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    eps: float,
    activation: str,
    compute_dtype: torch.dtype,
    needed: list[bool],
) -> list[Tensor]:
    need = Weights(*needed[1:])  # type: ignore[arg-type]
    d, compute, stats = x.shape[-1], _operand_dtype(x, compute_dtype), rstd.dtype
    rows, dy_rows = x.reshape(-1, d), dy.reshape(-1, d)
    dy_c = dy_rows.to(compute)
    grads: dict[str, Tensor] = {}
    if need.up_weight:
        grads["up_weight"] = dy_c.T @ ACTIVATIONS[activation].fn(z)
    if need.up_bias:
        grads["up_bias"] = dy_rows.sum(0)  # accumulates in fp32; sum(dtype=fp32) would first copy all of dy

    if needed[0] or any(need[:4]):
        dh = dy_c @ up_weight.to(compute)
        dz = torch.ops.aten.silu_backward(dh, z) if activation == "silu" else dh * ACTIVATIONS[activation].derivative(z)
        gamma, beta, W = norm_weight.to(stats), norm_bias.to(stats), down_weight.to(stats)
    if any(need[:4]):
        s = dz.sum(0).to(stats)
        grads["down_bias"], grads["norm_bias"] = s, s @ W
    if needed[0] or need.norm_weight or need.down_weight:
        # Normalised again rather than kept: T×d numbers that the model would hold until the backward.
        xhat = torch.native_layer_norm(rows, (d,), None, None, eps)[0].to(compute)
    if need.norm_weight or need.down_weight:
        G = (dz.T @ xhat).to(stats)
        grads["norm_weight"] = (G * W).sum(0)
        grads["down_weight"] = (G * gamma).addr_(s, beta)
    if needed[0]:
        # dz·A − c1 is dz times A with its rows centred. ρ goes to the product's small side.
        A = W * gamma
        A = A.sub_(A.mean(1, keepdim=True)).to(compute)
        rho = rstd[:, None]
        u = z - torch.mv(W, beta).add_(down_bias).to(compute)
        c2 = u.mul_(dz).sum(1, keepdim=True).mul_(rho / -d)
        dz = dz.mul_(rho)
        dx = torch.addmm(dy_rows, dz, A) if compute == x.dtype else dz @ A
        dx.addcmul_(xhat, c2)
        dx = (dx if compute == x.dtype else dy_rows + dx).to(x.dtype).view(x.shape)

    weights = (norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias)
    return [
        dx if needed[0] else _no_grad(x),
        *(
            grads[name].to(w.dtype) if wanted else _no_grad(w)
            for name, w, wanted in zip(Weights._fields, weights, need, strict=True)
        ),
    ]


_lib.impl("adapter_forward", _cpu_forward, "CPU")
_lib.impl("adapter_backward", _cpu_backward, "CPU")


# Fake, autograd and autocast, the same for every device


def _no_grad(like: Tensor) -> Tensor:
    """Stands in an operator's list of results for a gradient that was not asked for."""
    return like.new_empty(0)


def _no_saved(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean and rstd of a forward that nothing will differentiate."""
    return x.new_empty(0), x.new_empty(0), x.new_empty(0)


@torch.library.register_fake("adapterkern::adapter_forward", lib=_lib)
def _fake_forward(x, *args):  # type: ignore[no-untyped-def]
    down_weight, compute_dtype, save = args[2], args[8], args[9]
    y = x.new_empty(x.shape)
    stats = _stats_dtype(x.dtype)
    if not save:
        return y, *_no_saved(x)
    rows = x.numel() // x.shape[-1]
    z = x.new_empty((rows, down_weight.shape[0]), dtype=_operand_dtype(x, compute_dtype))
    return y, z, x.new_empty(rows, dtype=stats), x.new_empty(rows, dtype=stats)


@torch.library.register_fake("adapterkern::adapter_backward", lib=_lib)
def _fake_backward(dy, x, z, mean, rstd, *args):  # type: ignore[no-untyped-def]
    tensors, needed = (x, *args[:6]), args[9]
    return [t.new_empty(t.shape) if wanted else _no_grad(t) for t, wanted in zip(tensors, needed, strict=True)]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, *weights = inputs[:7]
    _, z, mean, rstd = output
    ctx.save_for_backward(x, z, mean, rstd, *weights)
    ctx.eps, ctx.activation, compute_dtype = inputs[7:10]
    ctx.compute_dtype = compute_dtype or x.dtype
    ctx.mark_non_differentiable(z, mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 11
    x, z, mean, rstd, *weights = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:7])
    grads = _backward(dy, x, z, mean, rstd, *weights, ctx.eps, ctx.activation, ctx.compute_dtype, needed)
    return (*(g if wanted else None for g, wanted in zip(grads, needed, strict=True)), None, None, None, None)


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        "adapterkern.adapter: the fused backward is not differentiable a second time; "
        "pass fused=False where you need create_graph=True"
    )


torch.library.register_autograd(
    "adapterkern::adapter_forward", _autograd_backward, setup_context=_setup_context, lib=_lib
)
torch.library.register_autograd("adapterkern::adapter_backward", _refuse_double_backward, lib=_lib)


def _register_autocast(device_type: str) -> None:
    """Under autocast the products' operands take autocast's dtype; x, y and the parameters keep theirs.

    Autocast is off inside both operators, which choose each dtype themselves.
    """
    key = f"Autocast{device_type.upper()}"
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def forward(x, *args):  # type: ignore[no-untyped-def]
        *rest, compute_dtype, save = args
        if compute_dtype is None and x.dtype != torch.float64:
            compute_dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return _forward(x, *rest, compute_dtype, save)

    def backward(*args):  # type: ignore[no-untyped-def]
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return _backward(*args)

    _lib.impl("adapter_forward", forward, key)
    _lib.impl("adapter_backward", backward, key)


_register_autocast("cpu")
_register_autocast("cuda")
