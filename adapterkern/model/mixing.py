"""Different adapters for the sequences, or the tokens, of one batch: what runs at each site inside ``mixing``.

Every sequence b, or every token b of a sequence, has K choices index[b, k] among the named adapters (−1: none), with
weights w, and

    y_b = x_b + Σ_k w[b, k] · (A_{index[b, k]}(x_b) − x_b)        (one choice without weights: y_b = A_{index[b]}(x_b))

The adapters of one site that agree in (adapter_dim, activation, eps, depth, x_free, layer_norm, dropout, whether they
are parallel) form a group: their parameters are stacked, their scales too, and one ``ak.adapter(..., index=, gate=)``
call runs them all for one choice and adds it to the sum. For the other groups of the site, a sequence of this group has
index −1. Where a choice is several adapters one after the other, it is computed first, and added then. Several choices
all read x, which is kept then whatever ``x_free`` says. The stack is built in every forward, so that gradients reach
the adapters' own parameters; it costs a copy of the parameters of the mixed adapters, compared with an activation of
B·L rows. During ``generate`` it is built once. The index of a group is computed once for all sites that have the same
group. Of stacks of adapters (stack.py), the first of each run so, then the second, and so on.

Gated prompts (prompt.py) add one result of attention for each choice, with the gate w[b, k] · g of its adapter; those
of one length, and of as many gates, form a group. Where tokens choose, every query asks every prompt of the group, with
gates of its own.

Every named adapter gets a gradient, of zeros if no sequence has chosen it: on a GPU the host would have to wait to find
out which were chosen, and results must not depend on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkern.model.adapter import Adapter, Beside, plain
from adapterkern.model.config import PROMPT, AdapterConfig, prefix_length
from adapterkern.model.prompt import Ask, Gated
from adapterkern.ops import graphs
from adapterkern.ops.checks import check_index_dtype, check_index_values
from adapterkern.ops.index import vouch
from adapterkern.ops.operator import adapter
from adapterkern.ops.reference import Weights


class _Group(NamedTuple):
    """Adapters of one shape at one site."""

    adapters: list[Any]  # one per name: an nn.Sequential of `depth` adapters, or a Prompt
    places: tuple[int, ...]  # of each value of ``index``, its adapter among them; −1 is none


class _Stack(NamedTuple):
    """The parameters of a group, (n, ...) each, at one of the ``depth`` places."""

    weights: Weights
    scale: Tensor | float  # (n,), or what all have


class Mixture:
    """Which of the named adapters each sequence of a batch, or each token, runs.

    Args:
        adapters: name → layer number → adapters in sequence; ``index`` is a position in this order of names.
        configs: their configurations, in the same order.
        index: int64 or int32, (B,), (B, K), or of each token (B, L, K); −1 is none.
        weight: floating point, same shape as ``index``; None is weight 1 for every choice.
        argument: what the user gave, for messages.
        stacks: what each number in ``index`` stands for, adapters that run one after the other; by default each is one
            of ``adapters``.

    Raises:
        TypeError, ValueError: ``index`` or ``weight`` has a wrong type, dtype or shape, or a number is out of range.
    """

    def __init__(
        self,
        adapters: Mapping[str, nn.ModuleDict],
        configs: Mapping[str, AdapterConfig],
        index: Tensor,
        weight: Tensor | None = None,
        argument: str = "index",
        stacks: Sequence[tuple[str, ...]] | None = None,
    ) -> None:
        check_mixable(configs)
        stacks = [(name,) for name in adapters] if stacks is None else stacks
        numbers = {name: number for number, name in enumerate(adapters)}
        # Of the first of each stack, then of the second, and so on: which adapter it is, −1 above the stack's end
        self._stages = [
            tuple(numbers[stack[stage]] if stage < len(stack) else -1 for stack in stacks)
            for stage in range(max([0, *map(len, stacks)]))
        ]
        self._argument, self._count = argument, len(stacks)
        self._adapters, self._configs = list(adapters.values()), list(configs.values())
        self._with_dropout = [number for number, c in enumerate(self._configs) if c.dropout]
        self._sites: dict[tuple[Any, ...], list[_Group]] = {}  # by layer, place and skip, and what drops
        self._generating = False
        self._stacks: dict[int, list[_Stack]] = {}  # by the group's id; only while generating
        self._choose(index, weight)

    def _choose(self, index: Tensor, weight: Tensor | None) -> None:
        _check(self._count, index, weight)
        self._index = _by_choice(index.long())
        self._weight = None if weight is None else _by_choice(weight)
        self._choices: dict[tuple[object, ...], Tensor] = {}

    @property
    def is_per_token(self) -> bool:
        """Whether each token has choices of its own."""
        return self._index.dim() == 3

    def again(self, index: Tensor, weight: Tensor | None) -> "Mixture":
        """This mixture with other choices. Raises as the making of one."""
        other = self._with()
        other._choose(index, weight)
        return other

    def generating(self, batch: int | None) -> "Mixture":
        """This mixture for ``generate`` over ``batch`` prompts: beams use their prompt's index, and stacks are kept.

        Raises:
            ValueError: ``index`` is for another number of sequences, or for tokens.
        """
        if self.is_per_token:
            choices, *shape = self._index.shape
            raise ValueError(
                f"{self._argument}: expected shape (B,) or (B, K) in generate, whose new tokens have no entry, got "
                f"{(*shape, choices)}; a function is asked for each of them"
            )
        if batch is not None and batch != self._index.shape[1]:
            given = self._index.shape[1]
            raise ValueError(f"{self._argument}: expected one entry for each of {batch} prompts, got {given}")
        return self.kept()

    def kept(self) -> "Mixture":
        """This mixture for a ``generate``."""
        return self._with(_generating=True, _stacks={})

    def _with(self, **changes: Any) -> "Mixture":
        other = object.__new__(Mixture)
        other.__dict__ |= self.__dict__ | changes
        return other

    def prefix_length(self, num_layers: int) -> int:
        """Number of leading layers whose output none of the adapters changes."""
        return min(map(prefix_length, self._configs), default=num_layers)

    def cuts(self, layer: str, skip: int = 0) -> bool:
        """Whether an adapter of ``layer`` is at a position other than ``"layer"``, and is not skipped."""
        return bool(self._at(layer, "attention", skip)) or any(map(_is_beside, self._at(layer, "layer", skip)))

    def at(self, layer: str, place: str, skip: int = 0, x: Tensor | None = None) -> Callable[..., Any] | None:
        """The function of the residual stream (B, L, d) that runs at a site; None if no adapter is there.

        ``skip`` of each adapter's first sites have none. ``x`` is what adapters read that are parallel to a module. At
        the place ``"prompt"`` it gives the gated prompts, as a ``Prompt`` does.
        """
        groups = self._at(layer, place, skip)
        if not groups:
            return None
        return partial(self._prompts, groups) if place == PROMPT else partial(self._run, groups, x)

    def _at(self, *site: Any) -> list[_Group]:
        dropping = self._dropping(site[0])
        key = *site, dropping
        if key not in self._sites:
            self._sites[key] = self._groups(dropping, *site)
        return self._sites[key]

    def _dropping(self, layer: str) -> tuple[int, ...]:
        """The numbers of the adapters that drop in training: a frozen one does not, whatever the others do."""
        found: Any = ((n, self._adapters[n][layer]) for n in self._with_dropout if layer in self._adapters[n])
        return tuple(n for n, one in found if one[0].down.weight.requires_grad)

    def _groups(self, dropping: tuple[int, ...], layer: str, place: str, skip: int = 0) -> list[_Group]:
        groups: list[_Group] = []
        for stage in self._stages:
            members: dict[tuple[object, ...], list[int]] = {}
            for number in dict.fromkeys(n for n in stage if n >= 0):
                c = self._configs[number]
                if c.place == place and layer in self._adapters[number] and not c.skips(layer, skip):
                    of_bottlenecks = c.adapter_dim, c.activation, c.eps, c.depth, c.x_free, c.layer_norm, c.is_parallel
                    of_prompts = c.prompt_length, c.prompt_gate
                    dropout = c.dropout if number in dropping else 0.0
                    members.setdefault((*of_bottlenecks, dropout, *of_prompts), []).append(number)
            for ns in members.values():
                places = tuple(ns.index(n) if n in ns else -1 for n in stage)
                groups.append(_Group([self._adapters[n][layer] for n in ns], places))
        return groups

    def _choices_among(self, places: tuple[int, ...], times: int, device: torch.device) -> Tensor:
        """``index`` as ``places`` of a group, (K, B·times) or (K, B, L), on ``device``; computed once for all sites."""
        key = (places, times, device)
        if (made := self._choices.get(key)) is not None:
            return made
        if torch.compiler.is_compiling() or graphs.recording(device):  # tensors made there must not be kept
            return self._among(*key)
        with torch.inference_mode(False):  # a later call may train, and autograd cannot save inference tensors
            made = self._choices[key] = vouch(self._among(*key), max(places) + 1)
        return made

    def _among(self, places: tuple[int, ...], times: int, device: torch.device) -> Tensor:
        among = torch.tensor([*places, -1], device=self._index.device)[self._index]  # index -1 takes the last one
        among = among if times == 1 else among.repeat_interleave(times, 1)
        return among.to(device, non_blocking=True)

    def _run(self, groups: list[_Group], beside: Tensor | None, x: Tensor) -> Tensor:
        times = self._repeats(x.shape)
        stacks = [self._stack(group) for group in groups]
        indices = [self._choices_among(group.places, times, x.device) for group in groups]
        beside = None if beside is None else beside.to(x.dtype)
        several = len(self._index) > 1

        def choice(k: int, y: Tensor, gate: Tensor | None = None, summed: bool = False) -> Tensor:
            # Each choice is in at most one group of a stage; the other groups leave the sequence unchanged.
            for group, stack, index in zip(groups, stacks, indices, strict=True):
                # The other choices of a sum have changed y already
                given = beside if _is_beside(group) else x if summed and y is not x else None
                for members, one in zip(zip(*group.adapters, strict=True), stack, strict=True):
                    y = _run_stacked(members, one, y, index[k], given, gate, summed)
            return y

        weights = self._weights(times, x.device)
        if weights is None and not several:
            return choice(0, x)
        y = x
        for k in range(len(self._index)):
            gate = None if weights is None else weights[k]
            if len(self._stages) == 1 and all(len(stack) == 1 for stack in stacks):
                y = choice(k, y, gate, several)
            else:
                change = choice(k, x) - x
                if gate is not None:
                    change = gate.to(x.dtype).view(*gate.shape, *(1,) * (x.dim() - gate.dim())) * change
                y = y + change
        return y

    def _prompts(self, groups: list[_Group], ask: Ask, shape: torch.Size) -> list[Gated]:
        times = self._repeats(shape)
        found: list[Gated] = []
        for group in groups:
            keys, values = ask([prompt.embeddings for prompt in group.adapters])
            gates = torch.stack([prompt.gate for prompt in group.adapters])
            weights = self._weights(times, gates.device)
            index = self._choices_among(group.places, times, gates.device)
            share = (index >= 0).to(gates.dtype)  # 0 of the other groups' prompts
            share = share if weights is None else share * weights.to(gates.dtype)
            if self.is_per_token:
                for i, gate in enumerate(gates):
                    of_queries = (share * (index == i)).sum(0)[:, None]
                    found.append(Gated(keys[i : i + 1], values[i : i + 1], gate[:, None] * of_queries))
                continue
            for chosen, of_sequences in zip(index.clamp(min=0), share, strict=True):
                gate = (gates[chosen] * of_sequences[:, None])[..., None]
                found.append(Gated(keys[chosen], values[chosen], gate))
        return found

    def _weights(self, times: int, device: torch.device) -> Tensor | None:
        """The weights, (K, B·times) or (K, B, L), on ``device``."""
        if self._weight is None:
            return None
        weight = self._weight.to(device, non_blocking=True)
        return weight if times == 1 else weight.repeat_interleave(times, 1)

    def _repeats(self, shape: Sequence[int]) -> int:
        """Number of sequences in the batch (B, L, ...) per entry of ``index``: 1, or beams per prompt in generating."""
        batch, length, *_ = shape
        given, *tokens = self._index.shape[1:]
        if batch == given and tokens in ([], [length]):
            return 1
        if tokens:
            got = (given, *tokens)
            raise ValueError(
                f"{self._argument}: expected one entry for each token of the batch, {(batch, length)}, got {got}"
            )
        if self._generating and given and batch % given == 0:
            return batch // given
        raise ValueError(f"{self._argument}: expected one entry for each of the batch's {batch} sequences, got {given}")

    def _stack(self, group: _Group) -> list[_Stack]:
        """The group's parameters, one ``_Stack`` for each of the ``depth`` adapters."""
        if not self._generating:
            return _stacked(group.adapters)
        if id(group) not in self._stacks:  # `_sites` keeps the group alive
            self._stacks[id(group)] = _stacked(group.adapters)
        return self._stacks[id(group)]


def check_mixable(configs: Mapping[str, AdapterConfig]) -> None:
    """Raise ``ValueError`` if an adapter has modules of the backbone of its own, which all sequences share, as they do
    its linear layers with bias and scale, or leaves images out."""
    for name, config in configs.items():
        if config.bias_scale:
            raise ValueError(
                f"bias_scale: expected False of an adapter that is mixed with others in a batch, got True of {name!r}"
            )
        if config.text_only:
            raise ValueError(
                f"text_only: expected False of an adapter that is mixed with others in a batch, got True of {name!r}"
            )
        if config.modules_to_save:
            raise ValueError(
                f"modules_to_save: expected none of an adapter that is mixed with others in a batch, got "
                f"{', '.join(config.modules_to_save)} of {name!r} "
                "(in Python: AdapterConfig(modules_to_save=[]) trains none)"
            )


def check_routable(configs: Mapping[str, AdapterConfig]) -> None:
    """Raise ``ValueError`` if an adapter cannot run in a mixture that is decided on the stream below the first one.

    Prompts are inside attention, which has a normalized stream.
    """
    check_mixable(configs)
    if any(config.kind == PROMPT for config in configs.values()):
        raise ValueError(f"kind: expected 'bottleneck' for adapters that a router chooses among, got {PROMPT!r}")


def _stacked(adapters: list[Any]) -> list[_Stack]:
    return [
        _Stack(Weights(*map(_together, zip(*map(_weights, members), strict=True))), _scales(members))  # type: ignore[arg-type]
        for members in zip(*adapters, strict=True)
    ]


def _together(same: tuple[Tensor | None, ...]) -> Tensor | None:
    if same[0] is None:  # of LayerNorm, which all of the group have or none
        return None
    return torch.stack(same) if len(same) > 1 else same[0][None]  # type: ignore[arg-type]


def _weights(a: Adapter) -> Weights:
    a.check_modules()
    of_norm = (a.norm.weight, a.norm.bias) if a.layer_norm else (None, None)
    return Weights(*of_norm, *map(plain, (a.down.weight, a.down.bias, a.up.weight, a.up.bias)))


def _scales(members: tuple[Adapter, ...]) -> Tensor | float:
    scales = [a.scale for a in members]
    if not any(isinstance(s, Tensor) or s != scales[0] for s in scales):
        return scales[0]
    device = members[0].down.weight.device
    # Filled on the device: a copy from the host would not be in a CUDA graph.
    return torch.cat([s if isinstance(s, Tensor) else torch.full((1,), s, device=device) for s in scales])


def _is_beside(group: _Group) -> bool:
    return isinstance(group.adapters[0], Beside)


def _run_stacked(
    members: tuple[Adapter, ...],
    stack: _Stack,
    hidden: Tensor,
    index: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    summed: bool,
) -> Tensor:
    """The operator on a group's stacked parameters, with the settings that all of its members share."""
    member = members[0]
    return adapter(
        hidden if x is None else x,
        *stack.weights,
        eps=member.norm.eps if member.layer_norm else 0.0,
        activation=member.activation,
        fused=member.fused,
        x_free=member.x_free and not summed,
        index=index,
        residual=None if x is None else hidden,
        scale=stack.scale,
        dropout=max(one.active_dropout for one in members),
        gate=gate,
    )


def _by_choice(given: Tensor) -> Tensor:
    """(B,), (B, K) or (B, L, K) → (K, B) or (K, B, L): each choice is contiguous, as the kernels expect."""
    return given[None] if given.dim() == 1 else given.movedim(-1, 0).contiguous()


def _check(n: int, index: Tensor, weight: Tensor | None) -> None:
    check_index_dtype(index)
    if index.dim() not in (1, 2, 3) or (index.dim() > 1 and index.shape[-1] == 0):
        raise ValueError(f"index: expected shape (B,) or (B, K) with K >= 1, or (B, L, K), got {tuple(index.shape)}")
    check_index_values(index, n)
    if weight is None:
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected a torch.Tensor of a floating dtype, got {got}")
    if weight.shape != index.shape or weight.device != index.device:
        raise ValueError(
            f"weight: expected shape {tuple(index.shape)} on {index.device} like index, "
            f"got {tuple(weight.shape)} on {weight.device}"
        )
