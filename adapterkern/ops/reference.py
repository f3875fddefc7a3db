"""The adapter in plain PyTorch: the definition, the oracle of the tests and the baseline of the benchmarks.

One row of the residual stream is x ∈ ℝᵈ; γ and β are LayerNorm's scale and shift; W_down is (r, d) and W_up is (d, r).

    μ = mean(x)    ρ = 1/√(var(x) + eps)    x̂ = ρ(x − μ)
    z = W_down·(γ ⊙ x̂ + β) + b_down         h = act(z)            y = x + W_up·h + b_up

The backward below is the closed form that the kernels use. With A = W_down·diag(γ),
u = x̂·Aᵀ = z − (W_down·β + b_down),

    dh = dy·W_up                            dz = dh ⊙ act'(z)
    dx = dy + ρ(dz·A − c1 − x̂·c2)           c1 = dz·rowsum(A)/d   c2 = Σᵣ(dz ⊙ u)/d
    G  = dzᵀ·x̂     s = Σₜ dz
    dW_down = G·diag(γ) + s·βᵀ              db_down = s           dγ = Σᵣ G ⊙ W_down   dβ = s·W_down
    dW_up   = dyᵀ·h                         db_up   = Σₜ dy

LayerNorm's two row means (c1, c2) come from T×r numbers, dγ and dβ from r×d, so none of them reads x again. Checked in
fp64 against autograd. Every function computes in the dtype of its inputs: pass float64 for an oracle.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

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
    """The six parameters of one adapter, in ``nn.LayerNorm`` and ``nn.Linear`` layout, in the order of arguments."""

    norm_weight: Tensor  # (d,)   γ
    norm_bias: Tensor  # (d,)   β
    down_weight: Tensor  # (r, d) W_down
    down_bias: Tensor  # (r,)   b_down
    up_weight: Tensor  # (d, r) W_up
    up_bias: Tensor  # (d,)   b_up


class Forward(NamedTuple):
    """What the forward returns: y, and what the backward needs."""

    y: Tensor  # (T, d)
    z: Tensor  # (T, r) pre-activation
    mean: Tensor  # (T,)
    rstd: Tensor  # (T,)


class Gradients(NamedTuple):
    """The gradient of x and of each parameter, in the order of the forward's arguments."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


def adapter_eager(x: Tensor, weights: Weights, *, eps: float = 1e-5, activation: str = "silu") -> Tensor:
    """The stock PyTorch operations, which every other implementation must equal. ``x`` is (..., d)."""
    w = weights
    normed = F.layer_norm(x, (x.shape[-1],), w.norm_weight, w.norm_bias, eps)
    h = ACTIVATIONS[activation].fn(F.linear(normed, w.down_weight, w.down_bias))
    return x + F.linear(h, w.up_weight, w.up_bias)


def adapter_forward(x: Tensor, weights: Weights, *, eps: float = 1e-5, activation: str = "silu") -> Forward:
    """The forward from its equations. ``x`` is (T, d)."""
    w = weights
    mean = x.mean(dim=1)
    centered = x - mean[:, None]
    rstd = (centered.square().mean(dim=1) + eps).rsqrt()
    xhat = centered * rstd[:, None]
    z = (xhat * w.norm_weight + w.norm_bias) @ w.down_weight.T + w.down_bias
    y = x + ACTIVATIONS[activation].fn(z) @ w.up_weight.T + w.up_bias
    return Forward(y, z, mean, rstd)


def adapter_backward(dy: Tensor, x: Tensor, fwd: Forward, weights: Weights, *, activation: str = "silu") -> Gradients:
    """The backward from its closed form (see the module). ``dy`` and ``x`` are (T, d); returns all seven gradients."""
    w = weights
    d = x.shape[1]
    act = ACTIVATIONS[activation]
    A = w.down_weight * w.norm_weight
    xhat = (x - fwd.mean[:, None]) * fwd.rstd[:, None]
    u = fwd.z - (w.down_weight @ w.norm_bias + w.down_bias)

    dz = (dy @ w.up_weight) * act.derivative(fwd.z)
    c1 = dz @ A.sum(dim=1) / d
    c2 = (dz * u).sum(dim=1) / d
    dx = dy + fwd.rstd[:, None] * (dz @ A - c1[:, None] - xhat * c2[:, None])

    G = dz.T @ xhat
    s = dz.sum(dim=0)
    return Gradients(
        x=dx,
        norm_weight=(G * w.down_weight).sum(dim=0),
        norm_bias=s @ w.down_weight,
        down_weight=G * w.norm_weight + torch.outer(s, w.norm_bias),
        down_bias=s,
        up_weight=dy.T @ act.fn(fwd.z),
        up_bias=dy.sum(dim=0),
    )
