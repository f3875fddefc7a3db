"""``LlamaAdapter``: a frozen LLaMA with named adapters on its residual stream.

The backbone keeps its modules, with frozen parameters; ``decoder.py`` makes its layers pass the residual stream through
the active adapter. The adapters are in ``model.adapters``, not in the layers: the backbone's state_dict stays the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterkern.model.adapter import Adapter
from adapterkern.model.config import AdapterConfig, prefix_length
from adapterkern.model.decoder import (
    AdaptedLayer,
    adapt,
    check_attention_site,
    check_forward,
    decoder_layers,
    layer_device,
    restore,
)
from adapterkern.model.extra import detach
from adapterkern.model.liger import causal_lm_output, has_plain_loss, reads, use_liger, without_liger
from adapterkern.model.mixing import Decide, DeferredMixture, Mixture
from adapterkern.model.prefix import Split
from adapterkern.model.saving import Saved

BASE_NAME = "__base__"  # in adapter_names: no adapter, as PEFT spells it
_PROMPTS = ("inputs", "input_ids", "inputs_embeds")  # the names of the prompts in transformers' generate
_DEFAULT = AdapterConfig()


class LlamaAdapter(Split, Saved):
    """A frozen ``LlamaForCausalLM`` (or another decoder of its structure) with adapters on its residual stream.

    Args:
        llama: a transformers model with ``model.layers``; it is frozen here and keeps its dtype and its devices.
        config: the first adapter, which is named ``"default"`` and active. None: no adapter yet; the model computes
            what ``llama`` does until ``add_adapter`` and ``set_adapter``.
        fused: whether adapters use the fused operator; assign ``model.fused`` to change it later.
        liger: whether the backbone runs Liger's kernels (liger.py); assign ``model.liger`` to change it later. In
            training, outputs that have a loss then have no logits.

    Raises:
        TypeError: ``llama`` is not a decoder of this structure.
        ValueError: it already has adapters, ``config`` does not fit it, or Liger does not support it.
        ImportError: ``liger`` without liger-kernel.
    """

    def __init__(
        self,
        llama: PreTrainedModel,
        config: AdapterConfig | None = _DEFAULT,
        *,
        fused: bool = True,
        liger: bool = False,
    ) -> None:
        layers = decoder_layers(llama)
        if any(isinstance(layer, AdaptedLayer) for layer in layers):
            raise ValueError("llama: expected a model without adapters, got one that has some; use add_adapter on it")
        for layer in layers:
            check_forward(layer)
        super().__init__(llama.requires_grad_(False))
        self.adapters = nn.ModuleDict()
        self._configs: dict[str, AdapterConfig] = {}
        self._active: str | None = None
        self._enabled = True
        self._mixture: Mixture | DeferredMixture | None = None
        self._fused = fused
        self._liger = False
        if config is not None:
            self.add_adapter("default", config)
            self.set_adapter("default")
        self.liger = liger
        for index, layer in enumerate(layers):
            adapt(layer, self._site(index))
        if self.checkpoints_activations:
            self.gradient_checkpointing_enable()  # again: recomputation must see the adapters of the forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward, with the same arguments and outputs. Trainer reads a model's columns from them.

        ``adapter_names`` names one adapter per sequence of the batch, ``"__base__"`` for none, see ``mixing``.
        """
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels)
        with self._mixing_by_name(adapter_names):
            if labels is not None and not args and self._loss_is_fused(kwargs):
                return causal_lm_output(self.base, *given, **kwargs)  # type: ignore[arg-type]
            return self.base(*given, *args, **kwargs)

    def _loss_is_fused(self, kwargs: dict[str, Any]) -> bool:
        keep = kwargs.get("logits_to_keep")
        if not self.liger or not self.training or isinstance(keep, Tensor) or keep:
            return False
        return reads(self.get_output_embeddings()) and has_plain_loss(self.base)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The backbone's ``generate``, with the active adapter, or with one of ``adapter_names`` per prompt."""
        with self._mixing_by_name(adapter_names):
            if self._mixture is None:
                return self.base.generate(*args, **kwargs)
            prompts = next((t for t in (*args[:1], *map(kwargs.get, _PROMPTS)) if t is not None), None)
            mixture = self._mixture.generating(None if prompts is None else len(prompts))
            with self._mixing(mixture):
                return self.base.generate(*args, **kwargs)

    def unload(self) -> PreTrainedModel:
        """Remove the adapters and return the backbone as it was, still frozen."""
        self.liger = False
        for layer in self.layers:
            site = layer.__dict__.get("_adapter_site")
            if site is not None and site.model is self:
                restore(layer)
        detach(self, self.base)
        if self.checkpoints_activations:
            self.enable_checkpointing({"use_reentrant": False})
        return self.base

    def merge_and_unload(self) -> PreTrainedModel:
        """Not possible: raises ``NotImplementedError``."""
        raise NotImplementedError(
            "merge_and_unload: an adapter with LayerNorm and an activation is not a linear map, so no weight of the "
            "backbone can absorb it; keep the adapter, or use unload() to remove it"
        )

    # Named adapters

    def add_adapter(self, name: str, config: AdapterConfig) -> None:  # type: ignore[override]
        """Create an adapter, on each layer's own device; ``set_adapter`` activates it.

        Raises:
            TypeError: ``config`` is not an ``AdapterConfig``.
            ValueError: the name is in use or not valid, or ``config`` does not fit the backbone.
        """
        if not isinstance(config, AdapterConfig):
            raise TypeError(f"config: expected an AdapterConfig, got {config!r}")
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"name: expected a non-empty name without dots that is no attribute of nn.ModuleDict, got {name!r}"
            )
        if name in self.adapters:
            raise ValueError(f"name: expected a new name, got {name!r}, which exists")
        config = self._with_modules(config.resolve(self.config.hidden_size, len(self.layers)))
        sites = nn.ModuleDict()
        for index in config.layers or ():
            if config.position == "attention":
                check_attention_site(self.layers[index])
            sites[str(index)] = nn.Sequential(
                *(
                    Adapter(
                        self.config.hidden_size,
                        config.adapter_dim,
                        activation=config.activation,
                        eps=config.eps,
                        init=config.init,
                        fused=self._fused,
                        x_free=config.x_free,
                        device=layer_device(self.layers[index]),
                    )
                    for _ in range(config.depth)
                )
            )
        self._add_copies(sites, config)
        self.adapters[name] = sites
        self._configs[name] = config

    def set_adapter(self, name: str) -> None:  # type: ignore[override]
        """Make ``name`` the active adapter, the one that runs. The others are not used and get no gradient."""
        self._active = self._check_name(name)

    def delete_adapter(self, name: str) -> None:  # type: ignore[override]
        """Remove ``name``. If it was active, no adapter is active until ``set_adapter``."""
        self._check_name(name)
        del self.adapters[name], self._configs[name]
        if self._active == name:
            self._active = None

    @property
    def active_adapter(self) -> str | None:
        """The adapter that runs outside ``mixing``; None if none is set, and inside ``disable_adapter``."""
        return self._active if self._enabled else None

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disables all adapters inside the block: the model computes what the backbone does."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def mixing(
        self, names: Sequence[str], index: Tensor | Decide, weight: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Inside the block each sequence of a batch runs its own adapters instead of the active one.

        y = x + Σ_k weight_k · (A_k(x) − x), summed over the sequence's choices that have an adapter at the site,
        computed by grouped calls of the fused operator. Layers, dimensions and positions may differ between names.
        Gradients reach ``weight`` and the parameters of all ``names`` (zeros for those that no sequence chose).
        Inside ``disable_adapter`` no adapter runs.

        Args:
            names: the adapters to choose from, without duplicates.
            index: int64, (B,) or (B, K): which of ``names`` each sequence runs; −1 is none. Or a function that returns
                index and weight for the residual stream (B, L, d) below the first of the adapters. It is called once,
                in a forward or on the prompts of a ``generate``, and its result is kept until the block ends.
            weight: floating point, same shape as ``index``; default 1.

        Raises:
            ValueError, TypeError: an unknown name, a number out of range, a wrong shape or dtype; in the forward, a
                batch of another size. On a GPU, the numbers are checked asynchronously.
        """
        if unknown := [name for name in names if name not in self.adapters]:
            raise ValueError(f"names: expected some of {self._names()}, got {unknown[0]!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"names: expected none twice, got {list(names)}")
        adapters: dict[str, Any] = {name: self.adapters[name] for name in names}
        configs = {name: self._configs[name] for name in names}
        if isinstance(index, Tensor) or not callable(index):
            return self._mixing(Mixture(adapters, configs, index, weight))
        if weight is not None:
            raise ValueError("weight: expected None if index is a function, which returns both, got a tensor")
        return self._mixing(DeferredMixture(adapters, configs, index))

    def _mixing_by_name(self, adapter_names: Sequence[str] | None) -> AbstractContextManager[None]:
        if adapter_names is None:
            return nullcontext()
        names = list(dict.fromkeys(name for name in adapter_names if name != BASE_NAME))
        numbers = {name: number for number, name in enumerate(names)} | {BASE_NAME: -1}
        index = torch.tensor([numbers[name] for name in adapter_names], dtype=torch.int64, device=self.device)
        return self.mixing(names, index)

    @contextmanager
    def _mixing(self, mixture: Mixture | DeferredMixture) -> Iterator[None]:
        before, self._mixture = self._mixture, mixture
        try:
            yield
        finally:
            self._mixture = before

    @property
    def fused(self) -> bool:
        """Whether the adapters use the fused operator. Assigning changes every adapter and keeps its parameters."""
        return self._fused

    @fused.setter
    def fused(self, value: bool) -> None:
        self._fused = value
        for module in self.adapters.modules():
            if isinstance(module, Adapter):
                module.fused = value

    @property
    def liger(self) -> bool:
        """Whether the backbone runs Liger's kernels. Assigning changes only the classes of its modules."""
        return self._liger

    @liger.setter
    def liger(self, value: bool) -> None:
        if value != self._liger:
            (use_liger if value else without_liger)(self.base)
            self._liger = value

    def adapter_config(self, name: str | None = None) -> AdapterConfig:
        """The configuration of ``name`` (default: the active adapter), with explicit layers and ``adapter_dim``."""
        return self._configs[self._check_name(name)]

    def adapter_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The parameters of ``name`` (default: the active adapter), for an optimizer."""
        return list(self.adapters[self._check_name(name)].parameters())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of parameters that the active adapter trains, and of all parameters, its own and the backbone's."""
        adapter = [] if self._active is None else self.adapter_parameters()
        trainable = sum(p.numel() for p in adapter if p.requires_grad)
        return trainable, sum(p.numel() for p in adapter) + sum(p.numel() for p in self.base.parameters())

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def _names(self) -> str:
        return ", ".join(self.adapters) or "the model's adapters (it has none)"

    def _check_name(self, name: str | None) -> str:
        name = self._active if name is None else name
        if name is None or name not in self.adapters:
            raise ValueError(f"name: expected one of {self._names()}, got {name!r}")
        return name

    # Gradient checkpointing

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What ran in the forward runs in its recomputation, whatever is active by then."""
        return nullcontext(), self._state(self._active, self._enabled, self._fused, self._mixture)

    @contextmanager
    def _state(
        self, active: str | None, enabled: bool, fused: bool, mixture: Mixture | DeferredMixture | None
    ) -> Iterator[None]:
        before = self._active, self._enabled, self._fused, self._mixture
        self._set_state(active, enabled, fused, mixture)
        try:
            yield
        finally:
            self._set_state(*before)

    def _set_state(
        self, active: str | None, enabled: bool, fused: bool, mixture: Mixture | DeferredMixture | None
    ) -> None:
        self._active, self._enabled, self._mixture = active, enabled, mixture
        if fused != self._fused:  # otherwise keep the flags that were set on single adapters
            self.fused = fused

    # The frozen prefix

    @property
    def prefix_length(self) -> int:
        """Number of leading layers whose output does not depend on the running adapters; all layers if none runs."""
        if self._mixture is not None and self._enabled:
            return self._mixture.prefix_length(len(self.layers))
        return len(self.layers) if self.active_adapter is None else prefix_length(self._configs[self.active_adapter])

    def _site(self, layer: int) -> "_Site":
        return _Site(self, layer)


class _Site:
    """The adapters of one layer: those that the model runs there at the moment."""

    def __init__(self, model: LlamaAdapter, index: int) -> None:
        self.model, self.index = model, str(index)

    def has(self, position: str) -> bool:
        return self._at(position) is not None

    def run(self, position: str, hidden: Tensor) -> Tensor:
        adapters = self._at(position)
        return hidden if adapters is None else adapters(hidden)

    def _at(self, position: str) -> Callable[[Tensor], Tensor] | None:
        model, active = self.model, self.model.active_adapter
        if model._mixture is not None and model._enabled:
            return model._mixture.at(self.index, position)
        if active is None or model.adapter_config(active).position != position:
            return None
        sites: Any = model.adapters[active]
        return sites[self.index] if self.index in sites else None  # noqa: SIM401 ModuleDict has no get
