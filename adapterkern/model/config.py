"""``AdapterConfig``: which layers of a decoder have adapters, and how large the adapters are."""

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import nn

from adapterkern import checks
from adapterkern.model.adapter import INITS
from adapterkern.model.inside import Inside, num_params_beside
from adapterkern.ops.checks import MAX_ADAPTER_DIM
from adapterkern.ops.reference import ACTIVATIONS

PLACES = {"layer": "layer", "attention": "attention", "parallel-mlp": "layer", "parallel-attention": "attention"}
POSITIONS = tuple(PLACES)  # each with the sum, of a layer's two, after which its adapters run
KINDS = ("bottleneck", "prompt")
PROMPT = "prompt"  # the kind, and the place of its modules: inside attention
GATES = ("layer", "head")
BIAS_SCALE = "bias_scale"  # the field, and the name of its modules among an adapter's layers
MODULES = "modules_to_save"  # the field, and the name of the copies among an adapter's layers
FREE_IN_ADAPTERS = ("init",)  # what a run may resume with another value of: all values come from the checkpoint
# Fields that earlier versions did not have, with what their adapters were: as ever, to runs and studies of those
ADDED = {
    **{"layer_norm": True, "scale": 1.0, "learned_scale": False, "text_only": False, "dropout": 0.0},
    **{"kind": "bottleneck", "prompt_length": 10, "prompt_gate": "layer", BIAS_SCALE: False},
}
MAX_DEPTH = 32  # adapters run one after the other: at this depth one site is as deep as a LLaMA of 7B has layers

BASE_NAME = "__base__"  # in adapter_names: no adapter, as PEFT spells it
MAX_PROMPT_LENGTH = 1024  # each token's attention reads all of a layer's prompt, past what a prompt is worth

_DEFAULT_DIM = 64
_DEFAULT_LENGTH = 10
_OF_PROMPTS_ALONE = ("prompt_length", "prompt_gate")
# What applies to gated prompts
_OF_PROMPTS = (*_OF_PROMPTS_ALONE, "kind", "layers", "every", "max_params", MODULES, BIAS_SCALE)

logger = logging.getLogger(__name__)


def adapter_num_params(hidden_size: int, adapter_dim: int, layer_norm: bool = True, learned_scale: bool = False) -> int:
    """Number of parameters of one adapter: two (r, d) weights, r + d biases, LayerNorm's 2d, a learned scale's 1."""
    return adapter_dim * (2 * hidden_size + 1) + (3 if layer_norm else 1) * hidden_size + learned_scale


def largest_adapter_dim(
    hidden_size: int, adapters: int, max_params: int, layer_norm: bool = True, learned_scale: bool = False
) -> int:
    """The largest ``adapter_dim`` for which ``adapters`` adapters have at most ``max_params`` parameters; 0 if none."""
    others = adapter_num_params(hidden_size, 0, layer_norm, learned_scale)
    return max(0, min((max_params // adapters - others) // (2 * hidden_size + 1), MAX_ADAPTER_DIM))


def prompt_num_params(hidden_size: int, prompt_length: int) -> int:
    """Number of parameters of one gated prompt: (P, d) embeddings and a gate."""
    return prompt_length * hidden_size + 1


def largest_prompt_length(hidden_size: int, prompts: int, max_params: int) -> int:
    """The largest ``prompt_length`` for which ``prompts`` have at most ``max_params`` parameters; 0 if none."""
    return max(0, min((max_params // prompts - 1) // hidden_size, MAX_PROMPT_LENGTH))


def check_name(name: object, argument: str = "name") -> str:
    """``name``, if an adapter can have it. Raises ``ValueError`` that names the argument."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name) or name == BASE_NAME:
        raise ValueError(
            f"{argument}: expected a non-empty name without dots that is no attribute of nn.ModuleDict, nor "
            f"{BASE_NAME!r}, got {name!r}"
        )
    return name


# As PEFT and AdapterHub have them
OTHER_NAMES = dict.fromkeys(("r", "rank", "bottleneck_size", "bottleneck_dim"), "adapter_dim") | {
    "reduction_factor": "adapter_dim, which is hidden_size / reduction_factor,",
    "layers_to_transform": "layers",
    "leave_out": "layers, which names the rest,",
    "target_modules": "position and layers",
    **dict.fromkeys(("is_parallel", "mh_adapter", "output_adapter"), "position"),
    "peft_type": "kind",
    **dict.fromkeys(("adapter_len", "num_virtual_tokens"), "prompt_length"),
    **dict.fromkeys(("w_bias", "add_bias", "add_scale", "add_bias_and_scale"), BIAS_SCALE),
    "adapter_layers": "layers",
    "non_linearity": "activation",
    "init_lora_weights": "init",
    "init_weights": "init",
    "scaling": "scale",
    **dict.fromkeys(("lora_alpha", "alpha"), "scale, which is lora_alpha / r,"),
    "ln_before": "layer_norm",
    "lora_dropout": "dropout",
    **dict.fromkeys(("bias", "task_type", "inference_mode"), "no such argument"),
}


@checks.other_names(**OTHER_NAMES, fuse_norm="it in LlamaAdapter(...), not")
@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Which layers of a decoder have adapters, and how large the adapters are.

    Args:
        adapter_dim: r, the width of each bottleneck, 1 to 512.
        position: ``"layer"``: on the residual stream after a decoder layer; ``"attention"``: on the residual stream
            between attention and the feed-forward network; ``"parallel-mlp"``, ``"parallel-attention"``: what an
            adapter adds to the stream there is made of the stream before the feed-forward network, or before attention,
            ``y = residual + scale · up(act(down(norm(x))))`` (He et al. 2022, arXiv:2110.04366).
        every: k selects layers k−1, 2k−1, … (counted from 0).
        layers: explicit layer numbers, from 0; negative ones count from the end. Cannot be combined with ``every``.
        depth: number of adapters in sequence at each site, 1 to 32. They run one after the other, so that time and
            memory grow with it. In parallel positions all read the same x.
        activation, init, eps, x_free, layer_norm, scale, learned_scale, dropout: as in ``Adapter``.
        text_only: in a model that also reads images, y = x on the tokens that stand for parts of them.
        max_params: a budget for all sites together, instead of ``adapter_dim``: the largest one that fits is taken. It
            does not count ``modules_to_save``.
        kind: ``"bottleneck"``: ``Adapter``s on the residual stream; ``"prompt"``: a gated prompt inside attention, see
            ``Prompt``. Of the other fields, ``layers``, ``every``, ``max_params``, ``modules_to_save`` and
            ``bias_scale`` apply to it.
        prompt_length: P, the number of embeddings of each gated prompt, 1 to 1024; chosen by ``max_params``, if given.
        prompt_gate: ``"layer"``: a gate for each gated prompt; ``"head"``: one for each head of its queries.
        bias_scale: each linear layer inside the layers that have adapters also learns a bias and a scale of its
            outputs, ``y = scale · (W · x + bias)`` (LLaMA-Adapter V2, arXiv:2304.15010), see ``BiasScale``.
        modules_to_save: modules of the backbone that are trained and saved with the adapter, by name, as in PEFT:
            ``["embed_tokens"]``. The head of a backbone for classification is always among them; ``[]``: no module.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range; the message names it.
    """

    adapter_dim: int = checks.option(_DEFAULT_DIM, f"width of the bottleneck, 1 to {MAX_ADAPTER_DIM}")
    position: Literal["layer", "attention", "parallel-mlp", "parallel-attention"] = checks.option(
        "layer", "after a layer, between attention and MLP, or parallel to either", POSITIONS
    )
    every: int = checks.option(1, "K: adapters on layers K-1, 2K-1, ...")
    layers: tuple[int, ...] | list[int] | None = checks.option(
        None, "adapters on these layers: --layers=-2,-1 the last two"
    )
    depth: int = checks.option(1, f"adapters in sequence at each site, 1 to {MAX_DEPTH}")
    activation: str = checks.option("silu", "between the two projections", tuple(ACTIVATIONS))
    init: str = checks.option("identity", "identity: y = x at the start", INITS)
    eps: float = checks.option(1e-5, "added to LayerNorm's variance")
    x_free: bool = checks.option(False, "keep y, not x, for the backward: more time, less memory with --liger")
    layer_norm: bool = checks.option(True, "LayerNorm before the bottleneck; without: y = x + up(act(down(x)))")
    scale: float = checks.option(1.0, "factor of what an adapter adds")
    learned_scale: bool = checks.option(False, "train the scale too, one number per adapter, from --scale on")
    dropout: float = checks.option(0.0, "probability that training drops a number of the bottleneck")
    text_only: bool = checks.option(False, "of a backbone that reads images: no adapters on those")
    max_params: int | None = checks.option(
        None, "a budget instead of adapter_dim: the largest that fits, such as 8000000 or 8e6"
    )
    modules_to_save: tuple[str, ...] | list[str] | None = checks.option(
        None, "also train and save these modules of the backbone: embed_tokens"
    )
    kind: Literal["bottleneck", "prompt"] = checks.option(
        "bottleneck", "bottlenecks on the residual stream, or gated prompts inside attention (LLaMA-Adapter)", KINDS
    )
    prompt_length: int = checks.option(
        _DEFAULT_LENGTH, f"embeddings of each gated prompt, 1 to {MAX_PROMPT_LENGTH}; with --kind prompt"
    )
    prompt_gate: Literal["layer", "head"] = checks.option(
        "layer", "a gate for each gated prompt, or for each of its heads; with --kind prompt", GATES
    )
    bias_scale: bool = checks.option(
        False, "also train a bias and a scale of each linear layer in these layers (LLaMA-Adapter V2)"
    )

    def __post_init__(self) -> None:
        checks.integer("adapter_dim", self.adapter_dim, 1, MAX_ADAPTER_DIM)
        checks.choice("position", self.position, POSITIONS)
        checks.integer("every", self.every, 1)
        if checks.integer("depth", self.depth, 1) > MAX_DEPTH:
            raise ValueError(
                f"depth: expected at most {MAX_DEPTH} adapters, which run one after the other, got {self.depth}"
            )
        checks.choice("activation", self.activation, tuple(ACTIVATIONS))
        checks.choice("init", self.init, INITS)
        checks.number("eps", self.eps, "[0, inf)")
        if checks.flag("x_free", self.x_free) and self.is_parallel:
            raise ValueError(
                f"x_free: expected False with position={self.position!r}, whose y is not made of x, got True"
            )
        checks.flag("layer_norm", self.layer_norm)
        object.__setattr__(self, "scale", float(checks.number("scale", self.scale, "(-inf, inf)")))
        checks.flag("learned_scale", self.learned_scale)
        object.__setattr__(self, "dropout", float(checks.number("dropout", self.dropout, "[0, 1)")))
        checks.flag("text_only", self.text_only)
        checks.choice("kind", self.kind, KINDS)
        checks.integer("prompt_length", self.prompt_length, 1, MAX_PROMPT_LENGTH)
        checks.choice("prompt_gate", self.prompt_gate, GATES)
        if checks.flag(BIAS_SCALE, self.bias_scale) and self.text_only:
            raise ValueError("bias_scale: expected False with text_only=True, since it changes all tokens, got True")
        self._check_kind()
        if self.max_params is not None:
            checks.integer("max_params", self.max_params, 1)
            name, default, decided = SIZES[self.kind]
            if getattr(self, name) != default:
                raise ValueError(
                    f"max_params: expected max_params or {name}, not both: a budget decides the {decided}; got "
                    f"max_params={self.max_params} and {name}={getattr(self, name)}"
                )
        if self.modules_to_save is not None:
            names = self.modules_to_save
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
                raise TypeError(f"modules_to_save: expected a list of names of modules, got {names!r}")
            object.__setattr__(self, MODULES, tuple(names))
        if self.layers is not None:
            if not isinstance(self.layers, (list, tuple)):
                raise TypeError(f"layers: expected a list of layer numbers, got {self.layers!r}")
            for layer in self.layers:
                checks.integer("layers", layer)
            if self.every != 1:
                raise ValueError(
                    "layers: expected layers or every, not both: each says which layers have adapters; got "
                    f"layers={self.layers!r} and every={self.every}"
                )
            object.__setattr__(self, "layers", tuple(self.layers))

    def _check_kind(self) -> None:
        """Raise ``ValueError`` for a field that says something, but not of adapters of this kind."""
        for field in dataclasses.fields(self):
            if not applies(field.name, self.kind) and (value := getattr(self, field.name)) != field.default:
                raise ValueError(
                    f"{field.name}: expected {field.default!r} with kind={self.kind!r}, which it does not apply to, "
                    f"got {value!r}"
                )

    @property
    def place(self) -> str:
        """The sum of a layer after which the adapters run: attention's, or the last, the layer's; or ``"prompt"``."""
        return PROMPT if self.kind == PROMPT else PLACES[self.position]

    @property
    def is_parallel(self) -> bool:
        """Whether the adapters read another stream than the one to which they add."""
        return self.position.startswith("parallel")

    def site_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that have adapters in a decoder of ``num_layers`` layers, ascending.

        Raises:
            ValueError: no layer is left, or one is out of range or given twice.
        """
        if self.layers is None:
            sites = tuple(range(self.every - 1, num_layers, self.every))
            if not sites:
                raise ValueError(f"every: expected at most the {num_layers} layers of the model, got {self.every}")
            return sites
        for layer in self.layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"layers: expected numbers from {-num_layers} to {num_layers - 1}, got {layer}")
        sites = tuple(sorted({layer % num_layers for layer in self.layers}))
        if len(sites) != len(self.layers) or not sites:
            raise ValueError(f"layers: expected at least one layer and none twice, got {list(self.layers)}")
        return sites

    def skips(self, layer: str, sites: int) -> bool:
        """Whether ``layer`` is among the first ``sites`` of this resolved configuration."""
        return int(layer) in (self.layers or ())[:sites]

    def num_params(self, hidden_size: int, num_layers: int, inside: Inside | None = None) -> int:
        """Number of trainable parameters in a decoder of this shape. ``inside`` as for ``resolve``."""
        sites = self.site_layers(num_layers)
        beside = num_params_beside(self, sites, inside)
        if self.kind == PROMPT:
            return len(sites) * prompt_num_params(hidden_size, self.prompt_length) + beside
        one = adapter_num_params(hidden_size, self.adapter_dim, self.layer_norm, self.learned_scale)
        return len(sites) * self.depth * one + beside

    def resolve(self, hidden_size: int, num_layers: int, inside: Inside | None = None) -> "AdapterConfig":
        """This configuration with explicit ``layers``, and with ``max_params`` replaced by the size that it decides.

        Args:
            hidden_size, num_layers: of the decoder.
            inside: of its layers; needed by ``max_params`` together with ``bias_scale`` or ``prompt_gate="head"``.

        Raises:
            ValueError: even ``adapter_dim=1`` (``prompt_length=1``) exceeds the budget, or ``adapter_dim`` exceeds what
                ``svd`` can fill.
        """
        sites = self.site_layers(num_layers)
        resolved = dataclasses.replace(self, every=1, layers=sites, max_params=None)
        most = hidden_size if self.init == "svd" else MAX_ADAPTER_DIM
        if self.max_params is None:
            if self.adapter_dim > most:
                raise ValueError(
                    f"adapter_dim: expected at most hidden_size={hidden_size} with init='svd', got {self.adapter_dim}"
                )
            return resolved
        count, beside = len(sites) * self.depth, num_params_beside(self, sites, inside)
        name, *_ = SIZES[self.kind]
        if self.kind == PROMPT:
            what, smallest = "prompts", prompt_num_params(hidden_size, 1)
            chosen = largest_prompt_length(hidden_size, count, self.max_params - beside)
        else:
            parts = self.layer_norm, self.learned_scale
            what, smallest = "adapters", adapter_num_params(hidden_size, 1, *parts)
            chosen = min(most, largest_adapter_dim(hidden_size, count, self.max_params - beside, *parts))
        if chosen == 0:
            raise ValueError(
                f"max_params: expected at least {count * smallest + beside:,}, the size of {count} {what} of {name}=1 "
                f"at hidden_size={hidden_size}{' with bias_scale' * self.bias_scale}, got {self.max_params:,}"
            )
        size: dict[str, Any] = {name: chosen}
        resolved = dataclasses.replace(resolved, **size)
        logger.warning(
            "max_params=%s: chose %s=%d, %s parameters in %d %s",
            f"{self.max_params:,}",
            name,
            chosen,
            f"{resolved.num_params(hidden_size, num_layers, inside):,}",
            count,
            what,
        )
        return resolved

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` reads them."""
        fields = dataclasses.asdict(self)
        lists = {name: getattr(self, name) for name in ("layers", MODULES)}
        return fields | {name: None if value is None else list(value) for name, value in lists.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "AdapterConfig":
        """The inverse of ``to_dict``. Raises ``ValueError`` that names an unknown field."""
        if not isinstance(fields, dict):
            raise TypeError(f"config: expected an object of fields, got {type(fields).__name__}")
        return checks.fields(cls, fields)


def applies(field: str, kind: str) -> bool:
    """Whether a field of ``AdapterConfig`` says something of adapters of this kind."""
    return field in _OF_PROMPTS if kind == PROMPT else field not in _OF_PROMPTS_ALONE


def applicable(fields: Mapping[str, Any], asked: Collection[str]) -> dict[str, Any]:
    """``fields`` of a configuration, where those that do not apply to its kind, and are not ``asked`` for, are default.

    Of the fields that several adapters share, each takes those of its own kind.
    """
    kind = fields.get("kind", AdapterConfig.kind)
    return {
        name: value if name in asked or applies(name, kind) else getattr(AdapterConfig, name)
        for name, value in fields.items()
    }


# The field that a budget decides, its default, and what it is
SIZES: dict[str, tuple[str, int, str]] = {
    "bottleneck": ("adapter_dim", _DEFAULT_DIM, "dimension"),
    "prompt": ("prompt_length", _DEFAULT_LENGTH, "length"),
}


def prefix_length(config: AdapterConfig) -> int:
    """Number of leading layers whose output an adapter of this resolved configuration does not change."""
    below = config.kind == PROMPT or config.bias_scale or config.position != "layer"  # changes its first layer's output
    adapted = (config.layers or (0,))[0] + (not below)
    return int(min([adapted, *map(_first_layer, config.modules_to_save or ())]))


def _first_layer(path: str) -> float:
    """The first layer whose output a module of the backbone changes: 0 if it is below the layers."""
    top, _, inside = path.partition(".")
    child, _, rest = inside.partition(".")
    if top != "model" or child == "norm":  # a head, or the norm above the layers
        return math.inf
    return int(rest.partition(".")[0]) if child == "layers" else 0
