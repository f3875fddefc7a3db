"""Prepared weights, kept until their parameters change: one small launch per adapter and optimizer step.

An entry is valid as kept.py says. ``weights`` and ``factor`` are those of ``weights.prepare``.

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
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from adapterkern.ops import graphs
from adapterkern.ops.index import vouched
from adapterkern.ops.kept import Entry, drop_expired, state_of, uncounted

from .weights import Prepared, prepare

Weights = Sequence[Tensor | None]

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


def frozen(weights: Iterable[Tensor | None]) -> bool:
    """Whether all weights are declared frozen. Views of a parameter that trains are not, even if made under no_grad."""
    return not any(w is not None and w.requires_grad for w in weights)


def must_carry(weights: Weights, dtype: torch.dtype, factor: float = 1.0) -> bool:
    """Whether the backward gets the forward's preparation only if it is handed over: in a recording."""
    return graphs.recording(_down(weights).device) and _before_recording(weights, dtype, factor) is None


def prepare_to_carry(weights: Weights, dtype: torch.dtype, factor: float = 1.0) -> Prepared:
    """``prepare(weights, dtype, factor)`` for one call and its backward, not cached."""
    if graphs.recording(_down(weights).device) and not frozen(weights):
        storage = _down(weights).untyped_storage()
        _in_graphs[storage._cdata] = StorageWeakRef(storage)
    return prepare(weights, dtype, factor)


def prepared_weights(weights: Weights, dtype: torch.dtype, factor: float = 1.0) -> Prepared:
    """``prepare(weights, dtype, factor)``, or its last result if the parameters have not changed since."""
    device = _down(weights).device
    if graphs.recording(device):
        kept = _before_recording(weights, dtype, factor)
        return prepare_to_carry(weights, dtype, factor) if kept is None else kept
    given = [w for w in weights if w is not None]
    storages = [w.untyped_storage() for w in given]
    if uncounted(given, storages):
        return prepare(weights, dtype, factor)
    if _in_graphs and _trained_by_graphs(weights):
        return _renewed(weights, dtype, factor, ())
    key = (graphs.current_stream(device), dtype, factor, len(weights), *(w.data_ptr() for w in given))
    state = state_of(given, storages)
    entry = _entries.get(key)
    if entry is not None and entry.valid(state):
        return entry.prepared
    drop_expired(_entries, _pinned)
    entry = Entry(tuple(map(StorageWeakRef, storages)), state, _renewed(weights, dtype, factor, state))
    _entries[key] = entry
    return entry.prepared


def _down(weights: Weights) -> Tensor:
    return weights[2]  # type: ignore[return-value]  # never None


def _place(weights: Weights, dtype: torch.dtype, factor: float) -> tuple[Any, ...]:
    """What identifies the weights of a preparation, whatever their values."""
    given = (w for w in weights if w is not None)
    lie = ((w.untyped_storage()._cdata, w.data_ptr(), w.dtype, w.shape, w.stride()) for w in given)
    return (dtype, factor, len(weights), *lie)


def _trained_by_graphs(weights: Weights) -> bool:
    """Whether a replay may have changed the weights, which changes no version."""
    down = _down(weights).untyped_storage()._cdata
    used = _in_graphs.get(down)
    if used is not None and used.expired():
        _in_graphs.pop(down, None)
    return down in _in_graphs


def _before_recording(weights: Weights, dtype: torch.dtype, factor: float) -> Prepared | None:
    """A valid preparation of frozen weights from before the recording. From now on it keeps its memory."""
    given = [w for w in weights if w is not None]
    storages = [w.untyped_storage() for w in given]
    if not frozen(weights) or uncounted(given, storages) or _trained_by_graphs(weights):
        return None
    state = state_of(given, storages)
    place = _place(weights, dtype, factor)
    pinned = _pinned.get(place)
    if pinned is not None and not pinned.expired():  # an earlier graph reads it: nothing may replace it
        return pinned.prepared if pinned.valid(state) else None
    wanted = dtype, factor, len(weights), *(w.data_ptr() for w in given)
    for (_, *of), entry in list(_entries.items()):  # any stream: a recording begins after all have finished
        if tuple(of) == wanted and entry.valid(state):
            _pinned[place] = entry
            return entry.prepared
    return None


def _renewed(weights: Weights, dtype: torch.dtype, factor: float, state: tuple[Any, ...]) -> Prepared:
    """``prepare(weights, dtype, factor)``, also written to what graphs read of these weights."""
    made = prepare(weights, dtype, factor)
    pinned = _pinned.get(_place(weights, dtype, factor)) if _pinned else None
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
