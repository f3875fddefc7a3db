"""A second model object over the parameters of a first: the reference of preference and reinforcement learning.

Each module of it is a new object with the first's parameters and buffers. So it can be in eval mode, be wrapped, get
hooks and another configuration while the first is trained, and it takes no memory. A parameter that asks for a gradient
will change, and is copied.
"""

import copy
import functools
import types
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from adapterkern.model.copies import Replaceable
from adapterkern.model.decoder import AdaptedLayer, own_class
from adapterkern.model.linears import ScaledLinear
from adapterkern.model.next_norm import TakingNorm
from adapterkern.model.prompt import PromptedAttention

_OURS = (AdaptedLayer, PromptedAttention, Replaceable, ScaledLinear, TakingNorm)  # classes that precede a module's own


def same_weights(llama: PreTrainedModel) -> Any:
    """``llama`` without its adapters, frozen and in eval mode, sharing every parameter that is frozen."""
    config = copy.deepcopy(llama.config)
    twin = _Copy({id(llama.config): config}).of(llama)
    twin.generation_config = copy.deepcopy(getattr(llama, "generation_config", None))
    return twin.eval()


class _Copy:
    """Copies of modules, made once each.

    Args:
        replaced: by the id of an attribute's value, what stands in its place in the copies.
    """

    def __init__(self, replaced: dict[int, Any]) -> None:
        self._made: dict[int, Any] = dict(replaced)

    def of(self, module: nn.Module) -> Any:
        if id(module) in self._made:
            return self._made[id(module)]
        cls: Any = type(module)
        for ours in _OURS:
            cls = own_class(module, ours) if isinstance(module, ours) else cls
        new = self._made[id(module)] = cls.__new__(cls)
        new.__dict__ |= {name: self._value(value) for name, value in module.__dict__.items()}
        for attribute in ("_adapter_site", "_prompt_site", "_place", "_linear_site", "_linear_path"):
            new.__dict__.pop(attribute, None)
        new._parameters = {name: self._parameter(p) for name, p in module._parameters.items()}
        new._modules = {name: child and self.of(child) for name, child in module._modules.items()}
        self._bind_forward(module, new)
        if getattr(module, "gradient_checkpointing", False):
            new.gradient_checkpointing = False
        return new

    def _value(self, value: Any) -> Any:
        if isinstance(value, (dict, set)):
            return copy.copy(value)  # among them the buffers and the hooks
        return self._made.get(id(value), value)

    def _parameter(self, p: nn.Parameter | None) -> Any:
        if p is None or not p.requires_grad:
            return p
        if id(p) not in self._made:
            self._made[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=False)
        return self._made[id(p)]

    def _bind_forward(self, module: nn.Module, new: Any) -> None:
        """Bind to the copy what accelerate's hooks have bound to the module."""
        own = new.__dict__.pop("forward", None)
        if "_old_forward" in new.__dict__:
            new.__dict__["_old_forward"] = type(new).forward.__get__(new)
            new.__dict__["forward"] = functools.partial(own.func, new)
        elif isinstance(own, types.MethodType) and own.__self__ is module:
            if not isinstance(module, _OURS):
                new.__dict__["forward"] = types.MethodType(own.__func__, new)
        elif own is not None:
            new.__dict__["forward"] = own
