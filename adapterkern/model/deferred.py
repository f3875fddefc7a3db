"""A mixture (mixing.py) whose choices are computed from the residual stream, below the first of its adapters."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from adapterkern.model.config import AdapterConfig, prefix_length
from adapterkern.model.mixing import Mixture, check_routable

Decide = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class DeferredMixture:
    """A mixture whose choices are computed from the residual stream, at the first of the adapters.

    Those of sequences are computed once, and kept. Those of tokens are computed in every forward, for its own tokens.

    Args:
        adapters, configs, stacks: as for ``Mixture``.
        decide: the stream (B, L, d) below the first adapter → ``index`` and ``weight`` of a ``Mixture``.
    """

    def __init__(
        self,
        adapters: Mapping[str, nn.ModuleDict],
        configs: Mapping[str, AdapterConfig],
        decide: Decide,
        stacks: Sequence[tuple[str, ...]] | None = None,
    ) -> None:
        check_routable(configs)
        self._adapters, self._configs, self._decide, self._stacks = adapters, configs, decide, stacks
        self._generating = False
        self._mixture: Mixture | None = None
        self._first: tuple[str, str] | None = None  # the layer and place where it was decided

    def generating(self, batch: int | None) -> "DeferredMixture":
        """This mixture for ``generate``: decided on the prompts (with their beams), and kept for the new tokens."""
        other = DeferredMixture(self._adapters, self._configs, self._decide, self._stacks)
        other._generating = True
        return other

    @property
    def decided(self) -> "Mixture | DeferredMixture":
        """What runs in the forward that is under way, or was last; this one before the first decision."""
        return self if self._mixture is None else self._mixture

    def prefix_length(self, num_layers: int) -> int:
        """Number of leading layers whose output none of the adapters changes."""
        return min(map(prefix_length, self._configs.values()), default=num_layers)

    def cuts(self, layer: str, skip: int = 0) -> bool:
        """As ``Mixture.cuts``."""
        if self._mixture is not None:
            return self._mixture.cuts(layer, skip)
        return any(c.position != "layer" and layer in self._adapters[name] for name, c in self._configs.items())

    def at(self, layer: str, place: str, skip: int = 0, x: Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
        """As ``Mixture.at``. The choices are made at the first of the sites, skipped or not."""
        mixture = self._mixture
        if mixture is not None and not (mixture.is_per_token and (layer, place) == self._first):
            return mixture.at(layer, place, skip, x)
        is_site = any(c.place == place and layer in self._adapters[name] for name, c in self._configs.items())
        return partial(self._begin, layer, place, skip, x) if is_site else None

    def _begin(self, layer: str, place: str, skip: int, beside: Tensor | None, x: Tensor) -> Tensor:
        # Gradient checkpointing runs the layer twice and the decision once, so the decision must not be recomputed: the
        # hooks, inside those of the checkpoint, keep what it saves for the backward. Detached, since a saved output
        # would hold its own graph.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t):
            decided = self._decide(x)
        if not isinstance(decided, tuple) or len(decided) != 2:
            raise TypeError(f"decide: expected a function that returns (index, weight or None), got {decided!r:.80}")
        index, weight = decided
        if self._mixture is not None:
            self._mixture = self._mixture.again(index, weight)  # of other tokens
        else:
            mixture = Mixture(self._adapters, self._configs, index, weight, stacks=self._stacks)
            self._mixture = mixture.kept() if self._generating else mixture
        self._first = layer, place
        run = self._mixture.at(layer, place, skip, beside)
        return x if run is None else run(x)
