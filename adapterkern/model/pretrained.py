"""What transformers expects of a model, taken from the wrapped backbone, so that Trainer and others accept the wrapper.

``Trainer``, TRL and others use much more of a model than its forward: its configurations, its embeddings, the name of
its class (which decides whether a loss shifts the labels), gradient checkpointing, what it saves. ``Wrapped`` is a
``PreTrainedModel`` that delegates these to the backbone and saves only what it adds to it.
"""

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from adapterkern.model.decoder import argument_names, reduced, text_decoder

# What generate and its helpers call on a model
_GENERATION = frozenset(name for name in vars(GenerationMixin) if not name.startswith("__"))

logger = logging.getLogger(__name__)


class Wrapped(PreTrainedModel):
    """A model that wraps ``base``, a transformers decoder, and adds parameters to it."""

    base: Any
    _made_from: tuple[Any, Any]  # the arguments of _class_for
    # transformers reads these from the class; the backbone was checked when it was constructed.
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = supports_gradient_checkpointing = True

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base.config)
        self.__class__ = _class_for(type(self), type(base))  # type: ignore[arg-type]
        self.base = base
        self.loss_type: Any = getattr(base, "loss_type", None)
        self._no_split_modules = base._no_split_modules
        _keep_differentiable(base)

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the backbone can: ``pipeline`` and assisted generation ask the class."""
        return hasattr(cls, "_made_from") and cls._made_from[1].can_generate()

    def __getattr__(self, name: str) -> Any:
        """The backbone's ``lm_head``, ``model`` and so on, and what transformers' ``generate`` asks of an assistant."""
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and name not in self._modules and (name in base._modules or name in _GENERATION):
            return getattr(base, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and name in base._modules and name not in self._modules:
            setattr(base, name, value)  # or this model would have a second lm_head, which nothing runs
        else:
            super().__setattr__(name, value)
            if name == "peft_config":
                self._warn_of_peft()

    def _warn_of_peft(self) -> None:
        """PEFT sets ``peft_config`` on a model at its end: its modules are in it, and all others are frozen."""
        if any(not p.requires_grad for key, p in self.named_parameters() if not key.startswith("base.")):
            logger.warning(
                "peft_config: PEFT has frozen the adapters of this model: it trains and saves its own modules alone. "
                "To train the adapters, pass no peft_config; to train PEFT's modules alone, give it the backbone, "
                "model.unload()"
            )

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers 5 calls it on the class of every model that contains a mixture of experts."""
        return True

    def __repr__(self) -> str:
        # By its name alone, which Trainer and pipelines look for, this model would be shown as the backbone.
        return f"{self._made_from[0].__name__} of {super().__repr__()}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, protocol, _class_for, *self._made_from)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward by the backbone's names."""
        names = argument_names(type(self.base))  # type: ignore[arg-type]
        if len(args) > len(names):
            raise TypeError(f"forward: expected at most {len(names)} positional arguments, got {len(args)}")
        return dict(zip(names, args, strict=False)) | kwargs

    @property
    def base_model(self) -> Any:
        """The backbone without its head."""
        return self.base.base_model

    @property
    def decoder(self) -> Any:
        """The backbone without its head, and without what reads images: embeddings, ``layers``, final norm."""
        return text_decoder(self.base)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the backbone."""
        return self.decoder.layers

    @property
    def device(self) -> torch.device:
        """The backbone's device."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype; the parameters that are added to it may have another."""
        return self.base.dtype

    @property
    def generation_config(self) -> Any:
        """The backbone's, which ``generate`` uses."""
        return getattr(self._modules.get("base"), "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if "base" in self._modules:  # transformers also sets it in this model's constructor, before there is a base
            self.base.generation_config = value

    @property
    def loss_function(self) -> Any:
        """The backbone's."""
        return self.base.loss_function

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self.base.loss_function = value

    @property
    def hf_device_map(self) -> Any:
        """Which modules of the backbone are on which device, if it is spread over several."""
        return self.base.hf_device_map

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the backbone's weights."""
        self.base.tie_weights(*args, **kwargs)

    # What transformers does to a model's weights and settings, done to the backbone

    @property
    def quantization_method(self) -> Any:
        """The backbone's; None if it is not quantized."""
        return getattr(self.base, "quantization_method", None)

    def half(self, *args: Any) -> Self:
        """As every module's; refused for a quantized backbone, as transformers does."""
        if getattr(self.base, "is_quantized", False):
            self.base.half(*args)
        return super().half(*args)

    def float(self, *args: Any) -> Self:
        """As ``half``."""
        if getattr(self.base, "is_quantized", False):
            self.base.float(*args)
        return super().float(*args)

    def dequantize(self, dtype: Any = None) -> Any:
        """Dequantize the backbone, which stays frozen."""
        self.base.dequantize(*(() if dtype is None else (dtype,)))
        self.base.requires_grad_(False)
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's. Its new rows are frozen like the others."""
        embeddings = self.base.resize_token_embeddings(*args, **kwargs)
        self.base.requires_grad_(False)
        return embeddings

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """The backbone's, which knows what it supports."""
        self.base.set_attn_implementation(*args, **kwargs)

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """The backbone's."""
        self.base.set_experts_implementation(*args, **kwargs)

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.get_encoder(*args, **kwargs)

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.get_decoder(*args, **kwargs)

    def init_weights(self) -> None:
        """Not possible: transformers would draw the adapters' weights anew, and not as ``init`` says."""
        raise NotImplementedError(
            "init_weights: add_adapter initializes adapters; call reset_parameters on one to do it again"
        )

    initialize_weights = init_weights

    def enable_peft_hotswap(self, *args: Any, **kwargs: Any) -> None:
        """Not needed: ``load_adapter`` and ``set_adapter`` compile nothing anew for adapters of one shape."""
        raise NotImplementedError("enable_peft_hotswap: expected a PEFT adapter; use load_adapter and set_adapter")

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    # Gradient checkpointing

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The context of a layer's forward, and that of its recomputation. A subclass with a state overrides it."""
        return nullcontext(), nullcontext()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **how: Any
    ) -> None:
        """Turn on the backbone's own, non-reentrant; a layer is recomputed in the state that its forward had.

        ``how`` is passed on to the backbone: options of newer versions of transformers, such as which layers.

        Raises:
            ValueError: ``use_reentrant=True``, with which a layer whose input is frozen gets no gradient.
        """
        kwargs: dict[str, Any] = {"use_reentrant": False, "context_fn": self._recomputing}
        kwargs |= gradient_checkpointing_kwargs or {}
        if kwargs["use_reentrant"]:
            raise ValueError("gradient_checkpointing_kwargs: expected use_reentrant=False, got True")
        self.enable_checkpointing(kwargs, **how)
        # transformers 5 makes the embeddings' output require a gradient here, which reentrant checkpointing needs; the
        # backward would then go on below the first adapter, down to the embeddings.
        if hasattr(self.base, "_require_grads_hook"):
            self.base.disable_input_require_grads()

    def enable_checkpointing(self, kwargs: dict[str, Any], **how: Any) -> None:
        """Turn on the backbone's own checkpointing with these arguments."""
        # Newer versions of transformers have another name for it and warn about the old one.
        enable = getattr(self.base, "activation_checkpointing_enable", self.base.gradient_checkpointing_enable)
        enable(kwargs, **how)

    @property
    def checkpoints_activations(self) -> bool:
        """Whether gradient checkpointing is on in the backbone."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules())

    def gradient_checkpointing_disable(self) -> None:
        """Turn it off: activations are kept for the backward."""
        disable = getattr(self.base, "activation_checkpointing_disable", self.base.gradient_checkpointing_disable)
        disable()

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **how: Any
    ) -> None:
        """``gradient_checkpointing_enable`` by the name that newer versions of transformers use."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **how)


@functools.cache
def _class_for(cls: Any, base: Any) -> Any:
    """``cls`` with the signature of the forward of ``base``: a signature belongs to a class, not to an instance."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    given, own = inspect.signature(base.forward), inspect.signature(cls.forward).parameters.values()
    parameters = [p for p in given.parameters.values() if p.kind is not p.VAR_KEYWORD]
    ours = [p for p in own if p.kind is p.KEYWORD_ONLY]
    rest = next(p for p in own if p.kind is p.VAR_KEYWORD)
    forward.__signature__ = given.replace(  # type: ignore[attr-defined]
        parameters=[*parameters, *ours, rest], return_annotation=inspect.Signature.empty
    )
    forward.__doc__ = cls.forward.__doc__
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    members |= {"_made_from": (cls, base)}
    # Its name: pipelines and Trainer look whether a model's is among those of causal language models, and so on.
    return type(base.__name__, (cls,), members)


@contextmanager
def configured(model: Wrapped, config: Any) -> Iterator[None]:
    """The model's ``generation_config`` is ``config``: what one is given beside it would be mixed with it."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def _keep_differentiable(base: nn.Module) -> None:
    """Make gradients pass through 4-bit layers on a CPU, whatever runs before a training step.

    When a forward in eval mode needs no gradient, bitsandbytes 0.50 converts a 4-bit weight to a layout for inference
    and never converts it back: from then on the layer silently gives its input no gradient.
    """
    for module in base.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.state_dict()  # has the side effect of restoring the original layout
