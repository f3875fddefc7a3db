"""The optimizer of a run, and its learning-rate schedule: linear warmup, then linear decay, cosine decay or none."""

import math
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from adapterkern.model.config import AdapterConfig
from adapterkern.optim.clipped_adamw import ClippedAdamW
from adapterkern.training.config import TrainConfig

_TRANSFORMERS_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> ClippedAdamW:
    """AdamW with global-norm clipping, of ``decay_groups``."""
    betas = config.beta1, config.beta2
    groups = decay_groups(parameters, config)
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
    if config.lr == 0:
        raise ValueError("lr: expected a number above 0, with which a step changes something, got 0")
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
