"""``LlamaAdapter``: a frozen LLaMA with named adapters on its residual stream.

The backbone is used as it is, its parameters frozen; ``decoder.py`` makes its layers pass the residual stream through
the active adapter. Adapters live in ``model.adapters``, not in the layers: the backbone's state_dict stays as it was.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterkern.model.adapter import Adapter, AdapterConfig
from adapterkern.model.decoder import (
    AdaptedLayer,
    adapt,
    check_attention_site,
    check_forward,
    decoder_layers,
    decoder_slice,
    eval_mode,
    layer_device,
    restore,
)
from adapterkern.model.liger import causal_lm_output, has_plain_loss, reads, use_liger, without_liger
from adapterkern.model.mixing import Decide, DeferredMixture, Mixture, prefix_length
from adapterkern.model.saving import Saved

BASE_NAME = "__base__"  # in adapter_names: the bare backbone, as PEFT spells it
_PROMPTS = ("inputs", "input_ids", "inputs_embeds")  # how transformers' generate calls them


class LlamaAdapter(Saved):
    """A frozen ``LlamaForCausalLM`` (or another decoder of its shape) with adapters on its residual stream.

    Args:
        llama: a transformers model with ``model.layers``; frozen here, kept in its own dtype and on its own devices.
        config: where the adapters of the first adapter, named ``"default"``, stand.
        fused: whether adapters use the fused operator; ``model.fused`` changes it live, over the same parameters.
        liger: whether the backbone runs Liger's kernels (liger.py); ``model.liger`` changes it live. In training the
            outputs then have no logits beside their loss.

    Raises:
        TypeError: ``llama`` is not a decoder of this shape.
        ValueError: it already has adapters, ``config`` does not fit it, or Liger has nothing for it.
        ImportError: ``liger`` without liger-kernel.
    """

    def __init__(
        self, llama: PreTrainedModel, config: AdapterConfig | None = None, *, fused: bool = True, liger: bool = False
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
        self.add_adapter("default", config or AdapterConfig())
        self.set_adapter("default")
        self.liger = liger
        for index, layer in enumerate(layers):
            adapt(layer, _Site(self, index))
        if self.checkpoints_activations:
            self.gradient_checkpointing_enable()  # again, and from now on in the state of the forward

    # What the backbone is

    @property
    def decoder(self) -> Any:
        """The backbone without its head: embeddings, ``layers``, final norm."""
        return self.base.model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, adapted in place."""
        return self.decoder.layers

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype; the adapters' is fp32."""
        return self.base.dtype

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
        """The backbone's forward, arguments and outputs unchanged; Trainer reads here which columns a model takes.

        ``adapter_names`` gives each sequence of the batch an adapter of its own, ``"__base__"`` none: :meth:`mixing`.
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
        """The backbone's ``generate``, with the active adapter, or with ``adapter_names``, one for each prompt."""
        with self._mixing_by_name(adapter_names):
            if self._mixture is None:
                return self.base.generate(*args, **kwargs)
            prompts = next((t for t in (*args[:1], *map(kwargs.get, _PROMPTS)) if t is not None), None)
            mixture = self._mixture.generating(None if prompts is None else len(prompts))
            with self._mixing(mixture):
                return self.base.generate(*args, **kwargs)

    def unload(self) -> PreTrainedModel:
        """Take the adapters off and return the backbone as it was, still frozen."""
        self.liger = False
        for layer in self.layers:
            site = layer.__dict__.get("_adapter_site")
            if site is not None and site.model is self:
                restore(layer)
        if self.checkpoints_activations:
            self.enable_checkpointing({"use_reentrant": False})
        return self.base

    def merge_and_unload(self) -> PreTrainedModel:
        """Not possible: raises ``NotImplementedError``."""
        raise NotImplementedError(
            "merge_and_unload: an adapter with LayerNorm and an activation is not a linear map, so no weight of the "
            "backbone can absorb it; keep the adapter, or use unload() to take it off"
        )

    # Named adapters

    def add_adapter(self, name: str, config: AdapterConfig) -> None:  # type: ignore[override]
        """Create adapters under ``name``, each on its layer's device; :meth:`set_adapter` activates them.

        Raises:
            ValueError: the name is taken or not a valid one, or ``config`` does not fit the backbone.
        """
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"name: expected a non-empty name without dots, got {name!r}")
        if name in self.adapters:
            raise ValueError(f"name: expected a new name, got {name!r}, which exists")
        config = config.resolve(self.config.hidden_size, len(self.layers))
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
        self.adapters[name] = sites
        self._configs[name] = config

    def set_adapter(self, name: str) -> None:  # type: ignore[override]
        """Make ``name`` the active adapter, the one that runs. The others get no gradient, for nothing uses them."""
        self._active = self._check_name(name)

    def delete_adapter(self, name: str) -> None:  # type: ignore[override]
        """Remove ``name``. If it was active, none is until :meth:`set_adapter`."""
        self._check_name(name)
        del self.adapters[name], self._configs[name]
        if self._active == name:
            self._active = None

    @property
    def active_adapter(self) -> str | None:
        """The adapter that runs outside :meth:`mixing`; None inside :meth:`disable_adapter` or after its deletion."""
        return self._active if self._enabled else None

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is the bare backbone."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def mixing(
        self, names: Sequence[str], index: Tensor | Decide, weight: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Within it each sequence of a batch runs adapters of its own, instead of the active one.

        y = x + Σ_k weight_k · (A_k(x) − x) at each site that the sequence's k-th choice has, by grouped calls of the
        fused operator. Layers, dimensions and positions may differ between names. Gradients reach the parameters of all
        ``names`` (zeros for those that no sequence chose) and ``weight``. :meth:`disable_adapter` goes before it.

        Args:
            names: adapters to choose from, none twice.
            index: int64, (B,) or (B, K): which of ``names`` each sequence runs; −1 is none. Or a function that gives
                index and weight for the residual stream (B, L, d) below the first of the adapters: it is asked once, in
                a forward or on the prompts of a ``generate``, and its answer holds for the rest.
            weight: floating point, of ``index``'s shape; default 1.

        Raises:
            ValueError, TypeError: a name that does not exist, a number out of range, a shape or dtype that does not
                fit; in the forward, a batch of another size. On a GPU, numbers are checked there, asynchronously.
        """
        if unknown := [name for name in names if name not in self.adapters]:
            raise ValueError(f"names: expected some of {', '.join(self.adapters)}, got {unknown[0]!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"names: expected none twice, got {list(names)}")
        adapters: dict[str, Any] = {name: self.adapters[name] for name in names}
        configs = {name: self._configs[name] for name in names}
        if isinstance(index, Tensor) or not callable(index):
            return self._mixing(Mixture(adapters, configs, index, weight))
        if weight is not None:
            raise ValueError("weight: expected None where index is a function, which gives both, got a tensor")
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
        """Whether the adapters use the fused operator. Assigning changes every adapter, parameters untouched."""
        return self._fused

    @fused.setter
    def fused(self, value: bool) -> None:
        self._fused = value
        for module in self.adapters.modules():
            if isinstance(module, Adapter):
                module.fused = value

    @property
    def liger(self) -> bool:
        """Whether the backbone runs Liger's kernels. Assigning changes the classes of its modules, and nothing else."""
        return self._liger

    @liger.setter
    def liger(self, value: bool) -> None:
        if value != self._liger:
            (use_liger if value else without_liger)(self.base)
            self._liger = value

    def adapter_config(self, name: str | None = None) -> AdapterConfig:
        """The configuration of ``name`` (default: the active adapter), its layers and ``adapter_dim`` resolved."""
        return self._configs[self._check_name(name)]

    def adapter_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The parameters of ``name`` (default: the active adapter), for an optimizer."""
        return list(self.adapters[self._check_name(name)].parameters())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters the active adapter trains, and how many it and the backbone have together."""
        trainable = sum(p.numel() for p in self.adapter_parameters() if p.requires_grad)
        adapter = sum(p.numel() for p in self.adapter_parameters())
        return trainable, adapter + sum(p.numel() for p in self.base.parameters())

    def print_trainable_parameters(self) -> None:
        """Print both, and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def _check_name(self, name: str | None) -> str:
        name = self._active if name is None else name
        if name is None or name not in self.adapters:
            raise ValueError(f"name: expected one of {', '.join(self.adapters) or 'no adapter'}, got {name!r}")
        return name

    # Gradient checkpointing

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The adapter that is active in the forward is the one that is recomputed."""
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
        if fused != self._fused:  # else what single adapters have been told stays
            self.fused = fused

    # The frozen prefix

    @property
    def prefix_length(self) -> int:
        """How many leading layers compute the same whatever the adapters that run hold; all of them without one."""
        if self._mixture is not None and self._enabled:
            return self._mixture.prefix_length(len(self.layers))
        return len(self.layers) if self.active_adapter is None else prefix_length(self._configs[self.active_adapter])

    @functools.cached_property
    def split_obstacle(self) -> str:
        """Why the decoder cannot be run in two parts; "" if it can. Asked of it once, on four tokens.

        Two parts are right for a decoder that only runs its layers between embeddings and norm. Some scale the
        embeddings as well, or have a norm of another name.
        """
        ids = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        middle, end = len(self.layers) // 2, len(self.layers)
        with torch.no_grad(), eval_mode(self.base), self.disable_adapter():
            try:
                first, second = decoder_slice(self.decoder, 0, middle), decoder_slice(self.decoder, middle, end)
            except ValueError as error:
                return str(error)
            first.norm = nn.Identity()
            below = first(input_ids=ids, use_cache=False).last_hidden_state
            parts = second(inputs_embeds=below, use_cache=False).last_hidden_state
            whole = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        if (parts - whole).norm() <= 1e-2 * whole.norm():
            return ""
        return f"{type(self.decoder).__name__} does more than run its layers between embeddings and norm"

    def _check_split(self) -> None:
        if self.split_obstacle:
            raise ValueError(f"model: expected a decoder that can be run in two parts, but {self.split_obstacle}")

    def run_prefix(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, below: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """The residual stream (B, L, d) after the first ``prefix_length`` layers, before any adapter; no gradient.

        ``below`` is the stream after the first ``start`` of them, where that is known.

        Raises:
            ValueError: the decoder cannot be run in two parts, :attr:`split_obstacle`.
        """
        self._check_split()
        prefix = decoder_slice(self.decoder, start, self.prefix_length)
        prefix.norm = nn.Identity()
        source = {"input_ids": input_ids} if below is None else {"inputs_embeds": below}
        with torch.no_grad(), self.disable_adapter():
            return prefix(**source, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def run_suffix(self, hidden: Tensor, attention_mask: Tensor | None = None, start: int | None = None) -> Tensor:
        """From what :meth:`run_prefix` gave to the decoder's last hidden state (B, L, d), as its own forward has it.

        ``hidden`` is the stream after ``start`` layers, by default ``prefix_length`` and never more.

        Raises:
            ValueError: the decoder cannot be run in two parts, :attr:`split_obstacle`.
        """
        self._check_split()
        start = self.prefix_length if start is None else start
        if start > 0:
            hidden = _Site(self, start - 1).run("layer", hidden)
        suffix = decoder_slice(self.decoder, start, len(self.layers))
        return suffix(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False).last_hidden_state


class _Site:
    """What an adapted layer knows: its number, and the model whose active adapter to ask for."""

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
