"""Bias and scale of linear layers: what LLaMA-Adapter V2 (Gao et al. 2023, arXiv:2304.15010) learns inside a layer.

Each linear layer inside a decoder layer gets

    y = s ⊙ (W·x + b)        b and s of its outputs; b starts at 0 and s at 1, so that the model starts unchanged

where W·x is whatever the frozen layer gives: with a bias of its own, of weights in 4 bits, or with another adapter's
part. So a linear layer is a module that says how many inputs and outputs it has (``in_features``, ``out_features``)
and, asked, maps the ones to the others. Its class changes, as a decoder layer's does: torch.compile sees that, and
would not see a hook that is added later. Where a gated prompt is, its keys and values are made by the same linear
layers, as in the paper.

The backward needs W·x in its own dtype, and nothing else of its size. The sum is in fp32, or in what is wider: a scale
near 1 would be 1 in bf16.
"""

import functools
import logging
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapterkern.model.asking import decoder_of, some_tokens
from adapterkern.model.config import BIAS_SCALE, AdapterConfig
from adapterkern.model.copies import Folder, Replaceable
from adapterkern.model.decoder import (
    change_class,
    check_forward,
    decoder_layers,
    eval_mode,
    layer_device,
    own_class,
    preceded,
    reduced,
)
from adapterkern.model.inside import Inside, query_heads

logger = logging.getLogger(__name__)


class BiasScale(nn.Module):
    """``y = scale · (out + bias)`` of a linear layer's result (..., m), in its dtype.

    Args:
        out_features: m.
        device, dtype: of the parameters; the default dtype is fp32 whatever the backbone's.

    ``bias`` (m,) starts at 0, ``scale`` (m,) at 1.
    """

    def __init__(
        self, out_features: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the linear layer compute what it does without."""
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.scale)

    def forward(self, out: Tensor) -> Tensor:
        return torch.addcmul(self.scale * self.bias, out, self.scale).to(out.dtype)

    def extra_repr(self) -> str:
        return f"out_features={len(self.bias)}"


class LinearSite(Protocol):
    """The biases and scales of one layer."""

    def linear(self, path: list[str]) -> list[nn.Module]:
        """Those of a linear layer that run at the moment, in their order."""


class ScaledLinear(nn.Module):
    """Precedes a linear layer's own class in the method resolution order; ``attach_linears`` combines the two."""

    _linear_site: LinearSite
    _linear_path: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.frozen_forward(*args, **kwargs)
        for one in self._linear_site.linear(self._linear_path):
            out = one(out)
        return out

    def frozen_forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the own class, which a training may replace."""
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, protocol, _scaled_class, linear_class(self))


@functools.cache
def _scaled_class(cls: Any) -> Any:
    return preceded(cls, ScaledLinear)


def linear_class(module: nn.Module) -> Any:
    """The class of a module without ``ScaledLinear``."""
    return own_class(module, ScaledLinear)


def find_linears(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a decoder layer, by their paths in it; of one inside another the outer one."""
    found: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        sized = isinstance(getattr(module, "out_features", None), int)
        if path and not inside and sized and _is_linear(layer, module):
            found[path] = module
    return found


def _is_linear(layer: nn.Module, module: Any) -> bool:
    """Whether a module maps inputs to outputs; asked once for each class.

    A router that returns its choices does not, nor does a product of groups of channels, and both may derive from
    ``nn.Linear``.
    """
    if (cls := linear_class(module)) not in _asked:
        dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)
        try:
            x = torch.zeros(1, module.in_features, dtype=dtype, device=layer_device(layer))
            with torch.no_grad(), eval_mode(module):
                out = module(x)
        except Exception:  # of any kind: it may not be made for what it is asked
            return False
        _asked[cls] = isinstance(out, Tensor) and out.shape == (1, module.out_features)
    return _asked[cls]


_asked: dict[type, bool] = {nn.Linear: True}


def inside_of(decoder: Any) -> Inside:
    """What the layers of a decoder have inside."""
    outputs = [sum(map(_outputs, find_linears(layer).values())) for layer in decoder.layers]
    return Inside(query_heads(decoder), tuple(outputs))


def _outputs(linear: Any) -> int:
    return int(linear.out_features)


def make_bias_scale(llama: Any, config: AdapterConfig) -> nn.Module:
    """The ``BiasScale`` of each linear layer in the layers of a resolved configuration, at ``{layer}.{path}``.

    A line in the log names what in these layers has matrices and gets neither bias nor scale, and the linear layers
    that a text of a few tokens does not run.

    Raises:
        ValueError: a layer has no linear layer, or one that another layer has too.
    """
    root, others = Folder(), dict[str, str]()
    chosen = [(index, decoder_layers(llama)[index]) for index in config.layers or ()]
    all_linears: dict[nn.Module, str] = {}
    for index, layer in chosen:
        linears = find_linears(layer)
        if not linears:
            raise ValueError(
                f"bias_scale: expected layers with linear layers, got a {type(layer).__name__} without; name those "
                "that have some by layers"
            )
        for path, linear in linears.items():
            if linear in all_linears:
                raise ValueError(f"bias_scale: expected linear layers of one layer each, got {path!r} in several")
            root.put(f"{index}.{path}", BiasScale(_outputs(linear), device=layer_device(layer)))
            all_linears[linear] = f"{path} ({type(linear).__name__})"
        others |= _other_matrices(layer, linears)
    if others:
        named = ", ".join(f"{path} ({kind})" for path, kind in others.items())
        logger.warning("bias_scale: %s: no linear layer, and gets neither bias nor scale", named)
    if idle := _idle(llama, all_linears):
        logger.warning("bias_scale: %s: not run for a few tokens, so that bias and scale do nothing there", idle)
    return root


def _other_matrices(layer: nn.Module, linears: Iterable[str]) -> dict[str, str]:
    """The modules that hold matrices and are no linear layers: fused experts, convolutions. Path → class."""
    return {
        path: type(module).__name__
        for path, module in layer.named_modules()
        if any(p.dim() > 1 for p in module._parameters.values() if p is not None)
        and not any(f"{path}.".startswith(f"{linear}.") for linear in linears)
    }


def _idle(llama: Any, linears: dict[nn.Module, str]) -> str:
    """The names of those that do not run: another module may read their weights. "" if they cannot be asked."""
    waiting = dict(linears)
    handles = [one.register_forward_hook(lambda module, *_: waiting.pop(module, None) and None) for one in linears]
    try:
        with torch.no_grad(), eval_mode(llama):
            decoder_of(llama)(input_ids=some_tokens(llama, 4), use_cache=False)
    except Exception:  # of any kind: it may need more than token ids
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return ", ".join(dict.fromkeys(waiting.values()))


def bias_scale_shapes(layers: nn.ModuleList, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The names of these tensors in an adapter's file, and their shapes. ``config`` is resolved."""
    return {
        f"{BIAS_SCALE}.{index}.{path}.{name}": (_outputs(linear),)
        for index in (config.layers or () if config.bias_scale else ())
        for path, linear in find_linears(layers[index]).items()
        for name in ("bias", "scale")
    }


def attach_linears(layer: nn.Module, site: LinearSite) -> None:
    """Make the linear layers of ``layer`` run the biases and scales of ``site``; ``detach_linears`` undoes it.

    Raises:
        ValueError: an adapter has a copy of one of them.
    """
    linears = find_linears(layer)
    for path, module in layer.named_modules():
        held = path in linears or any(linear.startswith(f"{path}.") for linear in linears)
        if held and isinstance(module, Replaceable):
            raise ValueError(
                f"modules_to_save: expected no linear layer that is to learn bias and scale, got {path!r} of a layer "
                "among those that an adapter trains"
            )
    for path, linear in linears.items():
        if not isinstance(linear, ScaledLinear):
            check_forward(linear)
            linear.__dict__["_linear_site"] = site  # not by setattr, which would register the model
            linear.__dict__["_linear_path"] = path.split(".")
            cls: Any = type(linear)
            change_class(linear, _scaled_class(cls))


def detach_linears(layer: nn.Module) -> None:
    """Give the linear layers of ``layer`` their own classes back."""
    for module in list(layer.modules()):
        if isinstance(module, ScaledLinear):
            del module.__dict__["_linear_site"], module.__dict__["_linear_path"]
            change_class(module, linear_class(module))
