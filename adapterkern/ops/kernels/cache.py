"""Prepared weights, kept while their parameters stay as they were: one small launch per adapter and optimizer step.

An entry is good while each parameter still is the same storage (compared by a weak reference, so that an address used
again is no hit), read as the same dtype, shape and strides, at the same address and version, and while no optimizer has
stepped since. The version counter sees in-place updates and `load_state_dict`; the step hook sees optimizers that write
through `.data` or through a flat buffer (DeepSpeed, FSDP), which leave the counter alone. What neither sees is a
hand-written `p.data.add_(…)` outside an optimizer: `clear()` is for that.

CUDA graphs. Weights that train are prepared in the graph, so that a replay sees what they hold by then; the backward is
handed the forward's preparation (`must_carry`), one launch for both. Weights that are frozen when the graph is recorded
(requires_grad=False, `frozen`) are prepared by none if an eager call has prepared them in that dtype before: the graph
reads the entry, which then stays where it is as long as the weights do. Such a graph does not see a later change of the
weights by itself. The next eager call with them in that dtype finds the change, as above, and rewrites what the graphs
read. Frozen weights without a valid entry are prepared in the graph like the others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from adapterkern.ops import graphs
from adapterkern.ops.index import vouched

from .weights import Prepared, prepare

_entries: dict[tuple[Any, ...], "_Entry"] = {}
_pinned: dict[tuple[Any, ...], "_Entry"] = {}  # what graphs read, by how the weights lie
_in_graphs: dict[int, StorageWeakRef] = {}
_steps = 0


@dataclass(slots=True)
class _Entry:
    storages: tuple[StorageWeakRef, ...]
    state: tuple[Any, ...]
    prepared: Prepared

    def expired(self) -> bool:
        return any(s.expired() for s in self.storages)

    def valid(self, state: tuple[Any, ...]) -> bool:
        # A live weak reference keeps a storage's identity from being given to another.
        return self.state == state and not self.expired()


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def clear() -> None:
    """Forget every prepared weight, and which weights graphs have trained.

    What graphs of frozen weights read stays, and is written anew by the next eager call with those weights.
    """
    _entries.clear()
    _in_graphs.clear()
    for entry in list(_pinned.values()):
        entry.state = ()


def frozen(weights: Iterable[Tensor]) -> bool:
    """Whether the weights are declared frozen; views of a parameter that trains are not, made under no_grad either."""
    return not any(w.requires_grad for w in weights)


def must_carry(weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the backward can find the forward's preparation only if it is handed over: in a recording."""
    return graphs.recording(weights[0].device) and _before_recording(weights, dtype) is None


def prepare_to_carry(weights: Sequence[Tensor], dtype: torch.dtype) -> Prepared:
    """`prepare(weights, dtype)` for one call and its backward, kept nowhere."""
    if graphs.recording(weights[0].device) and not frozen(weights):
        storage = weights[2].untyped_storage()
        _in_graphs[storage._cdata] = StorageWeakRef(storage)
    return prepare(weights, dtype)


def prepared_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> Prepared:
    """`prepare(weights, dtype)`, or what it returned last time if the parameters have not changed since."""
    device = weights[0].device
    if graphs.recording(device):
        kept = _before_recording(weights, dtype)
        return prepare_to_carry(weights, dtype) if kept is None else kept
    if any(w.is_inference() for w in weights):  # they keep no version
        return prepare(weights, dtype)
    storages = [w.untyped_storage() for w in weights]
    if _trained_by_graphs(storages):
        return _renewed(weights, storages, dtype, ())
    key = (dtype, graphs.current_stream(device), *(w.data_ptr() for w in weights))
    state = _state(weights, storages)
    entry = _entries.get(key)
    if entry is not None and entry.valid(state):
        return entry.prepared
    for entries in (_entries, _pinned):
        for old, e in list(entries.items()):  # another thread may be at it too
            if e.expired():
                entries.pop(old, None)
    entry = _Entry(tuple(map(StorageWeakRef, storages)), state, _renewed(weights, storages, dtype, state))
    _entries[key] = entry
    return entry.prepared


def _state(weights: Sequence[Tensor], storages: Sequence[UntypedStorage]) -> tuple[Any, ...]:
    """Differs where the weights may."""
    return (_steps, *(s._cdata for s in storages), *((w._version, w.dtype, w.shape, w.stride()) for w in weights))


def _place(weights: Sequence[Tensor], storages: Sequence[UntypedStorage], dtype: torch.dtype) -> tuple[Any, ...]:
    """What a preparation is of, whatever the weights hold."""
    lie = ((s._cdata, w.data_ptr(), w.dtype, w.shape, w.stride()) for w, s in zip(weights, storages, strict=True))
    return (dtype, *lie)


def _trained_by_graphs(storages: Sequence[UntypedStorage]) -> bool:
    """Whether a replay may have changed the weights, which no version counts."""
    down = storages[2]._cdata
    used = _in_graphs.get(down)
    if used is not None and used.expired():
        _in_graphs.pop(down, None)
    return down in _in_graphs


def _before_recording(weights: Sequence[Tensor], dtype: torch.dtype) -> Prepared | None:
    """A valid preparation of frozen weights from before the recording, which from now on stays where it is."""
    storages = [w.untyped_storage() for w in weights]
    if not frozen(weights) or any(w.is_inference() for w in weights) or _trained_by_graphs(storages):
        return None
    state, place = _state(weights, storages), _place(weights, storages, dtype)
    pinned = _pinned.get(place)
    if pinned is not None and not pinned.expired():  # an earlier graph reads it: no other may take its place
        return pinned.prepared if pinned.valid(state) else None
    pointers = tuple(w.data_ptr() for w in weights)
    for (of, _, *there), entry in list(_entries.items()):  # of any stream: a recording begins when all have finished
        if of == dtype and tuple(there) == pointers and entry.valid(state):
            _pinned[place] = entry
            return entry.prepared
    return None


def _renewed(
    weights: Sequence[Tensor], storages: Sequence[UntypedStorage], dtype: torch.dtype, state: tuple[Any, ...]
) -> Prepared:
    """`prepare(weights, dtype)`; what graphs read of these weights becomes the same."""
    made = prepare(weights, dtype)
    pinned = _pinned.get(_place(weights, storages, dtype)) if _pinned else None
    if pinned is not None and not pinned.expired():
        with torch.inference_mode():  # where it may have been made, and only there be written
            for read, new in zip(pinned.prepared.tensors(), made.tensors(), strict=True):
                read.copy_(new)
        pinned.state = state
    return made


def sorted_by_adapter(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The sequences in order of their adapter (B,), those with none first, and where each adapter's begin (n + 1,).

    Kept for tensors that this package made (``index.vouch``), one of which serves all sites of a model.
    """
    entry = None if graphs.recording(index.device) else vouched(index, n)
    if entry is None:
        return _sorted(index, n)
    key = (n, graphs.current_stream(index.device), index.data_ptr(), index.numel())
    if key not in entry.sorted:
        entry.sorted[key] = _sorted(index, n)
    return entry.sorted[key]


def _sorted(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    values, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(values, torch.arange(n + 1, device=index.device, dtype=index.dtype))
