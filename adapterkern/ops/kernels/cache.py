"""Prepared weights, kept until their parameters change: one small launch per adapter and optimizer step.

An entry is valid as kept.py says.

CUDA graphs. Weights that train are prepared in the graph, so that a replay sees their current values. The backward gets
the forward's preparation (``must_carry``): one launch for both. Weights that are frozen when the graph is recorded
(requires_grad=False, ``frozen``) are not prepared in it if an eager call has prepared them in that dtype before: the
graph reads that entry, which then keeps its memory as long as the weights live. Such a graph does not itself see a
later change of the weights. The next eager call with them in that dtype finds the change, as above, and rewrites what
the graphs read. Frozen weights without a valid entry are prepared in the graph like the others.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from adapterkern.ops import graphs
from adapterkern.ops.index import vouched
from adapterkern.ops.kept import Entry, drop_expired, state_of

from .weights import Prepared, prepare

_entries: dict[tuple[Any, ...], Entry[Prepared]] = {}
_pinned: dict[tuple[Any, ...], Entry[Prepared]] = {}  # what graphs read, by _place
_in_graphs: dict[int, StorageWeakRef] = {}


def clear() -> None:
    """Forget all prepared weights, and which weights graphs have trained.

    What graphs of frozen weights read stays; the next eager call with those weights rewrites it.
    """
    _entries.clear()
    _in_graphs.clear()
    for entry in list(_pinned.values()):
        entry.state = ()


def frozen(weights: Iterable[Tensor]) -> bool:
    """Whether all weights are declared frozen. Views of a parameter that trains are not, even if made under no_grad."""
    return not any(w.requires_grad for w in weights)


def must_carry(weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the backward gets the forward's preparation only if it is handed over: in a recording."""
    return graphs.recording(weights[0].device) and _before_recording(weights, dtype) is None


def prepare_to_carry(weights: Sequence[Tensor], dtype: torch.dtype) -> Prepared:
    """``prepare(weights, dtype)`` for one call and its backward, not cached."""
    if graphs.recording(weights[0].device) and not frozen(weights):
        storage = weights[2].untyped_storage()
        _in_graphs[storage._cdata] = StorageWeakRef(storage)
    return prepare(weights, dtype)


def prepared_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> Prepared:
    """``prepare(weights, dtype)``, or its last result if the parameters have not changed since."""
    device = weights[0].device
    if graphs.recording(device):
        kept = _before_recording(weights, dtype)
        return prepare_to_carry(weights, dtype) if kept is None else kept
    if any(w.is_inference() for w in weights):  # they have no version
        return prepare(weights, dtype)
    storages = [w.untyped_storage() for w in weights]
    if _trained_by_graphs(storages):
        return _renewed(weights, storages, dtype, ())
    key = (dtype, graphs.current_stream(device), *(w.data_ptr() for w in weights))
    state = state_of(weights, storages)
    entry = _entries.get(key)
    if entry is not None and entry.valid(state):
        return entry.prepared
    drop_expired(_entries, _pinned)
    entry = Entry(tuple(map(StorageWeakRef, storages)), state, _renewed(weights, storages, dtype, state))
    _entries[key] = entry
    return entry.prepared


def _place(weights: Sequence[Tensor], storages: Sequence[UntypedStorage], dtype: torch.dtype) -> tuple[Any, ...]:
    """What identifies the weights of a preparation, whatever their values."""
    lie = ((s._cdata, w.data_ptr(), w.dtype, w.shape, w.stride()) for w, s in zip(weights, storages, strict=True))
    return (dtype, *lie)


def _trained_by_graphs(storages: Sequence[UntypedStorage]) -> bool:
    """Whether a replay may have changed the weights, which changes no version."""
    down = storages[2]._cdata
    used = _in_graphs.get(down)
    if used is not None and used.expired():
        _in_graphs.pop(down, None)
    return down in _in_graphs


def _before_recording(weights: Sequence[Tensor], dtype: torch.dtype) -> Prepared | None:
    """A valid preparation of frozen weights from before the recording. From now on it keeps its memory."""
    storages = [w.untyped_storage() for w in weights]
    if not frozen(weights) or any(w.is_inference() for w in weights) or _trained_by_graphs(storages):
        return None
    state, place = state_of(weights, storages), _place(weights, storages, dtype)
    pinned = _pinned.get(place)
    if pinned is not None and not pinned.expired():  # an earlier graph reads it: nothing may replace it
        return pinned.prepared if pinned.valid(state) else None
    pointers = tuple(w.data_ptr() for w in weights)
    for (of, _, *there), entry in list(_entries.items()):  # any stream: a recording begins after all have finished
        if of == dtype and tuple(there) == pointers and entry.valid(state):
            _pinned[place] = entry
            return entry.prepared
    return None


def _renewed(
    weights: Sequence[Tensor], storages: Sequence[UntypedStorage], dtype: torch.dtype, state: tuple[Any, ...]
) -> Prepared:
    """``prepare(weights, dtype)``, also written to what graphs read of these weights."""
    made = prepare(weights, dtype)
    pinned = _pinned.get(_place(weights, storages, dtype)) if _pinned else None
    if pinned is not None and not pinned.expired():
        with torch.inference_mode():  # `read` may be an inference tensor, writable only here
            for read, new in zip(pinned.prepared.tensors(), made.tensors(), strict=True):
                read.copy_(new)
        pinned.state = state
    return made


def sorted_by_adapter(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The sequences sorted by adapter (B,), those with none first, and where each adapter's begin (n + 1,).

    Kept for tensors that this package made (``index.vouch``); one of them serves all sites of a model.
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
