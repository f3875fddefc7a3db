"""Learning-rate schedules, from transformers: a linear warmup, then linear or cosine decay to zero, or none."""

import math

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from adapterkern.training.config import TrainConfig

_TRANSFORMERS_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of warmup: ``config.warmup`` itself, or, where it is below 1, that share of all steps, rounded up."""
    return int(config.warmup) if config.warmup >= 1 else math.ceil(config.warmup * total_steps)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LRScheduler:
    """The schedule of ``config`` over ``total_steps`` optimizer steps; call its ``step()`` after each of them.

    With w warmup steps of N, step n (from 0) has the learning rate lr·n/w for n < w, and after that lr·(N−n)/(N−w)
    (linear), lr·(1 + cos(π(n−w)/(N−w)))/2 (cosine), or lr (constant).

    Raises:
        ValueError: the warmup is longer than the run.
    """
    warmup = warmup_steps(config, total_steps)
    if warmup > total_steps:
        raise ValueError(f"warmup: expected at most the run's {total_steps} steps, got {warmup}")
    name = _TRANSFORMERS_NAMES[config.schedule]
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
