"""``fuse_norm``: an adapter makes the output of the RMSNorm that reads its y next, see ``ops.adapter_and_norm``.

Which norm that is, sites.py reads from the layer's forward: after attention the one before the feed-forward network,
after a layer the next one's first, or the decoder's last. What it computes, it is asked. The adapter leaves the output
beside y; the norm, whose class becomes a subclass of its own, takes it if it is called with that very tensor, and
otherwise runs itself. So a wrong guess costs time and changes no result. A y that has been changed is noticed, except
in place by way of ``y.data``, which leaves no trace.

The norm runs itself, too, wherever an adapter does not leave the stream to it alone: in batches that mix adapters,
below others of a stack, beside a module, on the text alone of images and text; in compiled code; where it is trained,
sharded, made in inference mode, on another device or in another dtype; and in checkpointed layers, which must save the
same when they run again.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from adapterkern import checks
from adapterkern.model.config import PROMPT, AdapterConfig
from adapterkern.model.copies import Replaceable
from adapterkern.model.decoder import AdaptedLayer, change_class, check_forward, own_class, preceded, reduced
from adapterkern.model.sites import Halves, halves, reads_input, reads_output
from adapterkern.ops.choice import fused_enabled
from adapterkern.ops.normed import Made

_MISSES = 8  # calls in a row with something else than what an adapter left

logger = logging.getLogger(__name__)


class _Handed(NamedTuple):
    """What a norm is left: its output, the norm, and how its input was then."""

    made: Made
    norm: nn.Module
    state: tuple[Any, ...]


# By the norm's input, not on it: a user may copy or save that tensor.
_handed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _state(y: Tensor, norm: nn.Module) -> tuple[Any, ...]:
    """What must not have changed: the input's and the weight's values, and whether autograd records."""
    weight = norm._parameters["weight"]
    assert weight is not None
    values = y._version, y.data_ptr(), weight._version, weight.data_ptr()
    return *values, torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


def _is_checkpointed() -> bool:
    """Whether what autograd saves is to be made again, so that it must be the same then."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


class TakingNorm(nn.Module):
    """Precedes an RMSNorm's own class in the method resolution order."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, TakingNorm):  # somebody has kept the forward of before
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs or type(args[0]) is not Tensor:
            return super().forward(*args, **kwargs)
        handed: _Handed | None = _handed.pop(args[0], None)
        if handed is not None and handed.norm is self and handed.state == _state(args[0], self):
            self.__dict__.update(_left=False, _missed=0)
            return handed.made.of(args[0])
        if vars(self).get("_left"):
            self.__dict__.update(_left=False, _missed=vars(self).get("_missed", 0) + 1)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, protocol, _taking_class, own_class(self, TakingNorm))


@functools.cache
def _taking_class(cls: Any) -> Any:
    return preceded(cls, TakingNorm)


class Factor(NamedTuple):
    """What an RMSNorm multiplies by, and what it adds to the mean square."""

    weight: Tensor
    eps: float


class NextNorm:
    """The RMSNorm that reads what a site leaves; ``runner`` is the layer that runs it, None for the decoder's last."""

    def __init__(self, norm: Any, runner: nn.Module | None) -> None:
        self.norm, self._runner = norm, runner
        self._asked: dict[tuple[Any, ...], tuple[int, float] | None] = {}

    def factor(self, x: Tensor) -> Factor | None:
        """What the norm does to a tensor like x; None if nobody can make its output in its place now."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or type(x) is not Tensor:
            return None
        weight = self.norm._parameters.get("weight")
        if why := self._obstacle(x, weight):
            _say(why)
            return None
        kind = x.device.type
        numbers = tuple(value for value in vars(self.norm).values() if type(value) is float)
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        how = x.dtype, weight.dtype, autocast, numbers
        if how not in self._asked:
            self._asked[how] = ask(self.norm, x.dtype)
        if (asked := self._asked[how]) is None:
            _say(f"{type(self.norm).__name__} in {weight.dtype} is not an RMSNorm from {x.dtype} to {x.dtype}")
            return None
        plus, eps = asked
        # Made anew in each call: a weight that is changed by way of .data does not tell.
        return Factor(plus + weight.detach().float() if plus else weight.detach(), eps)

    def _obstacle(self, x: Tensor, weight: Any) -> str | None:
        if self._runner is not None and "_frozen_mlp" in vars(self._runner):  # which compiles its MLP
            return "the layer that runs it is compiled"
        if _is_checkpointed():
            return "activations are checkpointed"
        if type(weight) is not nn.Parameter or weight.shape != x.shape[-1:] or weight.device != x.device:
            return f"its weight is not whole on {x.device}"
        if weight.requires_grad:
            return "its weight is trained"
        if weight.is_inference():
            return "its weight, made in inference mode, does not tell whether it changes"
        if vars(self.norm).get("_missed", 0) >= _MISSES:
            return f"{type(self.norm).__name__} has not read what an adapter left it, {_MISSES} times"
        return None

    def hand(self, y: Tensor, made: Made) -> None:
        """Leave the norm its output on its input y."""
        _handed[y] = _Handed(made, self.norm, _state(y, self.norm))
        self.norm.__dict__["_left"] = True


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
    _fuse_norm = False  # of the class for models that were pickled before there was any
    _next_norms: Mapping[tuple[str, str], NextNorm] = MappingProxyType({})  # by layer and place

    if TYPE_CHECKING:  # LlamaAdapter's

        @property
        def fused(self) -> bool: ...

        @property
        def layers(self) -> nn.ModuleList: ...

        @property
        def decoder(self) -> Any: ...

        def check_attached(self) -> None: ...

    @property
    def fuse_norm(self) -> bool:
        """Whether an adapter and the backbone's RMSNorm that reads its output next run as one.

        Results differ from those without by rounding: n is rounded once. In training this keeps y where transformers'
        norm keeps a copy in fp32; so a hook that changes y in place after the norm has read it is an error in 16 bits,
        too. It is off by default, since no GPU has shown that it pays. Without ``fused`` it does nothing.

        Raises:
            ValueError: assigned True, and no norm of the backbone is an RMSNorm that reads what a site leaves.
        """
        return self._fuse_norm

    @fuse_norm.setter
    def fuse_norm(self, value: bool) -> None:
        if checks.flag("fuse_norm", value) == self._fuse_norm:
            return
        if value:
            self.check_attached()
            self._take_norms()
            if not self._next_norms:
                raise ValueError(
                    "fuse_norm: expected a backbone with an RMSNorm that reads what an adapter leaves, got "
                    f"{type(self.base).__name__}"
                )
            self._fuse_norm = True
            if not (self.fused and fused_enabled()):
                logger.warning("fuse_norm: has no effect while fused is False or ADAPTERKERN_FUSED=0")
            for name in self._configs:
                self._warn_of_unfused(name)
        else:
            self._fuse_norm = False
            self._leave_norms()

    def _take_norms(self) -> None:
        self._next_norms = self._find_norms()
        for one in self._next_norms.values():
            cls: Any = type(one.norm)
            if not issubclass(cls, TakingNorm):  # a norm may follow two sites
                change_class(one.norm, _taking_class(cls))

    def _leave_norms(self) -> None:
        for one in self._next_norms.values():
            norm = one.norm
            # Not if something has changed the class since, as a parametrization does: ours below it does no harm.
            if isinstance(norm, TakingNorm) and type(norm) is _taking_class(own_class(norm, TakingNorm)):
                change_class(norm, own_class(norm, TakingNorm))
                for name in ("_left", "_missed"):
                    norm.__dict__.pop(name, None)
        self._next_norms = {}

    def _find_norms(self) -> dict[tuple[str, str], NextNorm]:
        found: dict[tuple[str, str], NextNorm] = {}
        layers: list[Any] = list(self.layers)
        decoder: Any = type(self.decoder)
        for index, layer in enumerate(layers):
            cut = halves(own_class(layer, AdaptedLayer))
            if isinstance(cut, Halves) and (norm := _rms_norm(layer, cut.next)) is not None:
                found[str(index), "attention"] = NextNorm(norm, layer)
            last = index + 1 == len(layers)
            after = self.decoder if last else layers[index + 1]
            name = reads_output(decoder) if last else reads_input(own_class(after, AdaptedLayer))
            if (norm := _rms_norm(after, name)) is not None:
                found[str(index), "layer"] = NextNorm(norm, None if last else after)
        return found

    def _warn_of_unfused(self, name: str) -> None:
        """Say which sites of an adapter never run with a norm, and why."""
        config = self._configs[name]
        sites, why = list(config.layers or ()), ""
        if config.kind == PROMPT:
            why = "gated prompts leave no stream to a norm"
        elif config.x_free:
            why = "x_free: its adapters keep y themselves"
        elif config.is_parallel or config.text_only:
            why = f"{'text_only' if config.text_only else config.position}: it is not alone in what the norm reads"
        else:
            sites = [index for index in sites if (str(index), config.place) not in self._next_norms]
            why = "no RMSNorm of the backbone reads what it leaves there"
        if sites and self._fuse_norm:
            logger.warning("fuse_norm: the norm after adapter %r runs by itself at layers %s: %s", name, sites, why)

    @contextlib.contextmanager
    def _norms_of_their_own(self) -> Iterator[None]:
        """Inside the block the norms have their own classes, which others may change."""
        self._leave_norms()
        try:
            yield
        finally:
            if self._fuse_norm:
                self._take_norms()


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
