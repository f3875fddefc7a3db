"""``adapter_and_norm()``: the adapter, and the frozen RMSNorm that reads its y, in one call.

On a CPU one pass over blocks of rows makes both, and the backward forms y's gradient where it reads it
(native_normed.py). On a GPU the kernel by clusters makes both, else one kernel follows another (triton_normed.py).
There is no operator for this: what traces, listens or transforms sees the adapter's operator and torch's RMSNorm.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkern.ops import graphs, native_normed, triton_normed
from adapterkern.ops.checks import check_dropout, check_inputs, check_norm
from adapterkern.ops.choice import fused_enabled, in_transform, operand_dtype, prefers_eager, runs_triton
from adapterkern.ops.dropout import Drop
from adapterkern.ops.operator import adapter, as_seed
from adapterkern.ops.reference import Weights, rms_norm_backward
from adapterkern.ops.registered import backward_op, needs_no_dispatcher, nobody_listens
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
    the operator to pay, these two calls run.

    Args:
        x, norm_weight, ..., up_bias, eps, activation, fused, x_free, scale, dropout, seed: as ``adapter``'s.
        next_weight: the RMSNorm's factor, ``(d,)``, of any floating dtype. It is frozen: no gradient reaches it.
        next_eps: added to the mean square.
        added: what is added to x first, as a block's output is to the residual stream: of x's shape, dtype and device.

    Returns:
        y and n, ``(..., d)`` in x's dtype. n is not rounded before the product with ``next_weight``.

    Raises:
        TypeError, ValueError: as ``adapter``; or ``next_weight`` requires a gradient.
    """
    weights = Weights(norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias)
    check_inputs(x, weights, eps, activation, scale=scale)
    check_norm(x, next_weight, next_eps, added)
    check_dropout(dropout, seed, x)
    if fused and fused_enabled() and not x_free and not in_transform():
        learned, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
        tensors = [t for t in (x, added, *weights, learned) if t is not None]
        save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        others = [next_weight, *([seed] if isinstance(seed, Tensor) else [])]
        if not prefers_eager(x, len(down_weight), save) and _runs_kernels(*tensors, *others):
            kind = x.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            how = _How(eps, activation, next_eps, operand_dtype(x, autocast), factor, dropout)
            drawn = as_seed(seed, x.device) if dropout else None
            args = (x, added, *weights, learned, next_weight, drawn, how)
            return _Normed.apply(*args) if save else _forward(*args, save=False)[:2]
    stream = x if added is None else x + added
    y = adapter(
        stream, *weights, eps=eps, activation=activation, fused=fused, x_free=x_free, scale=scale, dropout=dropout,
        seed=seed,
    )  # fmt: skip
    return y, rms_norm(y, next_weight, next_eps)


class _How(NamedTuple):
    """What is no tensor."""

    eps: float
    activation: str
    next_eps: float
    compute: torch.dtype
    factor: float
    rate: float  # of dropout

    def drop(self, seed: Tensor | None) -> Drop | None:
        return None if seed is None else Drop(self.rate, seed)


def _runs_kernels(x: Tensor, *others: Tensor) -> bool:
    """Whether kernels of ours run the call, and nothing is to see an operator in their place."""
    if needs_no_dispatcher(x, *others):
        return True
    on_gpu = not torch.compiler.is_compiling() and runs_triton(x.device.type, x.dtype) and nobody_listens(x, *others)
    return on_gpu and not graphs.recording(x.device)  # where a third operator prepares the weights


def _forward(x, added, *args, save):  # type: ignore[no-untyped-def]
    """y and n in x's shape; the rest as the kernels return it. ``args`` follow ``_Normed``'s."""
    *weights, learned, next_weight, seed, how = args
    rows = x.reshape(-1, x.shape[-1])
    others = None if added is None else added.reshape(rows.shape)
    norm, of_adapter = (next_weight, how.next_eps), (how.eps, how.activation, how.compute)
    own = _one(learned, how), how.drop(seed)
    y, n, *rest = _on(x).forward(rows, others, weights, *norm, *of_adapter, save, *own)
    # Not y.view: autograd forbids in-place writes to a view that a Function returns.
    return *(torch.ops.aten._unsafe_view(t, x.shape) for t in (y, n)), *rest


def _on(x: Tensor) -> Any:
    return triton_normed if runs_triton(x.device.type, x.dtype) else native_normed


class _Normed(torch.autograd.Function):
    """The kernels' gradient."""

    @staticmethod
    def forward(ctx, x, added, *args):  # type: ignore[no-untyped-def]
        y, n, s, *kept = _forward(x, added, *args, save=True)
        *tensors, ctx.how = args
        ctx.save_for_backward(x if added is None else s.view(x.shape), y, *kept, *tensors)
        ctx.set_materialize_grads(False)
        return y, n

    @staticmethod
    def backward(ctx, dy, dn):  # type: ignore[no-untyped-def]
        of_x, of_added, *needed = ctx.needs_input_grad[:9]
        none = (None,) * 12
        if dy is None and dn is None:
            return none
        s, y, *kept, learned, next_weight, seed = ctx.saved_tensors
        needed = [of_x or of_added, *needed[: 6 if learned is None else 7]]
        args = dy, dn, s, y, kept[:4], kept[4:], learned, next_weight, seed, needed, ctx.how
        given = [t for t in (s, y, *kept, dy, dn, learned, next_weight, seed) if t is not None]
        direct = dn is not None and not torch.is_grad_enabled() and _runs_kernels(*given)
        grads = (_by_kernels if direct else _by_operators)(*args)
        dx, *rest = (g if wanted else None for g, wanted in zip(grads, needed, strict=True))
        return (dx if of_x else None, dx if of_added else None, *rest, *none)[:12]


def _by_kernels(dy, dn, s, y, kept, weights, learned, next_weight, seed, needed, how):  # type: ignore[no-untyped-def]
    dy, dn, rows, y = (None if t is None else t.reshape(-1, s.shape[-1]) for t in (dy, dn, s, y))
    of_adapter = (how.eps, how.activation, needed, _one(learned, how), how.drop(seed))
    dx, *grads = _on(s).backward(dy, dn, rows, y, *kept, weights, next_weight, *of_adapter)
    if learned is not None and grads[6] is not None:
        grads[6] = grads[6].view(learned.shape)
    return [None if dx is None else dx.view(s.shape), *grads]


def _by_operators(dy, dn, s, y, kept, weights, learned, next_weight, seed, needed, how):  # type: ignore[no-untyped-def]
    """What PyTorch can trace, listen to and transform."""
    *saved, rho = kept
    if dn is not None:
        wide = rho.dtype
        own = rms_norm_backward(dn.to(wide), y.to(wide), rho.view(*y.shape[:-1], 1), next_weight.to(wide))
        dy = (own if dy is None else dy + own).to(s.dtype)
    more = False, None, None, False, learned, how.factor, None, how.rate, seed
    return backward_op(dy, s, *saved, *weights, how.eps, how.activation, how.compute, needed, *more)


def _one(learned: Tensor | None, how: _How) -> Tensor | float:
    """The scale as the kernels take it."""
    return how.factor if learned is None else learned.reshape(())
