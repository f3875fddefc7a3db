"""Frozen decoder layers, compiled for a training: torch.compile fuses what stands between their matrix products.

What is compiled is a layer's own forward, without the adapter after it, and as a function of the layer: one graph then
serves all layers of one kind. A compiled adapted layer would be a graph of its own, 40 to 80 s each. At
``position="attention"`` an adapter runs amid the layer, and the two halves are compiled.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapterkern.model.decoder import AdaptedLayer
from adapterkern.model.linears import ScaledLinear
from adapterkern.model.llama import LlamaAdapter
from adapterkern.model.prompt import PromptedAttention
from adapterkern.training.parallel.frozen import cast_now
from adapterkern.training.run.interrupt import is_stopping

logger = logging.getLogger(__name__)

_PARTS = ("_frozen_layer", "_frozen_attention", "_frozen_mlp")
_VARIANTS = 64  # of different layers and batches, over all models of a process; afterwards layers run uncompiled
# The same random numbers (dropout) as uncompiled
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}


def check_compile(model: LlamaAdapter) -> None:
    """Raise ``ValueError`` if the layers of ``model`` cannot be compiled, or nothing can be on this machine."""
    for number, layer in enumerate(model.layers):
        for child in layer.modules():
            if "_hf_hook" in vars(child):
                raise ValueError(
                    f"compile: expected layers on one device, got layer {number} with accelerate's hooks (offloading, "
                    "device_map); leave compile out"
                )
            if isinstance(child, PromptedAttention):
                raise ValueError(
                    f"compile: expected frozen layers, got layer {number} with gated prompts (kind='prompt') of an "
                    "adapter; leave compile out"
                )
            if isinstance(child, ScaledLinear):
                raise ValueError(
                    f"compile: expected frozen layers, got layer {number} with bias and scale (bias_scale) of an "
                    "adapter; leave compile out"
                )
            if "_place" in vars(child):
                raise ValueError(
                    f"compile: expected frozen layers, got layer {number} with a {type(child).__name__} among the "
                    "modules_to_save of an adapter; leave compile out"
                )
    _check_compiler(model.device.type)


@functools.cache
def _check_compiler(device_type: str) -> None:
    """Raise ``ValueError`` unless torch.compile works here: it needs a C++ compiler for a CPU, Triton for a GPU."""
    try:
        torch.compile(_probe, dynamic=True)(torch.ones(2, device=device_type))
    except Exception as error:  # each backend has its own
        raise ValueError(f"compile: expected a machine on which torch.compile works, got {_line(error)}") from error


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1


def _line(error: Exception) -> str:
    """The first line of an error of torch.compile that says something: not the one that names the backend alone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith("raised:"):
        return lines[1]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def compiled_layers(model: LlamaAdapter, rows_vary: bool = False) -> Iterator[None]:
    """Inside the block, forwards with gradients run the frozen parts of each layer compiled.

    Args:
        rows_vary: batches of one row are as usual as others, and get graphs of their own.

    Without gradients (an evaluation, the frozen prefix) layers run as they are: they would take graphs of their own.
    The results are the same but for rounding.
    """
    from torch._dynamo import config  # takes seconds to import

    run = _Run(rows_vary)
    for layer in model.layers:
        for name in _PARTS:
            part = functools.partial(run, getattr(AdaptedLayer, name), layer)
            layer.__dict__[name] = part  # not by setattr, which nn.Module and its wrappers replace
    try:
        with config.patch(recompile_limit=_VARIANTS):
            yield
    finally:
        for layer in model.layers:
            for name in _PARTS:
                layer.__dict__.pop(name, None)


class _Run:
    """Runs a part of a layer, compiled or not, for one training."""

    def __init__(self, rows_vary: bool = False) -> None:
        self.rows_vary = rows_vary
        self.single: tuple[bool, ...] | None = None
        self.cast: set[tuple[int, torch.dtype]] = set()
        self.warned = False
        self.cut_short: set[tuple[Callable[..., Any], int]] = set()

    def __call__(self, part: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        this = part, id(layer)
        if not torch.is_grad_enabled() or not self._is_usual(*args, **kwargs) or this in self.cut_short:
            return part(layer, *args, **kwargs)
        self._cast_before(layer)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return _compiled()(part, _written_out(), layer, *args, **kwargs)
        except FailOnRecompileLimitHit:
            if not self.warned:
                logger.warning("compile: more than %d variants of layers and batches; more run uncompiled", _VARIANTS)
                self.warned = True
            return part(layer, *args, **kwargs)
        except TorchDynamoException as error:
            if is_stopping():  # a terminal's Ctrl-C ends the C++ compiler, too: the step is finished without it
                self.cut_short.add(this)  # what gradient checkpointing recomputes must run as it ran
                return part(layer, *args, **kwargs)
            raise ValueError(
                f"compile: expected layers that torch.compile takes, got {type(layer).__name__}: {_line(error)}; "
                "leave compile out"
            ) from error

    def _is_usual(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the batch is worth a graph: one with a size of 1 has its own, and may be an epoch's odd last."""
        if kwargs.get("past_key_values") is not None:  # which grows with each call
            return False
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        single = tuple(size == 1 for size in hidden.shape[self.rows_vary :])
        self.single = self.single or single
        return self.single == single

    def _cast_before(self, layer: nn.Module) -> None:
        """Let no graph make the copies of ``cast_once``: it would be one that runs once."""
        device_type = next(layer.parameters()).device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            if (id(layer), dtype) not in self.cast:
                cast_now(layer, dtype)
                self.cast.add((id(layer), dtype))


@functools.cache
def _compiled() -> Any:
    """``_part`` compiled, kept for the next training: that of a second adapter compiles nothing."""
    return torch.compile(_part, dynamic=True, fullgraph=True, options=_OPTIONS)


def _part(part: Callable[..., Any], written_out: bool, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not written_out:
        return part(layer, *args, **kwargs)
    with sdpa_kernel(SDPBackend.MATH):  # within the graph: no guard and no key of torch's caches has what is outside
        return part(layer, *args, **kwargs)


def _written_out() -> bool:
    """Whether ``fast_attention`` has left attention no other kernel."""
    on = torch.backends.cuda
    return not (on.flash_sdp_enabled() or on.mem_efficient_sdp_enabled() or on.cudnn_sdp_enabled())
