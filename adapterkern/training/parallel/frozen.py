"""Frozen weights under autocast, cast once: autocast keeps copies of trained weights alone."""

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkern.model.linears import ScaledLinear, linear_class

_COPIES = "_cast_copies"  # the attribute of a layer that has them, by dtype


def _forward(linear: nn.Linear, input: Tensor) -> Tensor:
    """The forward of a frozen ``nn.Linear`` that keeps a copy of its parameters in autocast's dtype.

    The copy is made by the first call that needs it, so a layer that never runs has none. A function and no object, by
    whose identity torch.compile would tell the layers apart.
    """
    device_type = linear.weight.device.type
    if not torch.is_autocast_enabled(device_type):
        return F.linear(input, linear.weight, linear.bias)
    return F.linear(input, *_copies(linear, torch.get_autocast_dtype(device_type)))


def _copies(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    copies: dict[torch.dtype, tuple[Tensor, Tensor | None]] = linear.__dict__[_COPIES]
    if dtype not in copies:
        with torch.inference_mode(False), torch.no_grad():  # a backward may need what an evaluation made
            bias = None if linear.bias is None else linear.bias.to(dtype)
            copies[dtype] = linear.weight.to(dtype), bias
    return copies[dtype]


def cast_now(module: nn.Module, dtype: torch.dtype) -> None:
    """Make the copies that ``cast_once`` would make in ``module`` later."""
    for child in module.modules():
        if _COPIES in vars(child):
            _copies(cast("nn.Linear", child), dtype)


@contextlib.contextmanager
def cast_once(module: nn.Module) -> Iterator[None]:
    """Inside the block, each frozen ``nn.Linear`` of ``module`` is cast once for autocast.

    The results keep their bits. The copies take as much memory as those that a backward keeps of autocast's. The frozen
    parameters must not change inside the block. Modules with a forward of their own, such as those that accelerate
    offloads, are left alone.
    """
    found = [m for m in module.modules() if linear_class(m) is nn.Linear and "forward" not in vars(m)]
    linears = [cast("nn.Linear", m) for m in found if _is_frozen(m)]
    for linear in linears:
        vars(linear)[_COPIES] = {}
        vars(linear)[_name(linear)] = MethodType(_forward, linear)
    try:
        yield
    finally:
        for linear in linears:
            vars(linear).pop(_name(linear), None)
            vars(linear).pop(_COPIES, None)


def _name(linear: nn.Module) -> str:
    """Of the method that is the frozen layer's, which another one may go on from."""
    return "frozen_forward" if isinstance(linear, ScaledLinear) else "forward"


def _is_frozen(linear: nn.Module) -> bool:
    parameters = list(linear.parameters(recurse=False))
    return not any(p.requires_grad or p.is_inference() or not p.is_floating_point() for p in parameters)
