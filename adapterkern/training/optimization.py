"""The optimizer of a run, and its learning-rate schedule: linear warmup, then linear decay, cosine decay or none."""

import dataclasses
import math
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from adapterkern.model.config import AdapterConfig
from adapterkern.optim.clipped_adamw import ClippedAdamW
from adapterkern.training.config import TrainConfig

# Of adapters and of heads on SmolLM2-135M, which is so wide; from validation: docs/compared.md
_LR, _HEAD_LR, _WIDTH = 6e-3, 1e-2, 576
_HEAD = re.compile(r"([^.]+\.)?head\.(?!adapter\.)")  # as tasks name the parameters of their heads
_TRANSFORMERS_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def default_lr(hidden_size: int, head: bool = False) -> float:
    """The learning rate of adapters, or of the head beside them, if none is given: 6e-3 or 1e-2 up to the width 576.

    These were measured there. Above it they are in inverse proportion to the width, which is derived, not measured: a
    matrix that reads the residual stream wants this with Adam (Yang et al. 2022, arXiv:2203.03466, table 3). At 4096
    adapters have 8.4e-4; LLM-Adapters (Hu et al. 2023, arXiv:2304.01933) trains them with 3e-4 there.
    """
    return float(f"{(_HEAD_LR if head else _LR) * min(1.0, _WIDTH / hidden_size):.2g}")


def with_rates(config: TrainConfig, hidden_size: int, begun: Mapping[str, Any] | None = None) -> TrainConfig:
    """A configuration with numbers for the learning rates that it lacks; see ``TrainConfig``.

    Args:
        begun: the configuration of a resumed run, whose rates go before the defaults.
    """
    lr, head_lr = config.lr, config.head_lr
    if begun is not None:
        lr = begun["lr"] if lr is None else lr
        head_lr = begun.get("head_lr") if head_lr is None else head_lr
    elif lr is None:
        lr = default_lr(hidden_size, head=not config.train_adapters)
        if head_lr is None and config.train_adapters and config.labeled:
            head_lr = default_lr(hidden_size, head=True)
    return dataclasses.replace(config, lr=lr, head_lr=head_lr)


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> ClippedAdamW:
    """AdamW with global-norm clipping, of ``decay_groups``; heads have their own if their rate is another.

    Raises:
        ValueError: no learning rate: one that depends on the backbone's width is for ``with_rates``.
    """
    if config.lr is None:
        raise ValueError("lr: expected a number, got None; ak.train takes one that suits the backbone's width")
    apart = config.train_adapters and config.head_lr not in (None, config.lr)
    heads = {name: p for name, p in parameters.items() if apart and _HEAD.match(name)}
    groups = decay_groups({name: p for name, p in parameters.items() if name not in heads}, config)
    groups += [group | {"lr": config.head_lr} for group in decay_groups(heads, config) if heads]
    betas = config.beta1, config.beta2
    return ClippedAdamW(groups, lr=config.lr, betas=betas, eps=config.eps, max_norm=config.max_norm)


def decay_groups(parameters: dict[str, nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors (biases, LayerNorm's scale and shift), which do not."""
    return [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of warmup: ``config.warmup``, or that share of all steps, rounded up, if it is below 1.

    A share leaves a step after the warmup, because the first step of a warmup has the learning rate 0.
    """
    if config.warmup >= 1:
        return int(config.warmup)
    return min(math.ceil(config.warmup * total_steps), max(total_steps - 1, 0))


def check_lr(config: TrainConfig) -> None:
    """Raise ``ValueError`` if no step would change anything. A saved configuration may say so."""
    for name in ("lr", "head_lr"):
        if getattr(config, name) == 0:
            raise ValueError(f"{name}: expected a number above 0, with which a step changes something, got 0")
    if config.max_norm == 0:
        raise ValueError("max_norm: expected a number above 0, with which gradients have an effect, or inf, got 0")


def check_drop(config: TrainConfig, adapters: Iterable[AdapterConfig]) -> None:
    """Raise ``ValueError`` if a step might skip all sites of one of the trained adapters."""
    fewest = min((len(adapter.layers or ()) for adapter in adapters), default=config.adapter_drop + 1)
    if config.adapter_drop >= fewest:
        raise ValueError(
            f"adapter_drop: expected fewer than the {fewest} sites of the adapter, of which a step trains at least "
            f"one, got {config.adapter_drop}"
        )


def sites_to_skip(config: TrainConfig, step: int) -> int:
    """How many of the first sites a step skips: a function of (seed, step) alone."""
    return random.Random(f"{config.seed} {step}").randint(0, config.adapter_drop)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LRScheduler:
    """The schedule of ``config`` over ``total_steps`` optimizer steps; call its ``step()`` after each one.

    With w warmup steps out of N, step n (from 0) has the learning rate lr·n/w for n < w, and from w on lr·(N−n)/(N−w)
    (linear), lr·(1 + cos(π(n−w)/(N−w)))/2 (cosine), or lr (constant).

    Raises:
        ValueError: the warmup is longer than the run, or no step has a learning rate above 0.
    """
    from transformers import get_scheduler  # imports PEFT and bitsandbytes where they are installed, for seconds

    check_lr(config)
    warmup = warmup_steps(config, total_steps)
    if warmup > total_steps:
        raise ValueError(f"warmup: expected at most the run's {total_steps} steps, got {warmup}")
    if warmup == total_steps == 1:
        raise ValueError("warmup: expected 0 in a run of one step, which a warmup gives the learning rate 0, got 1")
    name = _TRANSFORMERS_NAMES[config.schedule]
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
