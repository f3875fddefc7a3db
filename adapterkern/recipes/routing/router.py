"""A router: for each sequence, or each token, it picks which of n expert adapters run, at most k of them, or none.

It reads the residual stream h (B, L, d) below the first adapter, once per sequence or token:

    per="sequence"    v = mean over the real tokens of LayerNorm(h)
    per="token"       v_t = LayerNorm(h_t), of each real token; padding runs none, and counts nowhere
                      s = W·v + b ∈ ℝ^{n+1}      p = softmax(s)

Tokens are what the Switch Transformer and Mixtral (Jiang et al. 2024, arXiv:2401.04088) route. A token's choice follows
from what the stream has at its place alone, which a causal decoder makes of the tokens up to there: it is the same in
a whole text as where the text is generated token by token. "Sequence" stands for either below.

Expert i runs if s_i is among the k largest expert scores and above the last score, which is that of "none": with k = 1
that is the argmax of n + 1 options, with k = 2 a sequence may take two, one or no expert. Each token is normalized
before the mean because some tokens of a LLaMA, the first above all, are a thousand times larger than the rest and would
dominate it. In training, Gumbel noise on the scores turns the choice into a draw from p (without replacement for
k > 1), so that an expert, or none, that is not the best now is still tried.

A chosen expert A_i enters as ``x + w_i·(A_i(x) − x)``. The choice has no derivative; the gate weight w_i has:

- ``gate="probability"``: w_i = p_i, as in the Switch Transformer (Fedus et al. 2021, arXiv:2101.03961).
- ``gate="integrated"``: w_i = u + log p_i − stopgrad(log p_i), u uniform in (0, 1) in training and 1 otherwise. In the
  mean over u the gradient of the scores is (L(run) − L(none))·∇log p_i, since ∫ ∂L/∂w dw over (0, 1) is that
  difference; over draws from p, that is the gradient of the expected loss.

The difference matters where running costs something. p_i scales its expert's branch, and so do the expert's own up
weights: once these are at their optimum, the loss's derivative by the scale is 0 over the expert's sequences, and
nothing opposes even a small cost. The integrated gate sees what the expert gains over none (exactly for k = 1).

Two terms are added to the loss. The load-balancing loss is the Switch Transformer's (equation 4; GShard's, Lepikhin et
al. 2020, arXiv:2006.16668, up to a constant factor), over the sequences that run an expert at all:

    balance = n · Σ_i f_i·P_i      f_i: share of the choices that are expert i      P_i: mean of softmax(s_1..n)_i

It is 1 where the load is even and n where one expert has everything. Shares and means are those of a whole step,
whatever forwards and processes share its sequences. f_i has no derivative: once it and the number of sequences that run
an expert are known, the balance is a sum over sequences. The cost is the mean probability of running anything,
1 − p_none: with coefficient λ, an expert must lower a sequence's loss by more than about λ to be worth running.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkern.checks import choice, flag, integer, number

GATES = ("probability", "integrated")


PER = ("sequence", "token")


class Route(NamedTuple):
    """What a router decided for B sequences; for their tokens, with dimensions (B, L) in place of (B,)."""

    chosen: Tensor  # (B, k) int64, an expert's number or −1
    weight: Tensor  # (B, k) gate weights; 0 where that is −1
    scores: Tensor  # (B, n), or (B, n + 1) with "none" last, before any noise
    read: Tensor | None = None  # (B, d) v, where the scores were made of it
    real: Tensor | None = None  # (B, L) bool, the tokens that are not padding; None of sequences, which all count


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How sequences, or their tokens, are routed.

    Args:
        experts: n, how many adapters there are to choose from.
        per: what a choice is made for, each ``"sequence"`` or each ``"token"``.
        top_k: how many may run in a sequence, or a token, at most.
        skip: whether none is an option.
        gate: what a chosen expert's branch is multiplied by, ``"probability"`` or ``"integrated"``: see the module.
        noise: scale of the Gumbel noise on the scores in training; 1 draws from the softmax, 0 never explores.
        balance: coefficient of the load-balancing loss.
        cost: coefficient of the probability of running anything, in nats per target.
        free_epochs: epochs before the cost counts, in which the experts become worth something.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: one is of another type. Both name it.
    """

    experts: int = field(default=4, metadata={"help": "adapters to choose among"})
    per: str = field(
        default="sequence",
        metadata={"help": "what a choice is made for: each text as a whole, or each of its tokens", "choices": PER},
    )
    top_k: int = field(default=1, metadata={"help": "how many may run in a text, or a token, at most"})
    skip: bool = field(default=True, metadata={"help": "let a text, or a token, run none"})
    gate: str = field(
        default="probability",
        metadata={
            "help": "weight of a chosen adapter: its probability, or 1 with the gradient integrated from none to it",
            "choices": GATES,
        },
    )
    noise: float = field(
        default=1.0, metadata={"help": "noise on the choice in training: 1 draws by probability, 0 never explores"}
    )
    balance: float = field(default=0.01, metadata={"help": "coefficient of the load-balancing loss"})
    cost: float = field(default=0.0, metadata={"help": "coefficient of the probability of running anything"})
    free_epochs: int = field(default=1, metadata={"help": "epochs before the cost counts"})

    def __post_init__(self) -> None:
        integer("experts", self.experts, 1)
        integer("top_k", self.top_k, 1, self.experts)
        integer("free_epochs", self.free_epochs, 0)
        choice("per", self.per, PER)
        choice("gate", self.gate, GATES)
        flag("skip", self.skip)
        for name in ("noise", "balance", "cost"):
            number(name, getattr(self, name), "[0, inf)")
        if self.cost and not self.skip:
            raise ValueError(f"cost: expected 0 with skip=False, which leaves nothing to save, got {self.cost!r}")


class Router(nn.Module):
    """Scores of n experts (and of none) for each sequence or token, and the choice that follows from them.

    Args:
        hidden_size: d.
        config: its ``experts``, ``per``, ``top_k``, ``skip``, ``gate`` and ``noise`` are used.
    """

    def __init__(self, hidden_size: int, config: RoutingConfig) -> None:
        super().__init__()
        self.experts, self.top_k, self.skip, self.gate = config.experts, config.top_k, config.skip, config.gate
        self.noise, self.per_token = config.noise, config.per == "token"
        self.linear = nn.Linear(hidden_size, config.experts + config.skip)
        # Nearly even odds at the start, as in the Switch Transformer: what begins far behind is never tried.
        nn.init.normal_(self.linear.weight, std=0.1 * hidden_size**-0.5)
        nn.init.zeros_(self.linear.bias)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """What training draws for ``count`` choices, fp32 on the CPU: (count, n + 2), or (count, n + 1) without skip.

        The scaled Gumbel noise of the scores, and u last.
        """
        gumbel = -self.noise * torch.empty(count, self.linear.out_features).exponential_(generator=generator).log()
        return torch.cat([gumbel, torch.rand(count, 1, generator=generator)], dim=1)

    def forward(self, hidden: Tensor, attention_mask: Tensor, drawn: Tensor | None = None) -> Route:
        """``hidden`` (B, L, d) of any dtype, ``attention_mask`` (B, L) with 1 on real tokens → the B routes.

        ``drawn``: what ``draw`` gives, (B, ...) or of tokens (B, L, ...).
        """
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = self.linear.weight.dtype
            read = F.layer_norm(hidden.to(dtype), hidden.shape[-1:])
            if self.per_token:
                route, real = self.choose(self.linear(read), drawn), attention_mask > 0
                chosen = torch.where(real[..., None], route.chosen, -1)
                return Route(chosen, torch.where(real[..., None], route.weight, 0.0), route.scores, read, real)
            mask = attention_mask.to(dtype)
            read = torch.bmm(mask[:, None], read)[:, 0] / mask.sum(1, keepdim=True)
            return self.choose(self.linear(read), drawn)._replace(read=read)

    def joined(self, routes: Sequence[Route]) -> Route:
        """``routes`` as one, of tokens in one row.

        The scores of several have their own graph: a backward may have freed that of the parts.
        """
        if len(routes) == 1:
            return routes[0]
        chosen, weight, read = (
            torch.cat([t.flatten(0, -2) for t in parts if t is not None]).detach()
            for parts in zip(*((route.chosen, route.weight, route.read) for route in routes), strict=True)
        )
        real = [route.real.flatten() for route in routes if route.real is not None]
        with torch.autocast(read.device.type, enabled=False):
            return Route(chosen, weight, self.linear(read), read, torch.cat(real) if real else None)

    def choose(self, scores: Tensor, drawn: Tensor | None = None) -> Route:
        """The routes by ``scores`` plus the noise of ``draw``; without ``drawn`` there is no noise, and u is 1."""
        noisy = scores.detach()
        if drawn is not None:
            drawn = drawn.to(noisy)
            noisy = noisy + drawn[..., :-1]
        best, index = noisy[..., : self.experts].topk(self.top_k, dim=-1)
        log_p = scores.log_softmax(-1).gather(-1, index)
        if self.gate == "probability":
            weight = log_p.exp()
        else:
            reached = 1.0 if drawn is None else drawn[..., -1:]
            weight = reached + (log_p - log_p.detach())
        if self.skip:
            runs = best > noisy[..., self.experts :]
            index, weight = torch.where(runs, index, -1), torch.where(runs, weight, 0.0)
        return Route(index, weight, scores)


def choice_counts(route: Route, experts: int) -> Tensor:
    """(n + 1,) int64: how often each expert is chosen, and last how many sequences run any. Counts of parts add up."""
    runs = route.chosen >= 0
    chosen = F.one_hot(route.chosen.clamp(min=0), experts) * runs[..., None]
    return torch.cat([chosen.flatten(0, -2).sum(0), runs.any(-1).sum()[None]])


def balance_loss(route: Route, experts: int, counts: Tensor | None = None) -> Tensor:
    """The Switch Transformer's load-balancing loss, from 1 (even load) to ``experts``; 0 where no sequence runs any.

    ``counts`` are the ``choice_counts`` of the whole that ``route`` is a part of; the parts' values add up to that
    of the whole.
    """
    counts = choice_counts(route, experts) if counts is None else counts
    chosen, sequences = counts[:-1], counts[-1]
    some = (route.chosen >= 0).any(-1).to(route.scores.dtype)
    P = route.scores[..., :experts].softmax(-1) * some[..., None]
    mean = P.flatten(0, -2).sum(0) / sequences.clamp(min=1)
    share = chosen / chosen.sum().clamp(min=1)
    return experts * (share.to(mean.dtype) * mean).sum()


def run_probabilities(route: Route, experts: int) -> tuple[Tensor, Tensor | int]:
    """The sum over what is routed of the probability of running at least one expert, 1 − p_none, and its count."""
    p = route.scores.softmax(-1)[..., :experts].sum(-1)
    return (p.sum(), len(p)) if route.real is None else ((p * route.real).sum(), route.real.sum())


def run_probability(route: Route, experts: int) -> Tensor:
    """The mean probability of running at least one expert, 1 − p_none; 1 for a router without ``skip``."""
    total, count = run_probabilities(route, experts)
    return total / count
