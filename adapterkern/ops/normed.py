"""``adapter_and_norm()``: the adapter, and the frozen RMSNorm that reads its y, in one call.

On a CPU one pass over blocks of rows makes y and n (native_normed.py); on a GPU the kernel by clusters does, else one
kernel follows another (triton_normed.py). To autograd they are two functions, x → y → n: a gradient at y is y's whole
gradient. There is no operator for this: what traces, listens or transforms sees the adapter's operator and torch's
RMSNorm.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkern.ops import graphs, native_normed, triton_normed
from adapterkern.ops.call import Call
from adapterkern.ops.checks import check_dropout, check_inputs, check_norm
from adapterkern.ops.choice import fused_enabled, in_transform, operand_dtype, prefers_eager, runs_native, runs_triton
from adapterkern.ops.dropout import Drop
from adapterkern.ops.operator import adapter, as_seed
from adapterkern.ops.reference import Weights, rms_norm_backward
from adapterkern.ops.reference import rms_norm as rms_norm_equations
from adapterkern.ops.registered import backward_op, nobody_listens, run_backward
from adapterkern.ops.stock import rms_norm


def adapter_and_norm(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    next_weight: Tensor,
    *,
    next_eps: float = 1e-6,
    added: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    fused: bool = True,
    x_free: bool = False,
    scale: Tensor | float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """The adapter, and the RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) of its y. Equivalent to:

        y = adapter(x + added, ...)
        n = F.rms_norm(y, (d,), next_weight, next_eps)

    On a CPU the kernels make both while a block of rows is in the caches, on a GPU by clusters while rows are in shared
    memory; the backward keeps x + added and y. In compiled code, with ``x_free``, and for inputs that are too small for
    the operator to pay, these two calls run. ``residual``, ``gate`` and ``index`` are ``adapter``'s alone.

    Args:
        x, norm_weight, ..., up_bias, eps, activation, fused, x_free, scale, dropout, seed: as ``adapter``'s.
        next_weight: the RMSNorm's factor, ``(d,)``, of any floating dtype. It is frozen: no gradient reaches it.
        next_eps: added to the mean square: a backbone's ``config.rms_norm_eps``.
        added: what is added to x first, as a block's output is to the residual stream: of x's shape, dtype and device.

    Returns:
        y and n, ``(..., d)`` in x's dtype. n is not rounded before the product with ``next_weight``.

    Raises:
        TypeError, ValueError: as ``adapter``; or ``next_weight`` requires a gradient.
    """
    weights = norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias
    y, made = adapter_before_norm(
        x, *weights, next_weight, next_eps=next_eps, added=added, eps=eps, activation=activation, fused=fused,
        x_free=x_free, scale=scale, dropout=dropout, seed=seed,
    )  # fmt: skip
    return y, rms_norm(y, next_weight, next_eps) if made is None else made.of(y)


def adapter_before_norm(
    x: Tensor,
    *weights_and_next: Any,
    next_eps: float,
    added: Tensor | None = None,
    eps: float,
    activation: str,
    fused: bool,
    x_free: bool,
    scale: Tensor | float,
    dropout: float,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, "Made | None"]:
    """y, and the norm's output if it was made, too. Arguments and errors are those of ``adapter_and_norm``."""
    weights, next_weight = Weights(*weights_and_next[:6]), weights_and_next[6]
    check_inputs(x, weights, eps, activation, scale=scale)
    check_norm(x, next_weight, next_eps, added)
    check_dropout(dropout, seed, x)
    if fused and fused_enabled() and not x_free and not in_transform():
        learned, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
        tensors = [t for t in (x, added, *weights, learned) if t is not None]
        save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        others = [next_weight, *([seed] if isinstance(seed, Tensor) else [])]
        if not prefers_eager(x, len(weights.down_weight), save) and _runs_kernels(*tensors, *others):
            kind = x.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            how = _How(Call(eps, activation, operand_dtype(x, autocast), factor), dropout)
            made = Made(next_weight, next_eps)
            drawn = as_seed(seed, x.device) if dropout else None
            args = x, added, *weights, learned, drawn, made, how
            return _Adapter.apply(*args) if save else _forward(*args, save=False)[0], made
    stream = x if added is None else x + added
    y = adapter(
        stream, *weights, eps=eps, activation=activation, fused=fused, x_free=x_free, scale=scale, dropout=dropout,
        seed=seed,
    )  # fmt: skip
    return y, None


class Made:
    """A norm's output, made with its input."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self.n: Tensor
        self.rho: Tensor  # (T,); empty if nothing keeps it

    def of(self, y: Tensor) -> Tensor:
        """n as a function of y, which is the input, to autograd."""
        if not (torch.is_grad_enabled() and y.requires_grad):
            return self.n
        # Nothing required a gradient when they were made, and since then somebody has asked y for one.
        return _Norm.apply(y, self) if len(self.rho) else rms_norm(y, self.weight, self.eps)


class _How(NamedTuple):
    """What is no tensor."""

    call: Call  # with the scale if that is a number
    rate: float  # of dropout


def _runs_kernels(x: Tensor, *others: Tensor) -> bool:
    """Whether kernels of ours run the call, and nothing is to see an operator in their place."""
    if torch.compiler.is_compiling():  # first: it cannot trace the rest
        return False
    kind = x.device.type, x.dtype
    # Where a graph is recorded, a third operator prepares the weights.
    runs = runs_native(*kind) or (runs_triton(*kind) and not graphs.recording(x.device))
    return runs and nobody_listens(x, *others)


def _forward(x, added, *args, save):  # type: ignore[no-untyped-def]
    """y in x's shape, s, z, mean and rstd; n and ρ go to ``made``. ``args`` follow ``_Adapter``'s."""
    *weights, learned, seed, made, how = args
    rows = x.reshape(-1, x.shape[-1])
    others = None if added is None else added.reshape(rows.shape)
    call = how.call._replace(drop=None if seed is None else Drop(how.rate, seed))
    call = call if learned is None else call._replace(scale=learned.reshape(()))
    y, n, s, *saved, made.rho = _on(x).forward(rows, others, weights, made.weight, made.eps, call, save)
    # Not y.view: autograd forbids in-place writes to a view that a Function returns.
    y, made.n = (torch.ops.aten._unsafe_view(t, x.shape) for t in (y, n))
    return y, s, *saved


def _on(x: Tensor) -> Any:
    return triton_normed if runs_triton(x.device.type, x.dtype) else native_normed


class _Adapter(torch.autograd.Function):
    """x → y."""

    @staticmethod
    def forward(ctx, x, added, *args):  # type: ignore[no-untyped-def]
        y, s, *saved = _forward(x, added, *args, save=True)
        *tensors, _, ctx.how = args
        ctx.save_for_backward(x if added is None else s.view(x.shape), *saved, *tensors)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        of_x, of_added, *needed = ctx.needs_input_grad[:9]
        none = (None,) * 12
        if dy is None:
            return none
        s, z, mean, rstd, *weights, learned, seed = ctx.saved_tensors
        call, rate = ctx.how
        needed = [of_x or of_added, *needed[: 6 if learned is None else 7]]
        given = [t for t in (s, dy, z, mean, rstd, *weights, learned, seed) if t is not None]
        run = run_backward if not torch.is_grad_enabled() and _runs_kernels(*given) else backward_op
        more = False, None, None, False, learned, call.scale, None, rate, seed
        grads = run(dy, s, z, mean, rstd, *weights, call.eps, call.activation, call.compute, needed, *more)
        dx, *rest = (g if wanted else None for g, wanted in zip(grads, needed, strict=True))
        return (dx if of_x else None, dx if of_added else None, *rest, *none)[:12]


class _Norm(torch.autograd.Function):
    """y → n."""

    @staticmethod
    def forward(ctx, y, made):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y, made.rho, made.weight)
        ctx.eps = made.eps
        n = made.n
        del made.n  # which autograd's output is from now on
        return n

    @staticmethod
    def backward(ctx, dn):  # type: ignore[no-untyped-def]
        y, rho, weight = ctx.saved_tensors
        if not torch.is_grad_enabled() and _runs_kernels(y, dn, rho, weight):
            d = y.shape[-1]
            return _on(y).norm_backward(dn.reshape(-1, d), y.reshape(-1, d), rho, weight).view(y.shape), None
        # What PyTorch can trace, listen to, transform and differentiate
        wide = torch.promote_types(y.dtype, torch.float32)
        rstd = rms_norm_equations(y.to(wide), weight.to(wide), ctx.eps)[1]
        return rms_norm_backward(dn.to(wide), y.to(wide), rstd, weight.to(wide)).to(y.dtype), None
