"""Prepared weights, kept while their parameters stay as they were: one small launch per adapter and optimizer step.

An entry is good while each parameter still is the same storage (compared by a weak reference, so that an address used
again is no hit), read as the same dtype, shape and strides, at the same address and version, and while no optimizer has
stepped since. The version counter sees in-place updates and `load_state_dict`; the step hook sees optimizers that write
through `.data` or through a flat buffer (DeepSpeed, FSDP), which leave the counter alone. What neither sees is a
hand-written `p.data.add_(…)` outside an optimizer: `clear()` is for that.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from .weights import Prepared, prepare

_entries: dict[tuple[Any, ...], "_Entry"] = {}
_in_graphs: dict[int, StorageWeakRef] = {}
_steps = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    storages: tuple[StorageWeakRef, ...]
    state: tuple[Any, ...]
    prepared: Prepared


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def clear() -> None:
    """Forget every prepared weight, and which weights graphs have used."""
    _entries.clear()
    _in_graphs.clear()


def _recording(device: torch.device) -> bool:
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


def prepared_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> Prepared:
    """`prepare(weights, dtype)`, or what it returned last time if the parameters have not changed since."""
    device = weights[0].device
    storages = [w.untyped_storage() for w in weights]
    down = storages[2]._cdata
    if _recording(device):
        _in_graphs[down] = StorageWeakRef(storages[2])
    used = _in_graphs.get(down)
    if used is not None and used.expired():
        _in_graphs.pop(down, None)
    if down in _in_graphs or any(w.is_inference() for w in weights):  # inference tensors keep no version
        return prepare(weights, dtype)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    key = (dtype, stream, *(w.data_ptr() for w in weights))
    state = (_steps, *(s._cdata for s in storages), *((w._version, w.dtype, w.shape, w.stride()) for w in weights))
    entry = _entries.get(key)
    # A live weak reference keeps a storage's identity from being given to another.
    if entry is not None and entry.state == state and not any(s.expired() for s in entry.storages):
        return entry.prepared
    for old, e in list(_entries.items()):  # another thread may be at it too
        if any(s.expired() for s in e.storages):
            _entries.pop(old, None)
    entry = _Entry(tuple(map(StorageWeakRef, storages)), state, prepare(weights, dtype))
    _entries[key] = entry
    return entry.prepared
