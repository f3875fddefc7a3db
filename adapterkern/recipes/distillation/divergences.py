"""The divergences of a student's distribution q from a teacher's p, each with its gradient in the student's logits.

With logits z of the student and t of the teacher, temperature T, p = softmax(t/T), q = softmax(z/T):

    "kl"          D = KL(p‖q) = Σ p (log p − log q)           ∂D/∂z = (q − p)/T              the forward direction
    "reverse-kl"  D = KL(q‖p)                                 ∂D/∂z = q ⊙ (g − Σ q g)/T      g = log q − log p
    "jsd"         D = β KL(p‖m) + (1 − β) KL(q‖m)             ∂D/∂z = q ⊙ (g − Σ q g)/T      g = (1 − β)(log q − log m)
                  with m = β p + (1 − β) q, for 0 < β < 1; β = 0 is "kl" and β = 1 is "reverse-kl"
    "js"          β = ½: 0 ≤ D ≤ log 2

This is the generalized JSD of Agarwal et al. 2023 (arXiv:2306.13649, eq. 1), as TRL's GKDTrainer computes it.

**Top k.** With S, the k tokens of the largest p, D is that of the k + 1 events "this token of S" and "any other":

    p' = (p_i for i ∈ S, 1 − Σ_S p)      q' = (q_i for i ∈ S, 1 − Σ_S q)      D' = D(p', q') ≤ D(p, q)

So a teacher's k + 1 numbers per token are all that is needed, D' is finite in every direction (renormalized over S, p
would be 0 outside, and the reverse KL infinite), and the mass that the student has outside of S is compared, too. For a
token i outside of S, ∂D'/∂z_i = q_i/q'_rest · ∂D'/∂z_rest.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern.recipes.distillation.settings import SoftLabelSettings
from adapterkern.training.drift import kl

Divergence = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


class Top(NamedTuple):
    """The k + 1 events of p: the tokens of S (n, k) int64, the likeliest first, and log p' (n, k + 1)."""

    tokens: Tensor
    log_p: Tensor


def divergence_of(settings: SoftLabelSettings) -> Divergence:
    """From log p and log q, both (n, V): each token's D (n,), and T times its gradient in z (n, V).

    With ``top_k`` a ``Top`` may take the place of log p.
    """
    beta = {"kl": 0.0, "reverse-kl": 1.0}.get(settings.divergence, 0.5 if settings.beta is None else settings.beta)
    found: Divergence
    if settings.divergence == "js":
        found = _js
    else:
        found = _kl if beta == 0 else _reverse_kl if beta == 1 else functools.partial(_jsd, beta=beta)
    return found if settings.top_k is None else functools.partial(_of_top, found, settings.top_k)


def _kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return kl(log_p, log_q, p), log_q.exp().sub_(p)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    g, q = log_q - log_p, log_q.exp()
    per_token = (q * g).sum(-1)
    return per_token, g.sub_(per_token[:, None]).mul_(q)


def _js(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    # log m − log q = softplus(δ) − log 2 with δ = log p − log q. Near p = q this is accurate to the last digits of a
    # small number; the difference of two logarithms is not.
    log_ratio = log_p - log_q
    g = (math.log(2) - F.softplus(log_ratio, threshold=40)).mul_(0.5)
    h = (math.log(2) - F.softplus(-log_ratio, threshold=40)).mul_(0.5)
    return _of_both(log_p, log_q, g, h)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    # With δ = log p − log q: log m − log q = log(1 + β (e^δ − 1)), and log m − log p = log(1 + (1 − β)(e^−δ − 1)),
    # which differ by δ. The one whose exponent is negative neither overflows nor cancels.
    log_ratio = log_p - log_q
    share = torch.full_like(log_ratio, beta).masked_fill_(log_ratio > 0, 1 - beta)
    near = share.mul_(log_ratio.abs().neg_().expm1_()).log1p_()
    g = (near + log_ratio.clamp(min=0)).mul_(beta - 1)
    h = near.add_(log_ratio.neg_().clamp_(min=0)).mul_(-beta)
    return _of_both(log_p, log_q, g, h)


def _of_both(log_p: Tensor, log_q: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p h + Σ q g per token, and q ⊙ (g − Σ q g)."""
    q = log_q.exp()
    from_q = (q * g).sum(-1)
    per_token = h.mul_(log_p.exp()).sum(-1) + from_q
    return per_token, g.sub_(from_q[:, None]).mul_(q)


def top_of(log_p: Tensor, k: int) -> Top:
    """The k + 1 events of log p (n, V)."""
    if k >= log_p.shape[-1]:
        raise ValueError(f"top_k: expected an integer from 1 to {log_p.shape[-1] - 1}, got {k}")
    tokens = log_p.topk(k, -1).indices
    return Top(tokens, _events(log_p, tokens)[0])


def _events(log: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithms (n, k + 1) of the events; those (n, V) of all other tokens, −∞ for S; and of their sum (n, 1)."""
    others = log.scatter(-1, tokens, -math.inf)
    rest = others.logsumexp(-1, keepdim=True)  # 1 − Σ would round to 0 where S has nearly all
    return torch.cat([log.gather(-1, tokens), rest], -1), others, rest


def _of_top(divergence: Divergence, k: int, log_p: Tensor | Top, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the k likeliest tokens of p, and all others together."""
    top = log_p if isinstance(log_p, Top) else top_of(log_p, k)
    of_q, others, rest = _events(log_q, top.tokens)
    per_token, slope = divergence(top.log_p, of_q)
    spread = others.sub_(rest).exp_().mul_(slope[:, k:])
    return per_token, spread.scatter_(-1, top.tokens, slope[:, :k])
