"""Whether what runs now is being recorded: a CUDA graph repeats the launches, and no Python beside them.

So nothing that Python has concluded from a tensor's values holds at a replay, and what is allocated meanwhile belongs
to the recording's own pool.
"""

import sys

import torch


def recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, or warmed up by torch.compile's graph trees on their stream and pool."""
    if device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False) if trees is not None else None
    except AssertionError:  # a thread that torch did not start has no table of managers to look into
        return False
    return manager is not None and manager.stream == torch.cuda.current_stream(device)


def current_stream(device: torch.device) -> int:
    """The stream that launches on ``device`` go to, as a number: what one has written another may not have yet."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
