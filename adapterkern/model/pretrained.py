"""What transformers expects of a model, asked of the backbone inside: so a wrapped model goes wherever a model goes.

``Trainer``, TRL and others ask a model for much more than its forward: its configurations, its embeddings, the name of
its class (whose loss shifts labels), gradient checkpointing, what it saves. ``Wrapped`` is a ``PreTrainedModel`` that
answers for the backbone, and saves what it adds to it and nothing else.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedModel

TRAINER_WEIGHTS = "model.safetensors"  # what transformers' Trainer loads when it resumes


class Wrapped(PreTrainedModel):
    """A model around ``base``, a transformers model, that adds parameters to it."""

    base: Any
    # transformers asks these of a class; the backbone has been checked when it was made.
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = supports_gradient_checkpointing = True

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base.config)
        self.base = base
        self.loss_type: Any = getattr(base, "loss_type", None)
        self._no_split_modules = base._no_split_modules
        _keep_differentiable(base)

    @classmethod
    def can_generate(cls) -> bool:
        """Not by a mixin of its own: ``generate`` is the backbone's."""
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers 5 asks it of every class around a mixture of experts."""
        return True

    def _get_name(self) -> str:
        # Trainer's label smoothing shifts the labels of classes whose name it finds among the causal language models.
        return type(self.base).__name__

    @property
    def base_model(self) -> Any:
        """The backbone without its head."""
        return self.base.base_model

    @property
    def generation_config(self) -> Any:
        """The backbone's, which ``generate`` follows."""
        return getattr(self._modules.get("base"), "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if "base" in self._modules:  # transformers sets it while it makes this model
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
        """Which part of the backbone is on which device, if it has been spread over several."""
        return self.base.hf_device_map

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:  # type: ignore[override]
        """The backbone's keys: Trainer then misses none of them in its checkpoints."""
        return {f"base.{key}" for key in self.base.state_dict()}

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the backbone does."""
        self.base.tie_weights(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    # Gradient checkpointing

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What surrounds a layer's forward, and what surrounds its recomputation; a subclass with a state knows."""
        return nullcontext(), nullcontext()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **how: Any
    ) -> None:
        """The backbone's own, non-reentrant; what is recomputed is in the state of the forward.

        ``how`` goes to the backbone's: which layers, and where to, in a transformers that lets one say so.

        Raises:
            ValueError: ``use_reentrant=True``, which gives frozen inputs no gradient.
        """
        kwargs: dict[str, Any] = {"use_reentrant": False, "context_fn": self._recomputing}
        kwargs |= gradient_checkpointing_kwargs or {}
        if kwargs["use_reentrant"]:
            raise ValueError("gradient_checkpointing_kwargs: expected use_reentrant=False, got True")
        self.enable_checkpointing(kwargs, **how)
        # transformers 5 lets the embeddings' output require a gradient here, for reentrant checkpointing's sake; that
        # would take the backward past the first adapter, down to the embeddings.
        if hasattr(self.base, "_require_grads_hook"):
            self.base.disable_input_require_grads()

    def enable_checkpointing(self, kwargs: dict[str, Any], **how: Any) -> None:
        """The backbone's own, as it is told."""
        # transformers renames it on the way to version 6 and warns about the old name.
        enable = getattr(self.base, "activation_checkpointing_enable", self.base.gradient_checkpointing_enable)
        enable(kwargs, **how)

    @property
    def checkpoints_activations(self) -> bool:
        """Whether gradient checkpointing is on in the backbone."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules())

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        disable = getattr(self.base, "activation_checkpointing_disable", self.base.gradient_checkpointing_disable)
        disable()

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **how: Any
    ) -> None:
        """As :meth:`gradient_checkpointing_enable`, which is its name up to transformers 4."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **how)


def _keep_differentiable(base: nn.Module) -> None:
    """See that gradients pass 4-bit layers on a CPU, whatever has run or will run before a training step.

    bitsandbytes 0.50 lays a 4-bit weight out anew for inference when a forward in eval mode needs no gradient, and
    never back: from then on the layer gives its input no gradient, and nothing is said.
    """
    for module in base.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.state_dict()  # saving restores the layout that is saved
