"""What runs at the sites of one layer at the moment: the active adapter, a stack of them, a mixture, or nothing."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adapterkern.model.adapter import InTurn
from adapterkern.model.config import BIAS_SCALE, PROMPT
from adapterkern.model.copies import at_path
from adapterkern.model.images import on_text
from adapterkern.model.prompt import Prompts
from adapterkern.model.stack import in_order

if TYPE_CHECKING:
    from adapterkern.model.running import Running


class RunningSite:
    """The adapters of one layer: those that the model runs there at the moment."""

    def __init__(self, model: "Running", index: int) -> None:
        self.model, self.index = model, str(index)
        self.width = model.decoder.config.hidden_size

    def cuts(self) -> bool:
        active, enabled, mixture, skip, *_, below = self.model._state
        if not enabled:
            return False
        if mixture is not None:
            return mixture.cuts(self.index, skip or 0)
        return self._cuts(active, skip or 0) or (bool(below) and any(self._cuts(name, skip or 0) for name in below))

    def _cuts(self, name: str | None, skip: int) -> bool:
        if name is None or (config := self.model._configs[name]).position == "layer":
            return False
        return int(self.index) in (config.layers or ())[skip:]

    def prompt(self) -> Prompts | None:
        return self._at(PROMPT, None)

    def linear(self, path: list[str]) -> list[nn.Module]:
        """The biases and scales that run after a linear layer of this one; of the layer, with an empty path, a tree."""
        active, enabled, mixture, skip, *_, below = self.model._state
        if not enabled or mixture is not None:  # whose adapters have none
            return []
        found = [self._of_linear(name, path, skip or 0) for name in (*below, active) if name is not None]
        return [module for module in found if module is not None]

    def _of_linear(self, name: str, path: list[str], skip: int) -> nn.Module | None:
        config = self.model._configs[name]
        if not config.bias_scale or (skip and config.skips(self.index, skip)):
            return None
        return at_path(self.model.adapters[name], (BIAS_SCALE, self.index, *path))

    def run(self, place: str, hidden: Tensor, x: Tensor | None = None) -> Tensor:
        adapters = self._at(place, x)
        if adapters is None:
            return hidden
        name = type(self.model.base).__name__
        if hidden.shape[-1] != self.width:
            raise ValueError(
                f"llama: expected layers that pass on {self.width} channels, which is config.hidden_size, got {name}, "
                f"whose pass on {hidden.shape[-1]}: no adapter can run on this backbone"
            )
        if hidden.dim() != 3 and self.model._mixture is not None:
            raise ValueError(
                f"adapter_names: expected None for {name}, whose layers pass on several streams per token (their "
                f"output has shape {tuple(hidden.shape)}): all rows of a batch run one adapter"
            )
        if isinstance(adapters, InTurn) and (following := self.model._next_norms.get((self.index, place))) is not None:
            return adapters(hidden, following)
        return adapters(hidden)

    def _at(self, place: str, x: Tensor | None) -> Callable[..., Any] | None:
        active, enabled, mixture, skip, images, _, below = self.model._state
        if not enabled:
            return None
        if mixture is not None:
            return mixture.at(self.index, place, skip or 0, x)
        if below:
            return in_order([self._of(name, place, skip, images, x) for name in (*below, active)])
        return self._of(active, place, skip, images, x)

    def _of(
        self, name: str | None, place: str, skip: int | None, images: Tensor | None, x: Tensor | None
    ) -> Callable[..., Any] | None:
        """What an adapter does at a site."""
        if name is None or (config := self.model._configs[name]).place != place:
            return None
        if skip and config.skips(self.index, skip):
            return None
        sites: Any = self.model.adapters[name]
        if self.index not in sites:
            return None
        run = partial(sites[self.index], x=x) if config.is_parallel else sites[self.index]
        return partial(on_text, run, images) if images is not None and config.text_only else run
