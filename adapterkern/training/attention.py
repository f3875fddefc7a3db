"""Which of torch's attention kernels a step on a CPU takes in 16 bits, by a measurement.

Its flash kernel's backward is slow there at short lengths: at 48 tokens it takes several times as long as attention
written out, which computes in fp32. At long lengths it is the faster one, and it keeps no (length × length) weights.
A run must repeat to the bit, so one clear difference is measured, and not each length.
"""

import contextlib
import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapterkern.model.backbone import DTYPES
from adapterkern.model.llama import LlamaAdapter
from adapterkern.ops.checks import LOW

LONGEST = 128  # tokens, at which the kernels are about equally fast
_MEASURED = 64  # where they differ most
_WORTH = 1.3  # how many times as fast written out it must be
_ROUNDS = 4


def fast_attention(model: LlamaAdapter, shape: Sequence[int], precision: str) -> AbstractContextManager[None]:
    """Context for the forward and backward of a batch of ``shape`` (rows, length) under ``precision``'s autocast.

    The backward, too, because checkpointed layers run their forward in it.
    """
    dtype = model.dtype if precision == "fp32" else DTYPES[precision]
    config = model.config.get_text_config()
    if model.device.type != "cpu" or dtype not in LOW or config._attn_implementation != "sdpa":
        return contextlib.nullcontext()
    length = shape[1]
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if length > LONGEST or not written_out_is_faster(heads, size, dtype, torch.get_num_threads()):
        return contextlib.nullcontext()
    written_out: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return written_out


@functools.cache
def written_out_is_faster(heads: int, size: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether attention with gradients takes clearly less time written out, for one row per thread."""
    length = _MEASURED
    q, k, v = (torch.ones(threads, heads, length, size, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    seconds = {backend: float("inf") for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)}
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(_ROUNDS):
            for backend in seconds:
                start = time.perf_counter()
                with sdpa_kernel(backend):
                    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                torch.autograd.grad(y, (q, k, v), y.detach())
                seconds[backend] = min(seconds[backend], time.perf_counter() - start)
    return _WORTH * seconds[SDPBackend.MATH] < seconds[SDPBackend.FLASH_ATTENTION]
