"""The dtype in which the machine multiplies matrices fast, by a measurement: names of processors do not tell it."""

import functools
import statistics
import time

import torch
import torch.nn.functional as F

_SHAPE = 256, 512, 512  # rows, inputs, outputs: 0.1 GFLOP, a few milliseconds, or 40 where bf16 is emulated
_ROUNDS = 7
_WORTH = 1.3  # how much faster bf16 must be than fp32, whose weights are exact


def fast_dtype(device: torch.device) -> tuple[str, str]:
    """The name of the dtype, as ``load_backbone`` takes it, for frozen weights on ``device``; and why, in words.

    A CUDA device that has bf16 gets it. A CPU is measured, once per process and in under a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} has it"
        return "fp32", f"{name} has no bf16"
    if device.type != "cpu":
        return "fp32", f"nothing was measured on {device.type}"
    ratio = _bf16_speed(torch.get_num_threads())
    if ratio >= _WORTH:
        return "bf16", f"this CPU multiplies it {ratio:.1f} times as fast as fp32"
    return "fp32", f"this CPU multiplies bf16 {ratio:.2g} times as fast"


@functools.cache
def _bf16_speed(threads: int) -> float:
    """The seconds of a product in fp32 over those in bf16; the median of a few, which take turns."""
    rows, inputs, outputs = _SHAPE
    operands = {
        dtype: (torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(_ROUNDS):
            for dtype, (x, weight) in operands.items():
                start = time.perf_counter()
                F.linear(x, weight)
                seconds[dtype].append(time.perf_counter() - start)
    exact, rounded = (statistics.median(seconds[dtype][1:]) for dtype in (torch.float32, torch.bfloat16))
    return exact / rounded
