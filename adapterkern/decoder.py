"""How an adapter gets into a decoder layer, and how a decoder is cut in two.

An adapted layer keeps its identity and gets a subclass of its own class, whose ``forward`` passes the residual stream
through the site's adapter. A subclass rather than a hook, because then whatever wraps a layer's forward (gradient
checkpointing, sharding) wraps the adapter with it.
"""

import copy
import functools
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_LLAMA_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class Site(Protocol):
    """One layer's place for adapters."""

    def has(self, position: str) -> bool:
        """Whether an adapter is active at ``"attention"`` or ``"layer"``."""

    def run(self, position: str, hidden: Tensor) -> Tensor:
        """The residual stream (B, L, d) after the active adapter, or as it came if there is none."""


class AdaptedLayer(nn.Module):
    """Stands before a decoder layer's own class; :func:`adapt` puts it there."""

    _adapter_site: Site
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        site = self._adapter_site
        if not site.has("attention"):
            return site.run("layer", super().forward(hidden_states, **kwargs))
        attended, *_ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = site.run("attention", hidden_states + attended)
        # A batch that mixes adapters may have some at both positions.
        return site.run("layer", hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)))


@functools.cache
def _adapted_class(cls: Any) -> Any:
    # The same name, so that lists of class names (`_no_split_modules`, auto-wrap policies) still find the layer.
    return type(cls.__name__, (AdaptedLayer, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def adapt(layer: nn.Module, site: Site) -> None:
    """Make ``layer`` pass the residual stream through ``site``; :func:`restore` undoes it."""
    layer.__dict__["_adapter_site"] = site  # not through setattr: the layer must not own the model
    cls: Any = type(layer)
    change_class(layer, _adapted_class(cls))


def restore(layer: nn.Module) -> None:
    """Give an adapted layer its own class back."""
    del layer.__dict__["_adapter_site"]
    change_class(layer, type(layer).__bases__[1])


def change_class(layer: nn.Module, cls: Any) -> None:
    layer.__class__ = cls
    if "_old_forward" in layer.__dict__:  # accelerate's device hooks hold the forward that they found on the layer
        layer.__dict__["_old_forward"] = cls.forward.__get__(layer)


def decoder_layers(llama: Any) -> nn.ModuleList:
    """``llama.model.layers``, or a ``TypeError`` if the model has not LLaMA's shape."""
    layers = getattr(getattr(llama, "model", None), "layers", None)
    if not isinstance(llama, PreTrainedModel) or not isinstance(layers, nn.ModuleList) or not len(layers):
        raise TypeError(
            "llama: expected a transformers decoder of LLaMA's shape (LlamaForCausalLM, MistralForCausalLM, "
            f"Qwen2ForCausalLM, ...: `model.layers` is a ModuleList), got {type(llama).__name__}"
        )
    return layers


def check_attention_site(layer: nn.Module) -> None:
    """``position="attention"`` writes the layer's forward anew, so the layer must be LLaMA's to the last multiplier."""
    parts = {name for name, _ in layer.named_children()}
    if parts != _LLAMA_PARTS or hasattr(layer, "residual_multiplier"):
        raise ValueError(
            f"position: expected 'layer' for {type(layer).__name__}: 'attention' needs a layer made of "
            f"{', '.join(sorted(_LLAMA_PARTS))} with plain residual sums, got {', '.join(sorted(parts))}"
        )


def layer_device(layer: nn.Module) -> torch.device:
    """Where the layer computes: its weights' device, or where accelerate brings offloaded weights."""
    device = next(layer.parameters()).device
    if device.type != "meta":
        return device
    for module in layer.modules():
        execution_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device)
    raise ValueError("llama: expected a model with its weights loaded, got one on the meta device")


def decoder_slice(decoder: Any, start: int, stop: int) -> Any:
    """The decoder with only these layers, sharing every parameter."""
    part = copy.copy(decoder)
    part._modules = dict(decoder._modules)
    part.layers = decoder.layers[start:stop]
    part.config = copy.copy(decoder.config)
    part.config.num_hidden_layers = stop - start
    if getattr(decoder.config, "layer_types", None) is not None:
        part.config.layer_types = decoder.config.layer_types[start:stop]
    return part
