"""``adapter()``: the operator as users call it. registered.py has what PyTorch sees of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern.ops.checks import check_dropout, check_gate, check_inputs
from adapterkern.ops.choice import fused_enabled, in_transform, prefers_eager
from adapterkern.ops.dropout import Drop
from adapterkern.ops.reference import Weights
from adapterkern.ops.registered import Differentiable, forward_op, needs_no_dispatcher, run_forward
from adapterkern.ops.stock import eager, eager_autocast, stock_dtype


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
    gate: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """``y = x + W_up · act(W_down · LayerNorm(x) + b_down) + b_up`` (Houlsby et al. 2019, arXiv:1902.00751).

    With all arguments ``y = residual + scale · gate · (W_up · dropout(act(W_down · LayerNorm(x) + b_down)) + b_up)``:
    with a residual that is not x, the parallel adapter of He et al. (2022, arXiv:2110.04366). Equivalent to:

        h = act(F.linear(F.layer_norm(x, (d,), norm_weight, norm_bias, eps), down_weight, down_bias))
        y = residual + scale * gate[..., None] * F.linear(F.dropout(h, dropout), up_weight, up_bias)

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
            adapter of each sequence, or of each row: int64 or int32, of shape ``x.shape[:k]`` for some k < x.dim(); −1
            is none, y = x, or y = residual. Of shape ``(*x.shape[:-1], k)`` it holds k adapters of each row, whose
            branches are added: ``y = residual + Σᵢ gateᵢ · scaleᵢ · branchᵢ(x)``.
        residual: what the branch is added to, of x's shape, dtype and device, any strides; None is x.
        scale: a number, or a tensor of one element, which may require a gradient; with ``index`` a number or ``(n,)``.
            It is a factor of the prepared W_up and b_up, so that it costs nothing per row.
        gate: a weight of each row's branch, as a router gives it: floating point, of shape ``x.shape[:k]`` for some
            k < x.dim(); with k adapters of each row, of the shape of ``index``. It may require a gradient.
        dropout: the probability p, 0 <= p < 1, that a number of h is set to 0; the others are multiplied by 1/(1 − p)
            (Srivastava et al. 2014). The backward makes the mask again: nothing keeps it. An adapter that is not being
            trained is called without.
        seed: what the mask is drawn from: int64, a number or a tensor of one element on x's device. The same seed and
            the same place in x give the same mask, on a CPU, on a GPU and with ``fused=False``. None draws one from
            torch's generator of x's device.

    Returns:
        y, ``(..., d)`` in x's dtype. Parameters of another dtype than x are cast to x's dtype (to autocast's while
        autocast is on) for the matrix products; their gradients have their own dtype.

    CUDA graphs: a replay uses the parameters' current values. The exception is parameters that require no gradient and
    that a call has used in these dtypes before the recording: then the graph reads what that call prepared, and sees
    new values only after the next call outside a graph.

    Raises:
        TypeError: an argument is not a dense tensor of a supported floating dtype, ``index`` or ``seed`` is not of
            integers, or ``eps`` or ``dropout`` is not a number.
        ValueError: a shape, device or value does not fit; the message names the argument.
    """
    weights = Weights(norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias)
    if isinstance(index, Tensor) and isinstance(x, Tensor) and index.dim() == x.dim():
        how = {"eps": eps, "activation": activation, "fused": fused, "scale": scale, "dropout": dropout}
        return _several(x, weights, index, residual, gate, x_free, seed, how)
    check_inputs(x, weights, eps, activation, index, residual, scale)
    if x_free and residual is not None:
        raise ValueError("x_free: expected False with a residual, from whose sum x cannot be recovered, got True")
    drop = None
    if gate is not None:
        gate = _of_rows(gate, x)
    if seed is not None or type(dropout) is not float or dropout:
        check_dropout(dropout, seed, x)
        drop = Drop(dropout, as_seed(seed, x.device)) if dropout else None
    tensors: Sequence[Tensor] = (x, *weights)
    more: tuple[Any, ...] = ()
    if (
        residual is not None
        or norm_weight is None
        or type(scale) is not float
        or scale != 1
        or gate is not None
        or drop is not None
    ):
        learned, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
        rate, drawn = (0.0, None) if drop is None else (drop.rate, drop.seed)
        more = (None, residual, learned, factor, gate, rate, drawn)
        tensors = [t for t in (*tensors, residual, learned, gate, drawn) if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not (fused and fused_enabled()) or prefers_eager(x, down_weight.shape[-2], save) or in_transform():
        if (dtype := stock_dtype(x, weights)) is not None:
            weights = Weights(*(w if w is None else w.to(dtype) for w in weights))  # type: ignore[arg-type]
        with eager_autocast(x):
            return eager(x, weights, index, residual, scale, gate, drop, {"eps": eps, "activation": activation})
    if index is None and not x_free and needs_no_dispatcher(*tensors):
        compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        args = (x, *weights, eps, activation, compute, save, *((False, None, *more) if more else ()))
        return (Differentiable.apply(None, *args) if save else run_forward(*args))[0]
    return forward_op(x, *weights, eps, activation, None, save, x_free, index, *more)[0]


def _several(
    x: Tensor,
    weights: Weights,
    index: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    x_free: bool,
    seed: Tensor | int | None,
    how: dict[str, Any],
) -> Tensor:
    """A call with k adapters of each row: one call each, whose residual is the y of the one before."""
    if index.shape[:-1] != x.shape[:-1] or index.shape[-1] == 0:
        expected = tuple(x.shape[:-1])
        raise ValueError(
            f"index: expected leading dimensions of x, {expected}, or {(*expected, 'k')}, got {tuple(index.shape)}"
        )
    if x_free and index.shape[-1] > 1:
        raise ValueError(
            f"x_free: expected False with {index.shape[-1]} adapters of each row, which all read x, got True"
        )
    if gate is not None:
        check_gate(gate, x, index)
    check_dropout(how["dropout"], seed, x)
    seed = as_seed(seed, x.device) if how["dropout"] else None
    y = residual
    for i in range(index.shape[-1]):
        own = None if gate is None else gate[..., i]
        drawn = None if seed is None else seed + i  # another mask for each
        y = adapter(x, *weights[:], index=index[..., i], residual=y, gate=own, seed=drawn, x_free=x_free, **how)
    return y  # type: ignore[return-value]  # there is at least one


def _of_rows(gate: Tensor, x: Tensor) -> Tensor:
    """``gate`` as the operator takes it: (T,), fp32, or fp64 where x is."""
    check_gate(gate, x)
    gate = gate.to(torch.promote_types(x.dtype, torch.float32))
    shape = x.shape[:-1]
    return gate.reshape((*gate.shape, *(1,) * (len(shape) - gate.dim()))).expand(shape).reshape(-1)


def as_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed as the operator takes it, (1,)."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return seed.reshape(1) if isinstance(seed, Tensor) else torch.tensor([seed], device=device)
