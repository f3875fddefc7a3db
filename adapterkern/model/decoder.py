"""How an adapter gets into a decoder layer, and how a decoder is cut in two.

An adapted layer keeps its identity and gets a subclass of its own class, whose ``forward`` passes the residual stream
through the site's adapter. A subclass rather than a hook, because then whatever wraps a layer's forward (gradient
checkpointing, sharding) wraps the adapter with it.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
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

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        site = self._adapter_site
        if not site.has("attention"):
            hidden_states = super().forward(hidden_states, **kwargs)
            if isinstance(hidden_states, tuple):  # some layers of transformers 4 give more beside it
                return (site.run("layer", hidden_states[0]), *hidden_states[1:])
            return site.run("layer", hidden_states)
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


def change_class(module: nn.Module, cls: Any) -> None:
    """Make ``module`` one of ``cls``, whatever hooks of accelerate it bears. :func:`check_forward` comes first."""
    if _is_left_behind(module):
        del module.__dict__["forward"]
    module.__class__ = cls
    if "_old_forward" in module.__dict__:  # accelerate's device hooks hold the forward that they found on the module
        module.__dict__["_old_forward"] = cls.forward.__get__(module)


def check_forward(module: nn.Module) -> None:
    """Raise ``ValueError`` if the instance has a forward of its own, which a change of class would not reach.

    accelerate's hooks are one that is understood, and so is what they leave behind: the class's, as an attribute.
    """
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__ and not _is_left_behind(module):
        raise ValueError(
            f"llama: expected every {type(module).__name__} to run its class's forward, got one with another on the "
            "instance (compiled or replaced), beside which no adapter would run; module.compile() leaves the class's"
        )


def _is_left_behind(module: nn.Module) -> bool:
    """Whether the instance's forward is that of one of its classes, as accelerate leaves it when it removes a hook."""
    own = module.__dict__.get("forward")
    if own is None or "_old_forward" in module.__dict__ or getattr(own, "__self__", None) is not module:
        return False
    return any(own.__func__ is vars(cls).get("forward") for cls in type(module).__mro__)


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
    experts = any("expert" in name for name, _ in layer.named_modules())  # some of which scale, or give more than a sum
    if parts != _LLAMA_PARTS or experts or hasattr(layer, "residual_multiplier"):
        raise ValueError(
            f"position: expected 'layer' for {type(layer).__name__}: 'attention' needs a layer made of "
            f"{', '.join(sorted(_LLAMA_PARTS))} with plain residual sums and no experts, got {', '.join(sorted(parts))}"
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


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """After it every part of ``module`` is in the mode, training or eval, that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Within it nothing is dropped out."""
    with modes_kept(module):
        module.eval()
        yield


def decoder_slice(decoder: Any, start: int, stop: int) -> Any:
    """The decoder with only these layers, sharing every parameter."""
    check_forward(decoder)
    part = copy.copy(decoder)
    part._modules = dict(decoder._modules)
    own = part.__dict__.pop("forward", None)
    if "_old_forward" in part.__dict__:  # accelerate's hook is bound to the decoder
        part.__dict__["_old_forward"] = type(decoder).forward.__get__(part)
        part.__dict__["forward"] = functools.partial(own.func, part)
    part.layers = decoder.layers[start:stop]
    part.config = copy.copy(decoder.config)
    part.config.num_hidden_layers = stop - start
    if getattr(decoder.config, "layer_types", None) is not None:
        part.config.layer_types = decoder.config.layer_types[start:stop]
    return part
