"""The dtype in which the machine multiplies matrices fast, by a measurement: names of processors do not tell it."""

import functools
import statistics
import time

import torch
import torch.nn.functional as F

_SHAPE = 256, 512, 512  # rows, inputs, outputs: 0.3 GFLOP, a few milliseconds, or 80 where bf16 is emulated
_ROUNDS = 7
_WORTH = 1.3  # how much faster bf16 must be than fp32, whose weights are exact
_SLOW = 0.8  # below it a dtype that was asked for is named as slow, and weights that were saved in bf16 get fp32


def fast_dtype(device: torch.device, saved: str | None = None) -> tuple[str, str]:
    """The name of the dtype, as ``load_backbone`` takes it, for frozen weights on ``device``; and why, in words.

    A CUDA device that has bf16 gets it. A CPU is measured, once per process and in under a second; weights that were
    saved in bf16 get it unless it is slower, since fp32 makes them twice as large and no more exact. fp16 is never
    chosen: without a gradient scaler small gradients of the residual stream vanish in it.

    Args:
        saved: the dtype of the weights in their files, if it is known.
    """
    name, why = _fast(device, saved)
    return name, why if saved is None else f"its own dtype, and {why}" if saved == name else f"saved in {saved}; {why}"


def _fast(device: torch.device, saved: str | None) -> tuple[str, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} has it"
        return "fp32", f"{name} has no bf16"
    if device.type != "cpu":
        return "fp32", f"nothing was measured on {device.type}"
    ratio = _speed(torch.bfloat16, torch.get_num_threads())
    if ratio >= (_SLOW if saved == "bf16" else _WORTH):
        return "bf16", f"this CPU multiplies it {ratio:.1f} times as fast as fp32"
    return "fp32", f"this CPU multiplies bf16 {ratio:.2g} times as fast"


def slow_dtype(dtype: torch.dtype, device: torch.device) -> str:
    """In words that ``device`` multiplies ``dtype`` slower than fp32; "" if it does not. Measured on a CPU alone."""
    if device.type != "cpu" or dtype == torch.float32:
        return ""
    ratio = _speed(dtype, torch.get_num_threads())
    return "" if ratio >= _SLOW else f"this CPU multiplies it {ratio:.2g} times as fast as fp32"


@functools.cache
def _speed(low: torch.dtype, threads: int) -> float:
    """The seconds of a product and its gradient in fp32 over those in ``low``; medians of some, which take turns."""
    rows, inputs, outputs = _SHAPE
    operands = {
        dtype: (torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype))
        for dtype in (torch.float32, low)
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(_ROUNDS):
            for dtype, (x, weight) in operands.items():
                start = time.perf_counter()
                F.linear(x, weight) @ weight  # fp16 may be fast in the first alone
                seconds[dtype].append(time.perf_counter() - start)
    exact, rounded = (statistics.median(seconds[dtype][1:]) for dtype in (torch.float32, low))
    return exact / rounded
