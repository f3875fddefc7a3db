"""``fuse_norm``: an adapter makes the output of the RMSNorm that reads its y next, see ``ops.adapter_and_norm``.

Which norm that is, sites.py reads from the layer's forward: after attention the one before the feed-forward network,
after a layer the next one's first, or the decoder's last. What it computes, it is asked. The adapter hangs the output
on y; the norm, whose class becomes a subclass of its own, takes it if it is called with that very tensor, unchanged,
and otherwise runs itself. So a wrong guess costs time and changes no result.

The norm runs itself, too, wherever an adapter does not leave the stream to it alone: in batches that mix adapters,
below others of a stack, beside a module, on the text alone of images and text; in compiled code; where it is trained,
sharded, on another device or in another dtype; and after a layer whose activations are checkpointed, in whose block it
is not.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkern import checks
from adapterkern.model.config import PROMPT, AdapterConfig
from adapterkern.model.copies import Replaceable
from adapterkern.model.decoder import AdaptedLayer, change_class, check_forward, own_class, reduced
from adapterkern.model.sites import Halves, halves, reads_input, reads_output

_HANDED = "_adapterkern_norm"  # the attribute of y
_MISSES = 8  # outputs in a row that no norm has taken

logger = logging.getLogger(__name__)


class _Handed(NamedTuple):
    """A norm's output, on the tensor that the norm is to be called with."""

    norm: nn.Module
    n: Tensor
    version: int  # of y
    mode: tuple[Any, ...]


class TakingNorm(nn.Module):
    """Precedes an RMSNorm's own class in the method resolution order."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            handed: _Handed | None = args[0].__dict__.pop(_HANDED, None)
            if handed is not None and handed.norm is self and handed[2:] == (args[0]._version, _mode()):
                self.__dict__["_missed"] = 0
                return handed.n
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, protocol, _taking_class, own_class(self, TakingNorm))


@functools.cache
def _taking_class(cls: Any) -> Any:
    return type(cls.__name__, (TakingNorm, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _mode() -> tuple[Any, ...]:
    """Whether autograd records, and for whom: the blocks of gradient checkpointing have hooks of their own."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


class Factor(NamedTuple):
    """What an RMSNorm multiplies by, and what it adds to the mean square."""

    weight: Tensor
    eps: float


class NextNorm:
    """The RMSNorm that reads what a site leaves.

    Args:
        norm: it.
        runner: the layer that runs it; None for the decoder's last.
        made_in: the layer of a site after it, whose checkpointed block ends before the norm; None after attention.
    """

    def __init__(self, norm: Any, runner: nn.Module | None, made_in: nn.Module | None) -> None:
        self.norm, self._runner, self._made_in = norm, runner, made_in
        self._asked: dict[tuple[Any, ...], tuple[int, float] | None] = {}

    def factor(self, x: Tensor) -> Factor | None:
        """What the norm does to a tensor like x; None if nobody can make its output in its place now."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or type(x) is not Tensor:
            return None
        kind = x.device.type
        how = x.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if why := self._obstacle(x):
            _say(why)
            return None
        if how not in self._asked:
            self._asked[how] = ask(self.norm, x.dtype)
        if (asked := self._asked[how]) is None:
            _say(f"{type(self.norm).__name__} is not an RMSNorm from {x.dtype} to {x.dtype}")
            return None
        plus, eps = asked
        weight = self.norm._parameters["weight"].detach()
        return Factor(plus + weight.float() if plus else weight, eps)

    def _obstacle(self, x: Tensor) -> str | None:
        weight, made_in = self.norm._parameters["weight"], self._made_in
        if self._runner is not None and "_frozen_mlp" in vars(self._runner):  # training/compiled.py
            return "the layer that runs it is compiled"
        if made_in is not None and getattr(made_in, "gradient_checkpointing", False) and made_in.training:
            return "the adapter is after a layer whose activations are checkpointed"
        if type(weight) is not nn.Parameter or weight.shape != x.shape[-1:] or weight.device != x.device:
            return f"its weight is not whole on {x.device}"
        if weight.requires_grad:
            return "its weight is trained"
        if vars(self.norm).get("_missed", 0) > _MISSES:
            return f"{type(self.norm).__name__} has not read what an adapter left it, {_MISSES} times"
        return None

    def hand(self, y: Tensor, n: Tensor) -> None:
        """Leave the norm its output n on its input y."""
        y.__dict__[_HANDED] = _Handed(self.norm, n, y._version, _mode())
        self.norm.__dict__["_missed"] = vars(self.norm).get("_missed", 0) + 1


@functools.cache
def _say(why: str) -> None:
    """Cached, so that it is said once."""
    logger.warning("fuse_norm: a norm runs by itself: %s", why)


@torch.no_grad()
def ask(norm: Any, dtype: torch.dtype) -> tuple[int, float] | None:
    """What an RMSNorm adds to its weight, 0 or 1, and to the mean square; None if it is not one, or not to ``dtype``.

    It is run on two rows, of which in the second what it adds to the mean square shows.
    """
    weight = norm._parameters.get("weight")
    if weight is None or weight.dim() != 1 or sum(1 for _ in norm.parameters()) != 1 or weight.is_meta:
        return None
    rows = torch.cos(torch.arange(1, 2 * len(weight) + 1, dtype=torch.float32)).view(2, -1)
    rows = (rows * torch.tensor([[1.0], [1e-3]])).to(weight.device, dtype)
    own: Any = own_class(norm, TakingNorm) if isinstance(norm, TakingNorm) else type(norm)
    try:
        got = own.forward(norm, rows)
    except Exception:  # of any kind: it takes more than the stream
        return None
    if not isinstance(got, Tensor) or got.dtype != dtype or got.shape != rows.shape:
        return None
    wide = rows.double()
    for eps in [value for value in vars(norm).values() if type(value) is float and value >= 0]:
        for plus in (0, 1):
            expected = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * (plus + weight.double())
            if torch.allclose(got.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6):
                return plus, eps
    return None


class FusesNorms:
    """A wrapped decoder whose adapters may make the output of the norm that follows."""

    base: Any
    adapters: nn.ModuleDict
    _configs: dict[str, AdapterConfig]
    _next_norms: dict[tuple[str, str], NextNorm]  # by layer and place; empty: off

    if TYPE_CHECKING:  # LlamaAdapter's

        @property
        def layers(self) -> nn.ModuleList: ...

        @property
        def decoder(self) -> Any: ...

        def check_attached(self) -> None: ...

    @property
    def fuse_norm(self) -> bool:
        """Whether an adapter and the backbone's RMSNorm that reads its output next run as one.

        Results differ from those without by rounding: n is rounded once. In training this keeps y where transformers'
        norm keeps a copy in fp32. It is off by default, since no GPU has shown that it pays.

        Raises:
            ValueError: assigned True, and no norm of the backbone is an RMSNorm that reads what a site leaves.
        """
        return bool(self._next_norms)

    @fuse_norm.setter
    def fuse_norm(self, value: bool) -> None:
        if checks.flag("fuse_norm", value) == self.fuse_norm:
            return
        if value:
            self.check_attached()
            found = self._find_norms()
            if not found:
                raise ValueError(
                    "fuse_norm: expected a backbone with an RMSNorm that reads what an adapter leaves, got "
                    f"{type(self.base).__name__}"
                )
            for one in found.values():
                cls: Any = type(one.norm)
                if not issubclass(cls, TakingNorm):  # a norm may follow two sites
                    change_class(one.norm, _taking_class(cls))
            self._next_norms = found
            for name in self._configs:
                self._warn_of_unfused(name)
            return
        for one in self._next_norms.values():
            if isinstance(one.norm, TakingNorm):
                change_class(one.norm, own_class(one.norm, TakingNorm))
                one.norm.__dict__.pop("_missed", None)
        self._next_norms = {}

    def _find_norms(self) -> dict[tuple[str, str], NextNorm]:
        found: dict[tuple[str, str], NextNorm] = {}
        layers: list[Any] = list(self.layers)
        decoder: Any = type(self.decoder)
        for index, layer in enumerate(layers):
            cut = halves(_own(layer))
            if isinstance(cut, Halves) and (norm := _rms_norm(layer, cut.next)) is not None:
                found[str(index), "attention"] = NextNorm(norm, layer, None)
            last = index + 1 == len(layers)
            after = self.decoder if last else layers[index + 1]
            name = reads_output(decoder) if last else reads_input(_own(after))
            if (norm := _rms_norm(after, name)) is not None:
                found[str(index), "layer"] = NextNorm(norm, None if last else after, layer)
        return found

    def _warn_of_unfused(self, name: str) -> None:
        """Say which sites of an adapter never run with a norm, and why."""
        config = self._configs[name]
        sites, why = list(config.layers or ()), ""
        if config.kind == PROMPT:
            why = "gated prompts leave no stream to a norm"
        elif config.is_parallel or config.text_only:
            why = f"{'text_only' if config.text_only else config.position}: it is not alone in what the norm reads"
        else:
            sites = [index for index in sites if (str(index), config.place) not in self._next_norms]
            why = "no RMSNorm of the backbone reads what it leaves there"
        if sites and self.fuse_norm:
            logger.warning("fuse_norm: adapter %r runs without a norm at layers %s: %s", name, sites, why)

    @contextlib.contextmanager
    def _norms_of_their_own(self) -> Iterator[None]:
        """Inside the block the norms have their own classes, which others may change."""
        before, self.fuse_norm = self.fuse_norm, False
        try:
            yield
        finally:
            self.fuse_norm = before


def _own(layer: Any) -> Any:
    return own_class(layer, AdaptedLayer) if isinstance(layer, AdaptedLayer) else type(layer)


def _rms_norm(module: Any, name: str | None) -> Any:
    """The module of this name in ``module``, if it is an RMSNorm, in its weight's dtype, whose class can be changed."""
    norm = None if name is None else getattr(module, name, None)
    if not isinstance(norm, nn.Module) or isinstance(norm, Replaceable) or "weight" not in norm._parameters:
        return None
    try:
        check_forward(norm)
    except ValueError:
        return None
    return norm if ask(norm, norm._parameters["weight"].dtype) is not None else None  # type: ignore[union-attr]
