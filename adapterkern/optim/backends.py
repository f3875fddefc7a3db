"""Where a step of ClippedAdamW runs: the extension's kernels, or torch's fused AdamW where the extension is missing.

The parameters of a step that share a device and, for DTensors, process groups go through three passes together. None
of them waits for the device:

    sum_squares   Σ g² of the gradients, unscaled    reads each gradient once
    finish        norm, multiplier and skip flag     called again only where several devices or ranks share the norm
    update        AdamW with these                   28 bytes per parameter, the gradient partly from cache

torch's fused AdamW divides gradients by a device tensor, ``grad_scale``, and skips the step if another, ``found_inf``,
is set. That is enough to clip without a pass that writes gradients (36 bytes per parameter; plain clipping takes 40).
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from adapterkern import extension
from adapterkern.checks import switch

_C, _MISSING = extension.load()

logger = logging.getLogger(__name__)
_announced: set[tuple[str, str]] = set()


def backend(device: torch.device | str | int) -> tuple[str, str]:
    """What runs a step on ``device``, and why: ("cpu twin" | "cuda kernels" | "torch fused AdamW", reason)."""
    device = torch.device(device)
    fallback = "torch fused AdamW"
    if not switch("ADAPTERKERN_FUSED"):
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


class Entry(NamedTuple):
    """One parameter and its state. All tensors are local (no DTensor), with the memory layout of ``param``."""

    param: Tensor
    main: Tensor  # what AdamW updates: the parameter, or its fp32 master, from which `param` is rounded
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # [] float32
    stochastic: bool
    group: int  # index into StepOptions.groups


class StepOptions(NamedTuple):
    """What a step needs beside the gradients; the same for all of its passes."""

    groups: Sequence[dict[str, Any]]
    max_norm: float | Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None
    clear_grads: bool
    seed: int


class Passes(Protocol):
    """The three passes over a list of entries that share a device."""

    device: torch.device
    squared_norm: Tensor  # [] Σ g²; the caller may overwrite it before finish()
    norm: Tensor  # [] float32
    skipped: Tensor  # [] float32, 0 or 1

    def sum_squares(self, grads: list[Tensor], options: StepOptions) -> None: ...
    def finish(self, options: StepOptions) -> None: ...
    def update(self, grads: list[Tensor], options: StepOptions) -> None: ...


def make_passes(device: torch.device, entries: list[Entry]) -> Passes:
    """The passes over ``entries`` on ``device``. Logs the backend once, as a warning if it is the fallback."""
    name, reason = backend(device)
    fallback = name.startswith("torch")
    if (device.type, name) not in _announced:
        _announced.add((device.type, name))
        level = logging.WARNING if fallback else logging.INFO
        logger.log(level, "ClippedAdamW on %s runs on %s: %s", device.type, name, reason)
    return FusedAdamWPasses(device, entries) if fallback else KernelPasses(device, entries)


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` on ``device``. Waits only for a copy to the CPU, which could otherwise be read before it arrives."""
    return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type != "cpu")


def _scalar_on(value: float | Tensor, device: torch.device, name: str) -> float | Tensor:
    """A hyperparameter as a float, or as a float32 tensor of one element on ``device``; a CPU tensor is read now."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1 or value.dtype != torch.float32:
        got = f"shape {tuple(value.shape)}, {value.dtype}"
        raise ValueError(f"{name}: expected a float or a float32 tensor of one element, got {got}")
    return float(value) if value.device.type == "cpu" != device.type else to_device(value, device)


class KernelPasses:
    """The extension's passes over a table of pointers. The table is built once; gradients are set in every step."""

    def __init__(self, device: torch.device, entries: list[Entry]) -> None:
        self.device = device
        self._table = _C.Table()
        for e in entries:
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
        self._entries = entries  # keeps the memory behind the pointers
        self._slots = torch.empty(self._table.tiles, dtype=torch.float64, device=device)
        self._scalars = torch.zeros(3, dtype=torch.float64, device=device)  # struct Scalars of csrc/clipped_adamw.h
        self.squared_norm = self._scalars[0]
        floats = self._scalars.view(torch.float32)
        self.norm, self.skipped = floats[2], floats[4]
        early = device.type == "cuda" and switch("ADAPTERKERN_EARLY_LAUNCH")  # 0 turns it off, for bisecting
        self._early = early and _C.launches_early(device.index)

    def _prepare(self, options: StepOptions) -> None:
        """Turn the options into the kernels' arguments. All that can fail does so here, before the first launch."""
        index, stream = -1, 0
        if self.device.type == "cuda":
            index, stream = self.device.index, torch.cuda.current_stream(self.device).cuda_stream
        self._where = _C.Where(index, torch.get_num_threads(), stream, self._early)
        max_norm = _scalar_on(options.max_norm, self.device, "max_norm")
        scale, found_inf = options.grad_scale, options.found_inf
        amp = [None if t is None else to_device(t, self.device, torch.float32) for t in (scale, found_inf)]
        self._clip = _C.Clip(*(0 if t is None else t.data_ptr() for t in amp), *_value_and_pointer(max_norm))
        self._alive: list[Any] = [max_norm, *amp]  # tensors behind pointers: they must live until the launch
        self._groups = []
        for g in options.groups:
            lr = _scalar_on(g["lr"], self.device, "lr")
            weight_decay = _scalar_on(g["weight_decay"], self.device, "weight_decay")
            rates = *_value_and_pointer(lr), *g["betas"], g["eps"], *_value_and_pointer(weight_decay)
            self._groups.append(_C.Group(*rates, g["maximize"]))
            self._alive += [lr, weight_decay]

    def sum_squares(self, grads: list[Tensor], options: StepOptions) -> None:
        self._prepare(options)
        self._table.set_grads([g.data_ptr() for g in grads])
        _C.sum_squares(self._table, self._clip, self._slots.data_ptr(), self._scalars.data_ptr(), self._where)

    def finish(self, options: StepOptions) -> None:
        _C.finish(self._clip, self._scalars.data_ptr(), self._where)

    def update(self, grads: list[Tensor], options: StepOptions) -> None:
        _C.update(self._table, self._groups, self._scalars.data_ptr(), options.clear_grads, options.seed, self._where)


def _kind(e: Entry) -> int:
    """How the kernels read and write ``e``: enum Kind of csrc/clipped_adamw.h."""
    if e.stochastic:
        name = "bf16_stochastic"
    elif e.main is e.param:
        name = "float32"
    else:
        name = {torch.bfloat16: "bf16_master", torch.float16: "fp16_master"}[e.param.dtype]
    return int(_C.KINDS[name])


def _value_and_pointer(value: float | Tensor) -> tuple[float, int]:
    """``value`` as the kernels take it: a number and a null pointer, or a pointer that replaces the number."""
    return (0.0, value.data_ptr()) if isinstance(value, Tensor) else (value, 0)


class FusedAdamWPasses:
    """The same passes by torch's fused AdamW. It leaves the unscaled, clipped gradients in ``.grad``, as torch does."""

    def __init__(self, device: torch.device, entries: list[Entry]) -> None:
        if any(e.stochastic for e in entries):
            reason = backend(device)[1]
            raise NotImplementedError(f"low_precision='stochastic' needs the extension on {device}: {reason}")
        self.device = device
        self._entries = entries
        self._rounded = [(e.param, e.main) for e in entries if e.main is not e.param]
        self.squared_norm, self.norm, self.skipped, self._divisor = torch.zeros(4, device=device).unbind()

    def sum_squares(self, grads: list[Tensor], options: StepOptions) -> None:
        norm = torch.nn.utils.get_total_norm([g.float() for g in grads])
        if options.grad_scale is not None:
            norm = norm / to_device(options.grad_scale, self.device)
        self.squared_norm.copy_(norm.square())  # a norm >= 1.8e19 overflows fp32, and the step is skipped
        self.finish(options)

    def finish(self, options: StepOptions) -> None:
        max_norm = _scalar_on(options.max_norm, self.device, "max_norm")
        torch.sqrt(self.squared_norm, out=self.norm)
        self._divisor.copy_(((self.norm + 1e-6) / max_norm).clamp(min=1))
        skipped = ~self.squared_norm.isfinite()
        if options.grad_scale is not None:
            self._divisor *= to_device(options.grad_scale, self.device)
        if options.found_inf is not None:
            skipped |= to_device(options.found_inf, self.device) != 0
        self.skipped.copy_(skipped)

    def update(self, grads: list[Tensor], options: StepOptions) -> None:
        for param, main in self._rounded:  # a parameter that was written since the last step is its own master
            main.copy_(torch.where(main.to(param.dtype) == param, main, param.float()))
        for index, group in enumerate(options.groups):
            lr = _scalar_on(group["lr"], self.device, "lr")
            weight_decay = _scalar_on(group["weight_decay"], self.device, "weight_decay")
            if isinstance(weight_decay, Tensor):
                reason = backend(self.device)[1]
                raise NotImplementedError(f"weight_decay on {self.device} as a tensor needs the extension: {reason}")
            chosen = [(e, g) for e, g in zip(self._entries, grads, strict=True) if e.group == index]
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
        for param, main in self._rounded:
            param.copy_(main)
        if options.clear_grads:
            torch._foreach_zero_(grads)
