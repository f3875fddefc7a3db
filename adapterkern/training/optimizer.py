"""The optimizer of a run."""

from torch import nn

from adapterkern.optim import ClippedAdamW
from adapterkern.training.config import TrainConfig


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> ClippedAdamW:
    """AdamW that clips by the global norm; matrices decay, vectors (biases, LayerNorm's scale and shift) do not."""
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return ClippedAdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, max_norm=config.max_norm
    )
