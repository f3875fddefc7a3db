"""What a run trains, and the optimizer over it."""

from torch import nn

from adapterkern.llama import LlamaAdapter
from adapterkern.optim import ClippedAdamW
from adapterkern.training.config import TrainConfig
from adapterkern.training.heads import ClassificationHead


def trainable_parameters(
    model: LlamaAdapter, head: ClassificationHead | None, config: TrainConfig
) -> dict[str, nn.Parameter]:
    """What a run trains, by names that do not depend on the adapter's own name."""
    parameters: dict[str, nn.Parameter] = {}
    if config.train_adapters:
        adapter = model.adapters[model.active_adapter] if model.active_adapter else None
        if adapter is None:
            raise ValueError("model: expected an active adapter to train, got none; see set_adapter and train_adapters")
        parameters |= {f"adapter.{name}": p for name, p in adapter.named_parameters()}
    if head is not None:
        parameters |= {f"head.{name}": p for name, p in head.named_parameters()}
    return parameters


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> ClippedAdamW:
    """AdamW that clips by the global norm; matrices decay, vectors (biases, LayerNorm's scale and shift) do not."""
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return ClippedAdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, max_norm=config.max_norm
    )
