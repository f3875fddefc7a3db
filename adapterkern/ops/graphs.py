"""Whether a CUDA graph is being recorded. Its replay repeats the launches, but runs no Python.

So what Python has concluded from a tensor's values need not hold in a replay. Memory that is allocated during a
recording belongs to the recording's own pool.
"""

import sys

import torch


def recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, or torch.compile's graph trees warm one up on their stream and pool."""
    if device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False) if trees is not None else None
    except AssertionError:  # a thread that torch did not start has no table of managers
        return False
    return manager is not None and manager.stream == torch.cuda.current_stream(device)


def current_stream(device: torch.device) -> int:
    """The stream that launches on ``device`` go to, as a number. Others may not see yet what it writes."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
