"""The loss of soft labels: cross-entropy and a divergence from a teacher's distribution, a few tokens at a time.

With logits z of the student, temperature T, q = softmax(z/T), and D its divergence from the teacher's p, whose formulas
and gradients in z are those of divergences.py:

    loss = Σ_i (1 − λ) · CE(z_i, target_i) + λ · T² · a_i · D_i

λ is the mixing weight and a_i a weight of each token, 1 by default. For large T both p − q and the 1/T above shrink
like 1/T, so the gradient of D goes like 1/T²: the factor T² (Hinton et al. 2015) keeps the balance with the
cross-entropy when T changes. Near p = q, JS is a quarter of KL, and so is its gradient: it needs a larger λ.

One token's logits are as wide as the vocabulary, 85 times its hidden state in SmolLM2-135M. So neither logits nor their
gradients ever exist for all tokens: each chunk's are computed from the hidden states, turned into the gradient of the
loss in the hidden states by the formulas above, and freed. The backward needs only that gradient, as large as the
hidden states, and multiplies it by a number. The LM head runs once in each direction, as it would without chunks; it is
frozen and gets no gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern.recipes.distillation.divergences import Top, divergence_of, top_of
from adapterkern.recipes.distillation.settings import SoftLabelSettings
from adapterkern.training.drift import wide

IGNORE = -100  # marks a token without target, as in torch's cross_entropy

Head = Callable[[Tensor], Tensor]


class Teacher(NamedTuple):
    """The source of the soft labels: its last hidden states (N, its own width), and its LM head."""

    hidden: Tensor
    head: Head


class Labels(NamedTuple):
    """What a teacher's soft labels with ``top_k`` are, of N tokens: all that the loss and the metrics read of it."""

    tokens: Tensor  # (N, k) int64: the likeliest
    log_p: Tensor  # (N, k + 1): their log-probabilities at the temperature, and that of all others together
    target: Tensor  # (N,): the target's log-probability at temperature 1; 0 where there is none


class SoftLabelLoss(NamedTuple):
    """Sums over the tokens, scalars, in nats or counts; 0 where not asked for. Only ``loss`` has a gradient."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor  # Σ a_i D_i, without T²
    teacher_cross_entropy: Tensor  # with ``count``
    correct: Tensor  # with ``count``: targets that have the student's highest score
    agreement: Tensor  # with ``count``: tokens where student and teacher have the same highest score


def soft_label_loss(
    hidden: Tensor,
    head: Head,
    teacher: Teacher | Labels | None = None,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    *,
    count: bool = False,
    **settings: Any,
) -> SoftLabelLoss:
    """The loss above, of N tokens.

    Args:
        hidden: (N, d), the input of the student's head; the only argument that gets a gradient.
        head: maps (n, d) to logits (n, V); frozen.
        teacher: its states of the same N tokens, or its ``labels_of`` them; None leaves the divergence out.
        targets: (N,) int64, ``IGNORE`` where there is none; None leaves the cross-entropy out.
        token_weights: (N,), a_i.
        count: also compute the last three fields of ``SoftLabelLoss``.
        settings: the fields of ``SoftLabelSettings``.

    Raises:
        ValueError: an argument out of its range, or teacher and student differ in tokens or vocabulary.
        TypeError: an argument of the wrong type.
    """
    how = SoftLabelSettings(**settings)
    if teacher is not None and len(teacher[0]) != len(hidden):
        raise ValueError(f"teacher: expected states of {len(hidden)} tokens, got {len(teacher[0])}")
    if isinstance(teacher, Labels) and teacher.tokens.shape[1] != how.top_k:
        raise ValueError(f"teacher: expected labels of top_k={how.top_k}, got {teacher.tokens.shape[1]} tokens")
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad

    def chunk(part: slice) -> tuple[Tensor, Tensor | None]:
        """A function of its own, so that a chunk's logits are freed before the next chunk's exist."""
        # The head may be anything that makes logits (quantized, with a bias, under autocast): autograd runs back
        # through it, from the logits' gradient.
        with torch.set_grad_enabled(with_gradient):
            states = hidden[part].detach().requires_grad_(with_gradient)
            logits = head(states)
        with torch.no_grad():
            taught: Any = teacher
            if isinstance(teacher, Labels):
                taught = Labels(*(tensor[part] for tensor in teacher))
            elif teacher is not None:
                taught = wide(teacher.head(teacher.hidden[part]))
            if isinstance(taught, Tensor) and taught.shape != logits.shape:
                raise ValueError(f"teacher: expected a vocabulary of {logits.shape[-1]}, got {taught.shape[-1]}")
            with torch.autocast(hidden.device.type, enabled=False):
                sums, gradient = _chunk(
                    wide(logits.detach()),
                    taught,
                    None if targets is None else targets[part],
                    None if token_weights is None else token_weights[part],
                    how,
                    with_gradient,
                    count,
                )
        del taught
        if gradient is None:
            return sums, None
        return sums, torch.autograd.grad(logits, states, gradient.to(logits.dtype))[0]

    sums = torch.zeros(6, device=hidden.device, dtype=wide(hidden.new_empty(0)).dtype)
    gradient = torch.zeros_like(hidden) if with_gradient else None
    for start in range(0, len(hidden), how.chunk_tokens):
        part = slice(start, start + how.chunk_tokens)
        chunk_sums, chunk_gradient = chunk(part)
        sums += chunk_sums
        if gradient is not None and chunk_gradient is not None:
            gradient[part] = chunk_gradient
    loss, *others = sums.unbind()
    return SoftLabelLoss(loss if gradient is None else _Known.apply(hidden, loss, gradient), *others)


@torch.no_grad()
def labels_of(teacher: Teacher, targets: Tensor, settings: SoftLabelSettings) -> Labels:
    """The soft labels of N tokens, for a ``top_k``, computed in chunks as the loss does."""
    assert settings.top_k is not None
    made = []
    for start in range(0, max(len(targets), 1), settings.chunk_tokens):
        part = slice(start, start + settings.chunk_tokens)
        logits = wide(teacher.head(teacher.hidden[part]))
        with torch.autocast(logits.device.type, enabled=False):
            of_target = F.cross_entropy(logits, targets[part], reduction="none", ignore_index=IGNORE).neg_()
            made.append((*top_of(_log_softmax(logits, settings.temperature), settings.top_k), of_target))
    return Labels(*(torch.cat(parts) for parts in zip(*made, strict=True)))


class _Known(torch.autograd.Function):
    """A loss whose gradient in ``hidden`` is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits if temperature == 1 else logits / temperature, -1)


def _chunk(
    student: Tensor,
    teacher: Tensor | Labels | None,
    targets: Tensor | None,
    token_weights: Tensor | None,
    settings: SoftLabelSettings,
    with_gradient: bool,
    count: bool,
) -> tuple[Tensor, Tensor | None]:
    """The six sums of a chunk of logits (n, V), and the gradient of the first in ``student``."""
    temperature, weight = settings.temperature, settings.weight
    zero = student.new_zeros(())
    cross_entropy = diverged = teacher_cross_entropy = correct = agreement = zero
    gradient: Tensor | None = None
    if targets is not None:
        log_q = F.log_softmax(student, -1)
        cross_entropy = F.nll_loss(log_q, targets, reduction="sum", ignore_index=IGNORE)
        if with_gradient and weight < 1:
            gradient = log_q.exp_()
            real = (targets != IGNORE)[:, None].to(gradient.dtype)
            gradient.scatter_add_(1, targets.clamp(min=0)[:, None], -real)
            gradient.mul_(real * (1 - weight))
        if count:
            correct = (student.argmax(-1) == targets).sum()
    if teacher is not None:
        if isinstance(teacher, Labels):
            log_p: Tensor | Top = Top(teacher.tokens, teacher.log_p)
        else:
            log_p = _log_softmax(teacher, temperature)
        per_token, slope = divergence_of(settings)(log_p, _log_softmax(student, temperature))
        a = torch.ones_like(per_token) if token_weights is None else token_weights
        diverged = (per_token * a).sum()
        if with_gradient:
            slope.mul_((weight * temperature * a)[:, None])  # λ T² a · 1/T
            gradient = slope if gradient is None else gradient.add_(slope)
        if count:
            best, of_targets = _counted(teacher, targets)
            agreement = (student.argmax(-1) == best).sum()
            teacher_cross_entropy = zero if of_targets is None else of_targets
    loss = (1 - weight) * cross_entropy + weight * temperature**2 * diverged
    sums = (loss, cross_entropy, diverged, teacher_cross_entropy, correct.to(zero), agreement.to(zero))
    return torch.stack(sums), gradient


def _counted(teacher: Tensor | Labels, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The teacher's likeliest token (n,) of each, and its summed cross-entropy; None without targets."""
    if isinstance(teacher, Labels):
        return teacher.tokens[:, 0], None if targets is None else -teacher.target.sum()
    best = teacher.argmax(-1)
    if targets is None:
        return best, None
    return best, F.cross_entropy(teacher, targets, reduction="sum", ignore_index=IGNORE)
