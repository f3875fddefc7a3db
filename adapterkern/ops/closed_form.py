"""The operator in the closed form (see reference.py), from PyTorch operations: on a CPU, and for fp64 on any device.

It uses the ATen operations that are fast on a CPU (native LayerNorm, mkldnn's products). The closed form of the
backward replaces passes over T×d numbers by a few over r×d, which pays where T is many times r.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern.ops.call import Call
from adapterkern.ops.dropout import Drop
from adapterkern.ops.reference import ACTIVATIONS, Weights


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and row constants for x of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled(parameter: Tensor, scale: Tensor | float, compute: torch.dtype = torch.float32) -> Tensor:
    """``parameter`` times the scale, with a scale of 1 as it is; rounded neither below fp32 nor below ``compute``."""
    if not isinstance(scale, Tensor) and scale == 1:
        return parameter
    return parameter.to(torch.promote_types(stats_dtype(parameter.dtype), compute)) * scale


def mask_of(drop: Drop | None, z: Tensor) -> Tensor | None:
    """The mask of h, (T, r), not rounded below fp32; None without dropout."""
    return None if drop is None else drop.mask(len(z), z.shape[1], stats_dtype(z.dtype))


def hidden(z: Tensor, activation: str, gate: Tensor | None, mask: Tensor | None) -> Tensor:
    """What W_up multiplies, (T, r) in z's dtype: act(z), masked, times the gate (T,)."""
    h = ACTIVATIONS[activation].fn(z)
    if mask is not None:
        h = h * mask
    return (h if gate is None else h * gate[:, None]).to(z.dtype)


def gated(h: Tensor, up: Tensor, bias: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors and the bias of the up projection; with a gate (T,) its product with the bias is of the product."""
    if gate is None:
        return h, up, bias
    return torch.cat([h, gate[:, None].to(h.dtype)], dim=1), torch.cat([up, bias[:, None]], dim=1), None


def forward(
    rows: Tensor,
    w: Weights,
    call: Call,
    save: bool = True,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, d), z (T, r) in ``call.compute``, mean and rstd (T,) of ``rows`` (T, d); without LayerNorm those are empty.

    ``residual`` is (T, d). All are made whether or not to ``save`` them.
    """
    eps, activation, compute, scale, gate, drop = call
    stats = stats_dtype(rows.dtype)
    if w.norm_weight is None:
        normed, mean, rstd = rows, *(rows.new_empty(0, dtype=stats) for _ in range(2))
    else:
        gamma, beta = w.norm_weight.to(stats), w.norm_bias.to(stats)
        normed, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], gamma, beta, eps)
    z = F.linear(normed.to(compute), w.down_weight.to(compute), w.down_bias.to(compute))
    base = rows if residual is None else residual
    up, bias = scaled(w.up_weight, scale, compute).to(compute), scaled(w.up_bias, scale, compute).to(compute)
    h, up, shift = gated(hidden(z, activation, gate, mask_of(drop, z)), up, bias, gate)
    # Whatever the strides of x and of the residual are, y is contiguous.
    if compute != rows.dtype:
        # The branch comes first: a sum takes its first operand's layout.
        y = (F.linear(h, up, shift) + base).to(rows.dtype)
    elif compute.itemsize > 2 and shift is not None:  # in 16 bits x + b_up would be rounded once more
        y = torch.add(base, shift, out=torch.empty_like(rows, memory_format=torch.contiguous_format)).addmm_(h, up.T)
    elif compute == torch.bfloat16 and rows.is_cpu and _adds_in_the_product():
        y = torch.ops.mkldnn._linear_pointwise.binary(h, base, up, shift, "add")
    else:
        y = F.linear(h, up, shift).add_(base)
    return y, z, mean.view(-1), rstd.view(-1)


@cache
def _adds_in_the_product() -> bool:
    """Whether oneDNN has bf16 products here, which add x and the bias before they round."""
    ops = torch.ops.mkldnn
    return hasattr(ops, "_linear_pointwise") and ops._is_mkldnn_bf16_supported()


def backward(
    dy: Tensor,
    rows: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Weights,
    call: Call,
    needed: Sequence[bool],
    residual: bool = False,
) -> list[Tensor | None]:
    """The gradients of x and the parameters that are ``needed`` (None for the others), each in its tensor's dtype.

    ``residual``: whether the forward had one; dx then lacks dy. After the parameters' come the gradients of a learned
    scale and of a gate.
    """
    eps, activation, compute, scale, gate, drop = call
    need, (need_scale, need_gate) = Weights(*needed[1:7]), needs_extra(needed, call)  # type: ignore[arg-type]
    d, stats = rows.shape[1], rstd.dtype
    dy_c, mask = dy.to(compute), mask_of(drop, z)
    grads: dict[str, Tensor] = {}
    if need.up_weight or need_scale:
        grads["up_weight"] = dy_c.T @ hidden(z, activation, gate, mask)
    if need.up_bias or need_scale:
        # The sum accumulates in fp32; sum(dtype=fp32) would first copy all of dy.
        grads["up_bias"] = dy.sum(0) if gate is None else torch.mv(dy.T, gate.to(dy.dtype))
    made = dict(grads)
    for name, grad in made.items():
        grads[name] = scaled(grad, scale)
    if need_scale:
        products = [(grad.to(stats) * getattr(w, name)).sum() for name, grad in made.items()]
        grads["scale"] = products[0] + products[1]

    if needed[0] or any(need[:4]) or need_gate:
        dh = dy_c @ scaled(w.up_weight, scale, compute).to(compute)
    if gate is not None and need_gate:
        grads["gate"] = (dh * hidden(z, activation, None, mask)).sum(1, dtype=stats)
        grads["gate"] += torch.mv(dy_c, scaled(w.up_bias, scale, compute).to(compute))
    if needed[0] or any(need[:4]):
        if gate is not None:
            dh = dh * gate[:, None]
        if mask is not None:
            dh = dh * mask
        dh = dh.to(compute)
        dz = torch.ops.aten.silu_backward(dh, z) if activation == "silu" else dh * ACTIVATIONS[activation].derivative(z)
        A = W = w.down_weight.to(stats)
    if any(need[:4]):
        s = grads["down_bias"] = dz.sum(0).to(stats)
    if w.norm_weight is None:
        if need.down_weight:
            grads["down_weight"] = dz.T @ rows.to(compute)
    elif needed[0] or any(need[:4]):
        gamma, beta = w.norm_weight.to(stats), w.norm_bias.to(stats)
        if need.norm_bias:
            grads["norm_bias"] = s @ W
        if needed[0] or need.norm_weight or need.down_weight:
            # Normalized again, not saved: the model would hold these T×d numbers until the backward.
            xhat = torch.native_layer_norm(rows, (d,), None, None, eps)[0].to(compute)
            # Where μ is far beyond 1/ρ, a CPU's ρx − ρμ leaves the rounding of ρμ: constant rows are to give 0.
            if rows.is_cpu and len(far := ((mean * rstd).abs() > 16).nonzero().squeeze(1)):
                xhat[far] = rows[far].to(stats).sub_(mean[far, None]).mul_(rstd[far, None]).to(compute)
        if need.norm_weight or need.down_weight:
            G = (dz.T @ xhat).to(stats)
            grads["norm_weight"] = (G * W).sum(0)
            grads["down_weight"] = (G * gamma).addr_(s, beta)
        if needed[0]:
            # dz·A − c1 is dz times A with its rows centered. ρ multiplies dz, the smaller operand.
            A = W * gamma
            A = A.sub_(A.mean(1, keepdim=True))
            rho = rstd[:, None]
            u = z - torch.mv(W, beta).add_(w.down_bias).to(compute)
            c2 = u.mul_(dz).sum(1, keepdim=True).mul_(rho / -d)
            dz = dz.mul_(rho)
    dx = None
    if needed[0]:
        own = compute == rows.dtype and not residual  # dy goes into the product
        dx = torch.addmm(dy, dz, A.to(compute)) if own else dz @ A.to(compute)
        if w.norm_weight is not None:
            dx.addcmul_(xhat, c2)
        dx = (dx if own or residual else dx + dy).to(rows.dtype)
    given = {**w._asdict(), "scale": scale, "gate": gate}
    differentiable = (*w._fields, *(name for name in ("scale", "gate") if isinstance(given[name], Tensor)))
    named = zip(differentiable, needed[1:], strict=True)
    return [dx, *(grads[name].to(given[name].dtype) if wanted else None for name, wanted in named)]


def needs_extra(needed: Sequence[bool], call: Call) -> tuple[bool, bool]:
    """Whether the gradients of the scale and of the gate are needed."""
    return isinstance(call.scale, Tensor) and needed[7], call.gate is not None and needed[-1]
