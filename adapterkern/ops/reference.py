"""The adapter in plain PyTorch: the definition, the oracle of the tests and the baseline of the benchmarks.

One row of the residual stream is x ∈ ℝᵈ; γ and β are LayerNorm's scale and shift; W_down is (r, d) and W_up is (d, r).

    μ = mean(x)    ρ = 1/√(var(x) + eps)    x̂ = ρ(x − μ)
    z = W_down·(γ ⊙ x̂ + β) + b_down         h = act(z)            y = x + W_up·h + b_up

That is a plain call. Five things may differ. A scale α multiplies the branch. A residual takes x's place in the sum,
so that an adapter runs parallel to a module (He et al. 2022, arXiv:2110.04366). There may be no LayerNorm. A gate has a
weight g for each row, as a router gives it (Shazeer et al. 2017, arXiv:1701.06538). Dropout multiplies h by a mask m of
0 and 1/(1 − p), see dropout.py (Srivastava et al. 2014):

    z = W_down·x + b_down             h = act(z) ⊙ m              y = residual + α·g·(W_up·h + b_up)

The backward below is the closed form that the kernels use. With A = W_down·diag(γ),
u = x̂·Aᵀ = z − (W_down·β + b_down),

    dh = dy·W_up                            dz = dh ⊙ act'(z)
    dx = dy + ρ(dz·A − c1 − x̂·c2)           c1 = dz·rowsum(A)/d   c2 = Σᵣ(dz ⊙ u)/d
    G  = dzᵀ·x̂     s = Σₜ dz
    dW_down = G·diag(γ) + s·βᵀ              db_down = s           dγ = Σᵣ G ⊙ W_down   dβ = s·W_down
    dW_up   = dyᵀ·h                         db_up   = Σₜ dy

With a scale, W_up in dh is α·W_up, and with U = dyᵀ·h and v = Σₜ dy,

    dW_up   = α·U                           db_up   = α·v         dα = ⟨U, W_up⟩ + ⟨v, b_up⟩

dα is made of parameters alone, without a division by α, which may be 0. With a residual, dx lacks its first term, dy,
which is the residual's gradient. Without LayerNorm dx = dy + dz·W_down and dW_down = dzᵀ·x. With a gate and a mask

    dh = g·(dy·W_up)     dz = dh ⊙ m ⊙ act'(z)     dg = ⟨dy·W_up, h⟩ + ⟨dy, b_up⟩     U = Σₜ dyᵀ·g·h     v = Σₜ g·dy

LayerNorm's two row means (c1, c2) come from T×r numbers, dγ and dβ from r×d, so none of them reads x again. Checked in
fp64 against autograd. Every function computes in the dtype of its inputs: pass float64 for an oracle.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _dsilu(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _dgelu(z: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


class Activation(NamedTuple):
    """An elementwise nonlinearity and its derivative, both as functions of the pre-activation z."""

    fn: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _dsilu),
    "gelu": Activation(F.gelu, _dgelu),
    "relu": Activation(F.relu, lambda z: (z > 0).to(z.dtype)),
    "tanh": Activation(torch.tanh, lambda z: 1 - torch.tanh(z) ** 2),
    "identity": Activation(lambda z: z, torch.ones_like),
}


class Weights(NamedTuple):
    """The six parameters of one adapter, in ``nn.LayerNorm`` and ``nn.Linear`` layout, in the order of arguments.

    The first two are None, both, where there is no LayerNorm.
    """

    norm_weight: Any  # (d,)   γ, or None
    norm_bias: Any  # (d,)   β, or None
    down_weight: Tensor  # (r, d) W_down
    down_bias: Tensor  # (r,)   b_down
    up_weight: Tensor  # (d, r) W_up
    up_bias: Tensor  # (d,)   b_up


class Forward(NamedTuple):
    """What the forward returns: y, and what the backward needs."""

    y: Tensor  # (T, d)
    z: Tensor  # (T, r) pre-activation
    mean: Tensor  # (T,); 0 without LayerNorm
    rstd: Tensor  # (T,); 1 without LayerNorm


class Gradients(NamedTuple):
    """The gradient of x and of each parameter, in the order of the forward's arguments; None without LayerNorm."""

    x: Tensor
    norm_weight: Any
    norm_bias: Any
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


def adapter_eager(
    x: Tensor,
    weights: Weights,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    residual: Tensor | None = None,
    scale: Tensor | float = 1.0,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The stock PyTorch operations, which every other implementation must equal.

    ``x`` is (..., d), ``gate`` (...), ``mask`` (..., r).
    """
    w = weights
    normed = x if w.norm_weight is None else F.layer_norm(x, (x.shape[-1],), w.norm_weight, w.norm_bias, eps)
    h = ACTIVATIONS[activation].fn(F.linear(normed, w.down_weight, w.down_bias))
    if mask is not None:
        h = (h * mask).to(h.dtype)
    return add_branch(x if residual is None else residual, F.linear(h, w.up_weight, w.up_bias), scale, gate)


def add_branch(residual: Tensor, branch: Tensor, scale: Tensor | float, gate: Tensor | None = None) -> Tensor:
    """``residual + scale·gate·branch``, with no operation for a scale of 1 and for no gate."""
    if gate is not None:
        branch = gate[..., None] * branch
    if isinstance(scale, Tensor):
        return residual + scale.reshape(()) * branch  # without dimensions it keeps the branch's dtype
    return residual + branch if scale == 1 else torch.add(residual, branch, alpha=scale)


def adapter_forward(
    x: Tensor,
    weights: Weights,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    residual: Tensor | None = None,
    scale: Tensor | float = 1.0,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
) -> Forward:
    """The forward from its equations.

    ``x`` and ``residual`` are (T, d), ``gate`` (T,), ``mask`` (T, r); a Tensor ``scale`` has one element.
    """
    w = weights
    if w.norm_weight is None:
        mean, rstd = x.new_zeros(len(x)), x.new_ones(len(x))
        z = x @ w.down_weight.T + w.down_bias
    else:
        mean = x.mean(dim=1)
        centered = x - mean[:, None]
        rstd = (centered.square().mean(dim=1) + eps).rsqrt()
        xhat = centered * rstd[:, None]
        z = (xhat * w.norm_weight + w.norm_bias) @ w.down_weight.T + w.down_bias
    branch = _hidden(z, activation, mask) @ w.up_weight.T + w.up_bias
    if gate is not None:
        branch = gate[:, None] * branch
    return Forward((x if residual is None else residual) + scale * branch, z, mean, rstd)


def _hidden(z: Tensor, activation: str, mask: Tensor | None) -> Tensor:
    h = ACTIVATIONS[activation].fn(z)
    return h if mask is None else h * mask


def adapter_backward(
    dy: Tensor,
    x: Tensor,
    fwd: Forward,
    weights: Weights,
    *,
    activation: str = "silu",
    residual: bool = False,
    scale: Tensor | float = 1.0,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
) -> Gradients:
    """The backward from its closed form (see the module). ``dy`` and ``x`` are (T, d); returns all seven gradients.

    ``residual``: whether the forward had one; its gradient is dy. The scale's is ``scale_gradient``, the gate's
    ``gate_gradient``.
    """
    w = weights
    d = x.shape[1]
    act = ACTIVATIONS[activation]
    own = 0 if residual else dy
    gated = dy if gate is None else gate[:, None] * dy
    dz = (gated @ (scale * w.up_weight)) * act.derivative(fwd.z) * (1 if mask is None else mask)
    dW_up, db_up = scale * (gated.T @ _hidden(fwd.z, activation, mask)), scale * gated.sum(dim=0)
    if w.norm_weight is None:
        return Gradients(own + dz @ w.down_weight, None, None, dz.T @ x, dz.sum(dim=0), dW_up, db_up)

    A = w.down_weight * w.norm_weight
    xhat = (x - fwd.mean[:, None]) * fwd.rstd[:, None]
    u = fwd.z - (w.down_weight @ w.norm_bias + w.down_bias)
    c1 = dz @ A.sum(dim=1) / d
    c2 = (dz * u).sum(dim=1) / d
    dx = own + fwd.rstd[:, None] * (dz @ A - c1[:, None] - xhat * c2[:, None])

    G = dz.T @ xhat
    s = dz.sum(dim=0)
    return Gradients(
        x=dx,
        norm_weight=(G * w.down_weight).sum(dim=0),
        norm_bias=s @ w.down_weight,
        down_weight=G * w.norm_weight + torch.outer(s, w.norm_bias),
        down_bias=s,
        up_weight=dW_up,
        up_bias=db_up,
    )


def rms_norm(y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n = weight·ρ·y and ρ = 1/√(mean(y²) + eps), of shape (..., 1); y is (..., d)."""
    rstd = (y.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return y * rstd * weight, rstd


def rms_norm_backward(dn: Tensor, y: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """dy = ρ(g − ŷ·mean(g ⊙ ŷ)), g = weight·dn and ŷ = ρ·y; without the gradient of the weight, which is frozen."""
    g, yhat = weight * dn, rstd * y
    return rstd * (g - yhat * (g * yhat).mean(dim=-1, keepdim=True))


def scale_gradient(
    dy: Tensor,
    fwd: Forward,
    weights: Weights,
    *,
    activation: str = "silu",
    gate: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """dα = ⟨U, W_up⟩ + ⟨v, b_up⟩, of shape ()."""
    gated = dy if gate is None else gate[:, None] * dy
    U = gated.T @ _hidden(fwd.z, activation, mask)
    return (U * weights.up_weight).sum() + (gated.sum(dim=0) * weights.up_bias).sum()


def gate_gradient(
    dy: Tensor,
    fwd: Forward,
    weights: Weights,
    *,
    activation: str = "silu",
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """dg = α·(⟨dy·W_up, h⟩ + ⟨dy, b_up⟩), of shape (T,)."""
    h = _hidden(fwd.z, activation, mask)
    return scale * (((dy @ weights.up_weight) * h).sum(dim=1) + dy @ weights.up_bias)
