"""``LlamaAdapter``: a frozen LLaMA with named adapters on its residual stream.

The backbone keeps its modules, with frozen parameters; ``decoder.py`` makes its layers pass the residual stream through
the active adapter. The adapters are in ``model.adapters``, not in the layers: the backbone's state_dict stays the same.
"""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterkern import checks
from adapterkern.model.adapter import Adapter, Beside, InTurn
from adapterkern.model.asking import check_prompts
from adapterkern.model.config import BIAS_SCALE, PROMPT, AdapterConfig, check_name
from adapterkern.model.copies import attach, detach
from adapterkern.model.decoder import (
    AdaptedLayer,
    adapt,
    check_attention_site,
    check_config,
    check_forward,
    decoder_layers,
    layer_device,
    restore,
    text_decoder,
)
from adapterkern.model.images import image_tokens, watch
from adapterkern.model.inside import needs_inside, number_of_gates
from adapterkern.model.liger import causal_lm_output, has_plain_loss, reads, use_liger, without_liger
from adapterkern.model.linears import attach_linears, detach_linears, inside_of, make_bias_scale
from adapterkern.model.logits import WithLogits
from adapterkern.model.prefix import Split
from adapterkern.model.prompt import Prompt, attach_prompt, detach_prompt
from adapterkern.model.reference import same_weights
from adapterkern.model.running import Running
from adapterkern.model.saving import Saved

_PROMPTS = ("inputs", "input_ids", "inputs_embeds")  # the names of the prompts in transformers' generate
_WITH_REFERENCE = frozenset(("dpo", "kto", "grpo", "rloo"))  # tags of TRL's trainers
_DEFAULT = AdapterConfig()

logger = logging.getLogger(__name__)


class LlamaAdapter(Running, Split, WithLogits, Saved):
    """A frozen ``LlamaForCausalLM`` (or another decoder of its structure) with adapters on its residual stream.

    Args:
        llama: a transformers model with ``model.layers``; it is frozen here and keeps its dtype and its devices.
        config: the first adapter, which is named ``"default"`` and active. None: no adapter yet; the model computes
            what ``llama`` does until ``add_adapter`` and ``set_adapter``.
        fused: whether adapters use the fused operator; assign ``model.fused`` to change it later.
        liger: whether the backbone runs Liger's kernels (liger.py); assign ``model.liger`` to change it later. In
            training, outputs that have a loss then have no logits.
        fuse_norm: whether an adapter and the RMSNorm that reads its output next run as one (next_norm.py); assign
            ``model.fuse_norm`` to change it later.

    Raises:
        TypeError: ``llama`` is not a decoder of this structure.
        ValueError: it already has adapters, ``config`` does not fit it, Liger does not support it, or ``fuse_norm``
            where no norm can be fused.
        ImportError: ``liger`` without liger-kernel.
    """

    @checks.other_names(model="llama", base_model="llama", peft_config="config", adapter_config="config")
    def __init__(
        self,
        llama: PreTrainedModel,
        config: AdapterConfig | None = _DEFAULT,
        *,
        fused: bool = True,
        liger: bool = False,
        fuse_norm: bool = False,
    ) -> None:
        layers = decoder_layers(llama)
        if any(isinstance(layer, AdaptedLayer) for layer in layers):
            raise ValueError("llama: expected a model without adapters, got one that has some; use add_adapter on it")
        check_config(text_decoder(llama).config)
        for layer in layers:
            check_forward(layer)
        if hasattr(llama, "peft_config") and any(p.requires_grad for p in llama.parameters()):
            logger.warning(
                "llama: PEFT's modules in it are frozen from now on, and an adapter's files do not hold them: call "
                "PEFT's merge_and_unload() before if they belong to the backbone, unload() if not"
            )
        super().__init__(llama.requires_grad_(False))
        self.adapters = nn.ModuleDict()
        self._configs: dict[str, AdapterConfig] = {}
        self._start()
        self._fused = checks.flag("fused", fused)
        self._liger = False
        self._has_reference = False
        self.fuse_norm = fuse_norm
        try:
            if config is not None:
                self.add_adapter("default", config)
                self.set_adapter("default")
            self.liger = liger
        except BaseException:
            self.fuse_norm = False
            raise
        for index, layer in enumerate(layers):
            adapt(layer, self._site(index))
        self._watching = watch(self)
        if self.checkpoints_activations:
            self.gradient_checkpointing_enable()  # again: recomputation must see the adapters of the forward

    def forward(self, *args: Any, adapter_names: Sequence[str | Sequence[str]] | None = None, **kwargs: Any) -> Any:
        """The backbone's forward, with the same arguments in the same order, and the same outputs.

        ``adapter_names`` names one adapter per sequence of the batch, ``"__base__"`` for none, see ``mixing``; a list
        among them is a stack.
        ``inspect.signature`` gives the backbone's arguments: Trainer reads a model's columns from them.
        """
        self.check_attached()
        if getattr(self, "_is_replica", False):
            self._own_sites()
        with self._mixing_by_name(adapter_names):
            if self._loss_is_fused(args, kwargs):
                return causal_lm_output(self.base, **self._named(args, kwargs))
            return self.base(*args, **kwargs)

    def _loss_is_fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not self.liger or not self.training:
            return False
        given = self._named(args, kwargs)
        keep = given.get("logits_to_keep")
        if given.get("labels") is None or isinstance(keep, Tensor) or keep:
            return False
        if not reads(self.get_output_embeddings()) or not has_plain_loss(self.base):
            return False
        return self.logits_path.plain and not self.logits_path.added

    def generate(self, *args: Any, adapter_names: Sequence[str | Sequence[str]] | None = None, **kwargs: Any) -> Any:
        """The backbone's ``generate``, with the active adapter, or with one of ``adapter_names`` per prompt."""
        self.check_attached()
        with self._mixing_by_name(adapter_names):
            mixture = self._state.mixture
            if mixture is None:
                return self.base.generate(*args, **kwargs)
            prompts = next((t for t in (*args[:1], *map(kwargs.get, _PROMPTS)) if t is not None), None)
            with self._mixing(mixture.generating(None if prompts is None else len(prompts))):
                return self.base.generate(*args, **kwargs)

    def unload(self) -> PreTrainedModel:
        """Remove the adapters and return the backbone as it was, still frozen. This model no longer has it then."""
        if "_unloaded" in self.__dict__:
            return self._unloaded
        self.liger = self.fuse_norm = False
        for hook in self._watching:
            hook.remove()
        for layer in self.layers:
            detach_prompt(layer)
            detach_linears(layer)
            site = layer.__dict__.get("_adapter_site")
            if site is not None and site.model is self:
                restore(layer)
        detach(self, self.base)
        if self.checkpoints_activations:
            self.enable_checkpointing({"use_reentrant": False})
        self._stack = ()
        self.__dict__["_unloaded"] = self._modules.pop("base")  # not as a module of this one
        return self._unloaded

    def reference(self, name: str | None = None) -> PreTrainedModel:
        """A frozen model over the backbone's own parameters: the reference or teacher of a training.

        For ``ref_model=`` and ``teacher_model=`` of TRL's trainers. It takes no memory for the backbone, is in eval
        mode, and has modes, hooks and a configuration of its own. Its ``to`` moves or casts the shared parameters.

        Args:
            name: an adapter, of which the reference has a frozen copy as it is now, with those below it in the active
                stack, or that it was saved on. Default none: the bare backbone.
        """
        self.check_attached()
        if name is not None:
            self._check_name(name)
        self._has_reference = True
        bare = same_weights(self.base)
        if name is None:
            return bare
        model = self._made_from[0](bare, None, fused=self.fused)
        model._liger = self._liger  # its modules have the classes of this model's
        stack = [*self.adapters_below(name), name]
        for one in stack:
            model.adapters[one] = copy.deepcopy(self.adapters[one])
            model._configs[one] = self._configs[one]
            attach(model, bare, self._configs[one].modules_to_save or ())
            model._attach_inside(one)
        model.set_adapter(stack)
        model.fuse_norm = self.fuse_norm
        return model.requires_grad_(False).eval()

    def add_model_tags(self, tags: list[str] | str) -> None:
        """As every model's. TRL's trainers add their names: a warning says what those with a reference take for it."""
        super().add_model_tags(tags)
        named = sorted(_WITH_REFERENCE.intersection([tags] if isinstance(tags, str) else tags))
        if named and not self._has_reference:
            logger.warning(
                "TRL's %s takes as its reference, if it has one, the backbone without adapters, loaded once more from "
                "%r; model.reference() shares this one's parameters: see docs/trainer.md",
                named[0].upper(),
                self.config.name_or_path,
            )

    def merge_and_unload(self) -> PreTrainedModel:
        """Not possible: raises ``NotImplementedError``."""
        raise NotImplementedError(
            "merge_and_unload: an adapter with LayerNorm and an activation is not a linear map, so no weight of the "
            "backbone can absorb it; keep the adapter, or use unload() to remove it"
        )

    # Named adapters

    @checks.other_names(adapter_name="name", adapter_config="config", peft_config="config")
    def add_adapter(self, name: str, config: AdapterConfig) -> None:  # type: ignore[override]
        """Create an adapter, on each layer's own device; ``set_adapter`` activates it.

        Raises:
            TypeError: ``config`` is not an ``AdapterConfig``.
            ValueError: the name is in use or not valid, or ``config`` does not fit the backbone.
        """
        self.check_attached()
        if not isinstance(config, AdapterConfig):
            hint = ": write AdapterConfig(**fields)" if isinstance(config, dict) else ""
            raise TypeError(f"config: expected an AdapterConfig, got {config!r:.80}{hint}")
        check_name(name)
        if name in self.adapters:
            raise ValueError(f"name: expected a new name, got {name!r}, which exists")
        inside = inside_of(self.decoder) if needs_inside(config) else None
        config = self._with_modules(config.resolve(self.decoder.config.hidden_size, len(self.layers), inside))
        sites = nn.ModuleDict()
        for index in config.layers or ():
            if config.position != "layer":
                check_attention_site(self.layers[index], config.position)
            sites[str(index)] = self._made(config, layer_device(self.layers[index]))
        if config.text_only and not image_tokens(self.base):
            raise ValueError(
                f"text_only: expected False for {type(self.base).__name__}, which does not read images, got True"
            )
        if config.bias_scale:
            sites[BIAS_SCALE] = make_bias_scale(self.base, config)
        self._add_copies(sites, config)
        self.adapters[name] = sites.train(self.training)
        self._configs[name] = config
        self._warn_of_unfused(name)
        with self._deleted_on_error(name):
            self._attach_inside(name)
            if config.kind == PROMPT:
                gates: list[Any] = [sites[str(index)].gate for index in config.layers or ()]
                check_prompts(self.base, gates, self.disable_adapter, lambda: self._only(name))

    def _made(self, config: AdapterConfig, device: torch.device) -> nn.Module:
        """What runs at one site."""
        size = self.decoder.config.hidden_size
        if config.kind == PROMPT:
            return Prompt(size, config.prompt_length, gates=number_of_gates(config, self.decoder), device=device)
        return (Beside if config.is_parallel else InTurn)(
            *(
                Adapter(
                    size,
                    config.adapter_dim,
                    activation=config.activation,
                    eps=config.eps,
                    init=config.init,
                    fused=self._fused,
                    x_free=config.x_free,
                    layer_norm=config.layer_norm,
                    scale=config.scale,
                    learned_scale=config.learned_scale,
                    dropout=config.dropout,
                    device=device,
                )
                for _ in range(config.depth)
            )
        )

    def _attach_inside(self, name: str) -> None:
        """Make the modules inside the layers run what the adapter has there."""
        config = self._configs[name]
        for index in config.layers or ():
            if config.kind == PROMPT:
                attach_prompt(self.layers[index], self._site(index))
            if config.bias_scale:
                attach_linears(self.layers[index], self._site(index))

    @contextlib.contextmanager
    def _deleted_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.delete_adapter(name)
            raise

    @checks.other_names(adapter_name="name", adapter_names="name, one at a time,")
    def delete_adapter(self, name: str) -> None:  # type: ignore[override]
        """Remove ``name``. If it was active, alone or in a stack, no adapter is active until ``set_adapter``.

        A warning says so if others are left.

        Raises:
            ValueError: there is no such adapter, or another one was loaded that was saved on it.
        """
        self._check_name(name)
        if above := [top for top, below in self._saved_on.items() if name in below]:
            raise ValueError(
                f"name: expected an adapter that none was saved on, got {name!r}: delete {above[0]!r} first"
            )
        del self.adapters[name]
        config = self._configs.pop(name)
        others = [(index, c) for c in self._configs.values() for index in c.layers or ()]
        for index in set(config.layers or ()) - {index for index, c in others if c.kind == PROMPT}:
            detach_prompt(self.layers[index])
        for index in set(config.layers or ()) - {index for index, c in others if c.bias_scale}:
            detach_linears(self.layers[index])
        if config.modules_to_save:
            kept = {path for config in self._configs.values() for path in config.modules_to_save or ()}
            with self._norms_of_their_own():
                detach(self, self.base, kept)
        self._saved_on.pop(name, None)
        if name in self._stack:
            self._stack = ()
            if self.adapters:
                logger.warning(
                    "delete_adapter: no adapter is active now; set_adapter chooses %s", " or ".join(self.adapters)
                )

    @checks.other_names(adapter_name="name")
    def set_scale(self, scale: float, name: str | None = None) -> None:
        """Set the scale of all adapters of ``name`` (default: the active one), a learned one's value too.

        It is saved with the adapter. A single site's is ``model.adapters[name]["3"][0].scale``, which is not.

        Raises:
            TypeError, ValueError: ``scale`` is not a finite number, or there is no such adapter.
        """
        name = self._check_name(name)
        config = dataclasses.replace(self._configs[name], scale=scale)
        for module in self.adapters[name].modules():
            if isinstance(module, Adapter):
                module.set_scale(config.scale)
        self._configs[name] = config

    @property
    def fused(self) -> bool:
        """Whether the adapters use the fused operator. Assigning changes every adapter and keeps its parameters."""
        return self._fused

    @fused.setter
    def fused(self, value: bool) -> None:
        self._fused = checks.flag("fused", value)
        for module in self.adapters.modules():
            if isinstance(module, Adapter):
                module.fused = value

    @property
    def liger(self) -> bool:
        """Whether the backbone runs Liger's kernels. Assigning changes only the classes of its modules."""
        return self._liger

    @liger.setter
    def liger(self, value: bool) -> None:
        if checks.flag("liger", value) != self._liger:
            if value:
                self.check_attached()
                _ = self.logits_path  # found now, not within a step, where the model may be sharded
            with self._norms_of_their_own():
                (use_liger if value else without_liger)(self.base)
            self._liger = value

    def adapter_config(self, name: str | None = None) -> AdapterConfig:
        """The configuration of ``name`` (default: the active adapter), with explicit layers and ``adapter_dim``."""
        return self._configs[self._check_name(name)]

    def adapter_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The parameters of ``name`` (default: the active adapter), for an optimizer."""
        return list(self.adapters[self._check_name(name)].parameters())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of parameters that the active adapter trains, and of all parameters: its own and the backbone's.

        Of a stack the first is the top one's, and the second has all of the stack.
        """
        adapter = [] if self._active is None else self.adapter_parameters()
        trainable = sum(p.numel() for p in adapter if p.requires_grad)
        below = [p for name in self._stack[:-1] for p in self.adapter_parameters(name)]
        return trainable, sum(p.numel() for p in (*adapter, *below)) + self.base.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio, and of a stack its adapters."""
        trainable, total = self.get_nb_trainable_parameters()
        stack = f" || stack: {' → '.join(self._stack)}" if len(self._stack) > 1 else ""
        share = f"{100 * trainable / total:.4f}"
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share}{stack}")

    def _check_name(self, name: str | None) -> str:
        self.check_attached()
        if isinstance(name, (list, tuple)):
            raise TypeError(
                f"name: expected the name of one adapter, got {name!r}; several run at once in generate or forward "
                "with adapter_names=, one per sequence, or inside mixing(names, index), and one after the other by "
                "set_adapter([...])"
            )
        name = self._active if name is None else name
        if name is None or name not in self.adapters:
            raise ValueError(f"name: expected one of {self._names()}, got {name!r}")
        return name
