"""Where a step of ClippedAdamW runs: the extension's kernels, or torch's fused AdamW where there are none.

A step works on parts: the parameters that share a device and, for DTensors, the process groups that their squared norm
is summed over. A part knows three things, and none of them waits for the device:

    sum_squares   Σ g² of its gradients, unscaled          reads each gradient once
    finish        norm, multiplier and skip flag           only again when several parts make up the norm
    update        AdamW with these                         28 bytes a parameter, the gradient partly from cache

torch's fused AdamW divides gradients by a device tensor, `grad_scale`, and skips where another, `found_inf`, says so:
that is enough to clip without a pass that writes gradients (36 bytes a parameter; plain clipping takes 40).
"""

import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

try:
    _C: Any = importlib.import_module("adapterkern._C")
except ImportError as error:  # used only when a step asks for it: `import adapterkern` never needs a compiler
    _C = None
    _MISSING = f"the extension adapterkern._C cannot be imported ({error})"
else:
    _MISSING = ""

log = logging.getLogger(__name__)
_announced: set[tuple[str, str]] = set()


def backend(device: torch.device | str | int) -> tuple[str, str]:
    """What a step on `device` runs, and why: ("cpu twin" | "cuda kernels" | "torch fused AdamW", reason)."""
    device = torch.device(device)
    fallback = "torch fused AdamW"
    if os.environ.get("ADAPTERKERN_FUSED") == "0":
        return fallback, "ADAPTERKERN_FUSED=0 is set"
    if _C is None:
        return fallback, _MISSING
    if device.type == "cpu":
        return "cpu twin", "the extension is built"
    if device.type != "cuda":
        return fallback, f"the extension has no kernels for {device.type} devices"
    index = device.index if device.index is not None else torch.cuda.current_device()
    reason = _C.cuda_unavailable(index)
    return (fallback, reason) if reason else ("cuda kernels", "the extension is built, and its kernels load here")


@dataclass
class Entry:
    """One parameter with what a step reads and writes; every tensor local (no DTensor) and laid out like `param`."""

    param: Tensor
    main: Tensor  # what AdamW updates: the parameter, or its fp32 master
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    stochastic: bool
    group: int


@dataclass
class Request:
    """What one step asks for, beside the gradients. A part's three calls of a step get the same one."""

    groups: Sequence[dict[str, Any]]
    max_norm: float | Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None
    clear_grads: bool
    seed: int


class Part(Protocol):
    """The parameters of a step that share a device and process groups, on one backend."""

    device: torch.device
    entries: list[Entry]
    total: Tensor  # [] Σ g²; writable
    norm: Tensor  # [] float32
    skipped: Tensor  # [] float32, 0 or 1

    def sum_squares(self, grads: list[Tensor], request: Request) -> None: ...
    def finish(self, request: Request) -> None: ...
    def update(self, grads: list[Tensor], request: Request) -> None: ...


def scalar_on(value: float | Tensor, device: torch.device, name: str) -> float | Tensor:
    """A hyperparameter as a float, or as a float32 tensor of one element on `device`; a CPU tensor is read at once."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1 or value.dtype != torch.float32:
        got = f"shape {tuple(value.shape)}, {value.dtype}"
        raise ValueError(f"{name}: expected a float or a float32 tensor of one element, got {got}")
    return float(value) if value.device.type == "cpu" != device.type else moved(value, device)


def _pair(value: float | Tensor) -> tuple[float, int]:
    return (0.0, value.data_ptr()) if isinstance(value, Tensor) else (value, 0)


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on `device`, without a wait where the device can be told to; a CPU reads before such a copy has come."""
    return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type != "cpu")


@dataclass
class KernelPart:
    """The extension's two passes over a table of pointers, which is built once and told the gradients every step."""

    device: torch.device
    entries: list[Entry]
    total: Tensor = field(init=False)
    norm: Tensor = field(init=False)
    skipped: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._table = _C.Table()
        for e in self.entries:
            self._table.add(
                _kind(e),
                e.main.numel(),
                e.group,
                e.main.data_ptr(),
                e.exp_avg.data_ptr(),
                e.exp_avg_sq.data_ptr(),
                0 if e.main is e.param else e.param.data_ptr(),
                e.step.data_ptr(),
            )
        self._slots = torch.empty(self._table.tiles, dtype=torch.float64, device=self.device)
        self._scalars = torch.zeros(3, dtype=torch.float64, device=self.device)  # struct Scalars of clipped_adamw.h
        self.total = self._scalars[0]
        floats = self._scalars.view(torch.float32)
        self.norm, self.skipped = floats[2], floats[4]

    def _prepare(self, request: Request) -> None:
        """Turns the request into the kernels' arguments: all that can fail does so before anything is launched."""
        index, stream = -1, 0
        if self.device.type == "cuda":
            index, stream = self.device.index, torch.cuda.current_stream(self.device).cuda_stream
        self._where = _C.Where(index, torch.get_num_threads(), stream)
        max_norm = scalar_on(request.max_norm, self.device, "max_norm")
        scale, found_inf = request.grad_scale, request.found_inf
        amp = [None if t is None else moved(t, self.device, torch.float32) for t in (scale, found_inf)]
        self._clip = _C.Clip(*(0 if t is None else t.data_ptr() for t in amp), *_pair(max_norm))
        self._alive: list[Any] = [max_norm, *amp]  # tensors behind pointers: they must live until the launch
        self._groups = []
        for g in request.groups:
            lr = scalar_on(g["lr"], self.device, "lr")
            weight_decay = scalar_on(g["weight_decay"], self.device, "weight_decay")
            self._groups.append(_C.Group(*_pair(lr), *g["betas"], g["eps"], *_pair(weight_decay), g["maximize"]))
            self._alive += [lr, weight_decay]

    def sum_squares(self, grads: list[Tensor], request: Request) -> None:
        self._prepare(request)
        self._table.set_grads([g.data_ptr() for g in grads])
        _C.sum_squares(self._table, self._clip, self._slots.data_ptr(), self._scalars.data_ptr(), self._where)

    def finish(self, request: Request) -> None:
        _C.finish(self._clip, self._scalars.data_ptr(), self._where)

    def update(self, grads: list[Tensor], request: Request) -> None:
        _C.update(self._table, self._groups, self._scalars.data_ptr(), request.clear_grads, request.seed, self._where)


def _kind(e: Entry) -> int:
    """What e's tensors are, for the kernels: enum Kind of clipped_adamw.h."""
    if e.stochastic:
        name = "bf16_stochastic"
    elif e.main is e.param:
        name = "float32"
    else:
        name = {torch.bfloat16: "bf16_master", torch.float16: "fp16_master"}[e.param.dtype]
    return int(_C.KINDS[name])


@dataclass
class TorchPart:
    """The same step from torch's fused AdamW. It leaves the unscaled, clipped gradients in `.grad`, as torch does."""

    device: torch.device
    entries: list[Entry]
    total: Tensor = field(init=False)
    norm: Tensor = field(init=False)
    skipped: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if any(e.stochastic for e in self.entries):
            reason = backend(self.device)[1]
            raise NotImplementedError(f"low_precision='stochastic' needs the extension on {self.device}: {reason}")
        self.total, self.norm, self.skipped, self._divisor = torch.zeros(4, device=self.device).unbind()

    def sum_squares(self, grads: list[Tensor], request: Request) -> None:
        norm = torch.nn.utils.get_total_norm([g.float() for g in grads])
        if request.grad_scale is not None:
            norm = norm / moved(request.grad_scale, self.device)
        self.total.copy_(norm.square())  # overflows fp32 from a norm of 1.8e19 on: taken for a non-finite one
        self.finish(request)

    def finish(self, request: Request) -> None:
        max_norm = scalar_on(request.max_norm, self.device, "max_norm")
        torch.sqrt(self.total, out=self.norm)
        self._divisor.copy_(((self.norm + 1e-6) / max_norm).clamp(min=1))
        skipped = ~self.total.isfinite()
        if request.grad_scale is not None:
            self._divisor *= moved(request.grad_scale, self.device)
        if request.found_inf is not None:
            skipped |= moved(request.found_inf, self.device) != 0
        self.skipped.copy_(skipped)

    def update(self, grads: list[Tensor], request: Request) -> None:
        for index, group in enumerate(request.groups):
            lr = scalar_on(group["lr"], self.device, "lr")
            weight_decay = scalar_on(group["weight_decay"], self.device, "weight_decay")
            if isinstance(weight_decay, Tensor):
                reason = backend(self.device)[1]
                raise NotImplementedError(f"weight_decay on {self.device} as a tensor needs the extension: {reason}")
            chosen = [(e, g) for e, g in zip(self.entries, grads, strict=True) if e.group == index]
            if not chosen:
                continue
            adamw(
                [e.main for e, _ in chosen],
                [g.to(e.main.dtype) for e, g in chosen],
                [e.exp_avg for e, _ in chosen],
                [e.exp_avg_sq for e, _ in chosen],
                [],
                [e.step for e, _ in chosen],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=lr,
                weight_decay=weight_decay,
                eps=group["eps"],
                maximize=group["maximize"],
                grad_scale=self._divisor,
                found_inf=self.skipped,
            )
        for e in self.entries:
            if e.main is not e.param:
                e.param.copy_(e.main)
        if request.clear_grads:
            torch._foreach_zero_(grads)


_DTYPE = attrgetter("dtype")
_MOMENTS, _MASTER = itemgetter("step", "exp_avg", "exp_avg_sq"), itemgetter("master")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def layouts(tensors: list[Tensor]) -> list[list[Any]]:
    """What the kernels take for granted of tensors behind pointers: strides, size, dtype."""
    # Sizes as numbers of elements: shapes take twice as long to ask for, 9 µs for 96 tensors.
    return [list(map(Tensor.stride, tensors)), list(map(Tensor.numel, tensors)), list(map(_DTYPE, tensors))]


@dataclass
class Planned:
    """A part, with what must stay true for its table of pointers to be valid: compared at every step."""

    part: Part
    params: list[Tensor]
    reduce_over: tuple[Any, ...]  # the process groups over which DTensor shards add up
    states: list[dict[str, Any]]
    sharded: bool = field(init=False)
    masters: list[dict[str, Any]] = field(init=False)  # the states whose master is what AdamW updates
    layouts: list[list[Any]] = field(init=False)  # of the parameters, and so of their gradients
    kept: list[Tensor] = field(init=False)  # the state's tensors, so that none other comes to the identity of one
    identities: list[int] = field(init=False)
    addresses: list[int] = field(init=False)  # of the parameters and first moments

    def __post_init__(self) -> None:
        entries = self.part.entries
        self.sharded = any(hasattr(p, "to_local") for p in self.params)
        self.masters = [s for s, e in zip(self.states, entries, strict=True) if e.main is not e.param]
        self.layouts = layouts([e.param for e in entries])
        self.kept = self._state_tensors()
        self.identities = list(map(id, self.kept))
        self.addresses = self._addresses()

    def _state_tensors(self) -> list[Tensor]:
        return [*chain.from_iterable(map(_MOMENTS, self.states)), *map(_MASTER, self.masters)]

    def _addresses(self) -> list[int]:
        tensors = [*self.params, *(state["exp_avg"] for state in self.states)]
        return list(map(Tensor.data_ptr, map(local, tensors) if self.sharded else tensors))

    def still_valid(self) -> bool:
        """Whether every parameter lies where it did, and its state is the same tensors.

        Identities cost a third of addresses. What moves the memory under a state's tensors moves it under all.
        """
        try:
            same = self.identities == list(map(id, self._state_tensors()))
        except KeyError:  # a state without a tensor: the next plan says which
            return False
        return same and self.addresses == self._addresses()


def make_part(device: torch.device, entries: list[Entry]) -> Part:
    """The part for `device`; which backend it got is logged once, as a warning where it is the fallback."""
    name, reason = backend(device)
    if (device.type, name) not in _announced:
        _announced.add((device.type, name))
        level = logging.WARNING if name.startswith("torch") else logging.INFO
        log.log(level, "ClippedAdamW on %s runs on %s: %s", device.type, name, reason)
    return TorchPart(device, entries) if name.startswith("torch") else KernelPart(device, entries)
