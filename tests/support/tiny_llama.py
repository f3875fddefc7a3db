"""Tiny random decoders of each accepted family, and a padded batch for them."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import adapterkern as ak

IDS = torch.randint(1, 128, (3, 10), generator=torch.Generator().manual_seed(1))
LEFT_PADDED = (torch.arange(10) >= torch.tensor([[0], [3], [6]])).long()


def tiny(family: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{family}Config")(**fields | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def adapted(llama: Any = None, **config: Any) -> ak.LlamaAdapter:
    """A model whose adapters do something: the identity init is drawn over."""
    model = ak.LlamaAdapter(llama or tiny(), ak.AdapterConfig(**{"adapter_dim": 4, "layers": [1, 3]} | config))
    draw(model)
    return model.eval()


def draw(model: ak.LlamaAdapter, name: str | None = None) -> None:
    for p in model.adapter_parameters(name):
        nn.init.normal_(p, std=0.2)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=LEFT_PADDED).logits


def grads(model: ak.LlamaAdapter) -> list[Tensor]:
    model.zero_grad()
    model(IDS, attention_mask=LEFT_PADDED, labels=IDS).loss.backward()
    return [p.grad.clone() for p in model.adapter_parameters()]


# Shared shapes and different ones; layer sets that overlap, and both positions at one layer; more than one in sequence.
CONFIGS = {
    "a": {"adapter_dim": 4, "layers": [1, 3]},
    "b": {"adapter_dim": 4, "layers": [2, 3]},
    "c": {"adapter_dim": 6, "layers": [1, 2], "position": "attention"},
    "d": {"adapter_dim": 4, "layers": [3], "depth": 2, "activation": "gelu"},
}
NAMES = list(CONFIGS)


def mixed(dtype: torch.dtype = torch.float64, configs: dict[str, Any] = CONFIGS, **changes: Any) -> ak.LlamaAdapter:
    model = ak.LlamaAdapter(tiny(), ak.AdapterConfig(adapter_dim=2, layers=[0]), **changes)
    for name, config in configs.items():
        model.add_adapter(name, ak.AdapterConfig(**config))
        draw(model, name)
    draw(model, "default")
    return model.to(dtype).eval()
