"""Gated prompts: the zero-init attention of LLaMA-Adapter (arXiv:2303.16199), inside a frozen attention.

With the layer's own query q, as it is after RoPE and any norm of its own, the result of attention before its output
projection becomes

    out = attention(q, k, v) + g · softmax(s · q · K_pᵀ) · V_p        K_p, V_p: the keys and values of P embeddings

where s is the layer's scale (1/√head_dim), and g, one number or one for each head, starts at 0, so that the model
starts unchanged. The layer itself
makes K_p and V_p of the embeddings, by its frozen projections (and norms of keys), without RoPE and shared by as many
queries as its other keys: grouped-query attention is nothing special.

While a text is generated, K_p and V_p are made once and kept with its KV cache, as long as nothing changes of what they
are made of: embeddings, the attention's parameters, and biases and scales of its linear layers.

No family's forward is copied. transformers' attention asks a registry for the function that computes it, by the name in
its configuration, and passes on what it does not know; while a prompt runs, the configuration names ``_attend``, which
calls the function of the right name. An attention that does not ask, or does not pass on, is refused.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AttentionInterface, Cache

from adapterkern import checks
from adapterkern.model.config import MAX_PROMPT_LENGTH
from adapterkern.model.copies import Replaceable
from adapterkern.model.decoder import argument_names, change_class, check_forward, own_class, preceded, reduced
from adapterkern.ops import graphs
from adapterkern.ops.kept import Entry, state_of, uncounted

_NAME = "adapterkern_prompt"  # in transformers' registry
_REGISTRY, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"  # in the module of an attention's class


class Gated(NamedTuple):
    """Keys and values (B or 1, heads of keys, P, head_dim) that queries also attend to, and their gate.

    The gate is (B or 1, heads of queries or 1, L or 1).
    """

    keys: Tensor
    values: Tensor
    gate: Tensor


# n embeddings (P, d) → their keys and values (n, heads of keys, P, head_dim)
Ask = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
Prompts = Callable[[Ask, torch.Size], list[Gated]]  # of a batch of this shape, (B, L, d)


class Prompt(nn.Module):
    """The gated prompt of one layer: P embeddings and one gate, or one for each head (LLaMA-Adapter, arXiv:2303.16199).

    Args:
        hidden_size: d.
        prompt_length: P, 1 to 1024.
        gates: 1, or the number of heads of queries.
        device, dtype: of the parameters; the default dtype is fp32 whatever the backbone's.

    ``embeddings`` (P, d) start standard normal, ``gate`` (gates,) at zero, as in the paper's code, which has one for
    each head, and in PEFT's ``AdaptionPrompt``, which has one.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        prompt_length: int = 10,
        *,
        gates: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.integer("hidden_size", hidden_size, 1)
        checks.integer("prompt_length", prompt_length, 1, MAX_PROMPT_LENGTH)
        self.embeddings = nn.Parameter(torch.empty(prompt_length, hidden_size, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.empty(checks.integer("gates", gates, 1), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new embeddings, and close the gate."""
        nn.init.normal_(self.embeddings)
        nn.init.zeros_(self.gate)

    def forward(self, ask: Ask, batch: torch.Size) -> list[Gated]:
        return [Gated(*ask([self.embeddings]), self.gate[None, :, None])]  # the same for all sequences of the batch

    def extra_repr(self) -> str:
        return f"prompt_length={len(self.embeddings)}"


class PromptSite(Protocol):
    """The gated prompts of one layer."""

    def prompt(self) -> Prompts | None:
        """Those that run at the moment; None if there are none."""

    def linear(self, path: list[str]) -> list[nn.Module]:
        """As ``LinearSite.linear``; with an empty path those of the whole layer."""


class _Asked:
    """What an attention was to attend to: its keys and values."""

    keys: Tensor | None = None
    values: Tensor | None = None


class _Added:
    """What is added to an attention's result, and whether it was."""

    def __init__(self, gated: list[Gated]) -> None:
        self.gated, self.reached = gated, False


class _Renamed:
    """A configuration, but for the name of the attention."""

    _attn_implementation = _NAME

    def __init__(self, config: Any) -> None:
        self._own = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("_own"), name)


class PromptedAttention(nn.Module):
    """Precedes an attention's own class in the method resolution order; ``attach_prompt`` makes the combined class."""

    _prompt_site: PromptSite
    _argument_names: tuple[str, ...]  # of the own class's forward

    @property
    def config(self) -> Any:
        own = self.__dict__["config"]
        return own if self._prompt_site.prompt() is None else _Renamed(own)

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        prompt = self._prompt_site.prompt()
        if prompt is None:
            return super().forward(*args, **kwargs)
        kwargs |= dict(zip(self._argument_names, args, strict=False))
        ask = functools.partial(self._kept_keys_and_values, kwargs)
        added = _Added(prompt(ask, kwargs["hidden_states"].shape))
        result = super().forward(**kwargs, gated_prompt=added)
        if not added.reached:
            raise _refused(self, "asks for its function by its configuration, and passes on what it does not know")
        return result

    def _kept_keys_and_values(self, given: dict[str, Any], embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Those of ``_keys_and_values``, kept for as long as the cache of a text that is generated with them."""
        if (kept := _kept_with(given, self.training)) is None:
            return self._keys_and_values(given, embeddings)
        scales = [p for of in self._prompt_site.linear([]) for p in of.parameters()]
        made_of = [*embeddings, *self.parameters(), *scales]
        if any(is_traceable_wrapper_subclass(t) or t.is_meta for t in made_of):
            return self._keys_and_values(given, embeddings)
        key = (id(self), given["hidden_states"].dtype, *map(id, embeddings))
        storages = [t.untyped_storage() for t in made_of]
        if uncounted(made_of, storages):
            return self._keys_and_values(given, embeddings)
        state, entry = state_of(made_of, storages), kept.get(key)
        if entry is None or not entry.valid(state):
            made = self._keys_and_values(given, embeddings)
            entry = kept[key] = Entry(tuple(map(StorageWeakRef, storages)), state, made)
        return entry.prepared

    def _keys_and_values(self, given: dict[str, Any], embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Those that the attention makes of ``embeddings`` in place of its hidden states, unmasked and without RoPE."""
        asked, stacked = _Asked(), torch.stack(list(embeddings))
        count = stacked.shape[1]
        given = given | {"hidden_states": stacked.to(given["hidden_states"].dtype), "attention_mask": None}
        given |= {name: None for name in ("past_key_values", "cache_position") if name in given}
        if given.get("position_ids") is not None:
            given["position_ids"] = torch.zeros(1, count, dtype=torch.int64, device=stacked.device)
        if "position_embeddings" in given:
            given["position_embeddings"] = _no_rotation(given["position_embeddings"], count)
        super().forward(**given, gated_prompt=asked)
        if asked.keys is None or asked.values is None:
            raise _refused(self, "asks for its function by its configuration, and passes on what it does not know")
        return asked.keys, asked.values

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, protocol, _prompted_class, own_class(self, PromptedAttention))


# What the prompts of an attention gave, while a KV cache lives: keys and values of each layer, by what they are made of
_Kept = dict[tuple[Any, ...], Entry[tuple[Tensor, Tensor]]]
_kept: WeakKeyDictionary[Cache, _Kept] = WeakKeyDictionary()


def _kept_with(given: dict[str, Any], training: bool) -> _Kept | None:
    """What is kept with the KV cache of a forward's text; None where nothing may be kept.

    Nothing is where a gradient may be asked for or weights may change under way; nor by a graph, whose tensors are the
    next replay's.
    """
    cache = given.get("past_key_values")
    if not isinstance(cache, Cache) or training or torch.is_grad_enabled():
        return None
    if torch.compiler.is_compiling() or graphs.recording(given["hidden_states"].device):
        return None
    return _kept.setdefault(cache, {})


@functools.cache
def _prompted_class(cls: Any) -> Any:
    return preceded(cls, PromptedAttention, _argument_names=argument_names(cls))


def _no_rotation(rotation: Any, count: int) -> Any:
    """What RoPE multiplies by, (cos, sin) or complex numbers (..., B, L, head_dim), for tokens that it leaves as is."""
    if rotation is None:
        return None
    if isinstance(rotation, dict):  # by a layer's kind
        return {kind: _no_rotation(value, count) for kind, value in rotation.items()}
    one = [
        torch.ones_like(t[..., :1, :1, :]).expand(*t.shape[:-3], 1, count, -1)
        for t in (rotation if isinstance(rotation, tuple) else [rotation])
    ]
    return (one[0], torch.zeros_like(one[1])) if isinstance(rotation, tuple) else one[0]


def _attend(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    gated_prompt: _Asked | _Added | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As every attention function of transformers: q, k, v (B, heads, L, head_dim) → (B, L, heads, head_dim)."""
    if isinstance(gated_prompt, _Asked):
        gated_prompt.keys, gated_prompt.values = key, value
        batch, heads, length, _ = query.shape
        return value.new_zeros(batch, length, heads, value.shape[-1]), None
    out, weights = _own_function(attention)(attention, query, key, value, attention_mask, *args, **kwargs)
    if gated_prompt is None:
        return out, weights
    gated_prompt.reached = True
    for gated in gated_prompt.gated:
        out = out + _gated_attention(query, gated, kwargs.get("scaling"))
    return out, weights


AttentionInterface.register(_NAME, _attend)


def _gated_attention(query: Tensor, gated: Gated, scale: float | None) -> Tensor:
    batch, heads, *_ = query.shape
    keys, values = (
        t.to(query.dtype).repeat_interleave(heads // t.shape[1], dim=1).expand(batch, -1, -1, -1)
        for t in (gated.keys, gated.values)
    )
    attended = F.scaled_dot_product_attention(query, keys, values, scale=scale)
    return (gated.gate.to(query.dtype)[..., None] * attended).transpose(1, 2)


def _own_function(attention: nn.Module) -> Any:
    """The function that computes the attention without a prompt, by its own configuration."""
    modeling = _modeling(own_class(attention, PromptedAttention))
    config = attention.__dict__["config"]
    return getattr(modeling, _REGISTRY).get_interface(config._attn_implementation, getattr(modeling, _EAGER, None))


def _modeling(cls: type) -> Any:
    """The module that has the forward of ``cls``."""
    defines = next(base for base in cls.__mro__ if "forward" in vars(base))
    return sys.modules[defines.__module__]


def attach_prompt(layer: nn.Module, site: PromptSite) -> None:
    """Make the attention of ``layer`` run the prompts of ``site``; ``detach_prompt`` undoes it.

    Raises:
        ValueError: the layer has no attention that can run one.
    """
    attention = getattr(layer, "self_attn", None)
    if isinstance(attention, PromptedAttention):
        return
    if not isinstance(attention, nn.Module):
        raise ValueError(
            f"kind: expected layers that have attention (self_attn) for 'prompt', got a {type(layer).__name__}; name "
            "those that have it by layers"
        )
    if isinstance(attention, Replaceable):
        raise ValueError(
            f"modules_to_save: expected no {type(attention).__name__} that is to run gated prompts, got one that an "
            "adapter trains"
        )
    check_forward(attention)
    if "config" not in attention.__dict__ or not hasattr(_modeling(type(attention)), _REGISTRY):
        raise _refused(attention, "asks for its function by its configuration")
    attention.__dict__["_prompt_site"] = site  # not by setattr, which would register the model
    cls: Any = type(attention)
    change_class(attention, _prompted_class(cls))


def detach_prompt(layer: nn.Module) -> None:
    """Give the attention of ``layer`` its own class back."""
    attention = getattr(layer, "self_attn", None)
    if isinstance(attention, PromptedAttention):
        del attention.__dict__["_prompt_site"]
        change_class(attention, own_class(attention, PromptedAttention))


def _refused(attention: nn.Module, expected: str) -> ValueError:
    return ValueError(f"kind: expected an attention that {expected} for 'prompt', got {type(attention).__name__}")
