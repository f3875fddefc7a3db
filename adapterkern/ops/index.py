"""Index tensors whose values are known: neither checked (checks.py) nor sorted (kernels/cache.py) again.

Checking the values of ``index``, the adapter of each sequence, costs a GPU five launches, and the backward sorts them
with three more, at every call. A version counter cannot tell whether the results still hold: the replay of a CUDA graph
and another library's kernel write a tensor without counting. So they are kept only for tensors that this package has
made from checked values and that nothing else writes (``vouch``), such as one tensor for all sites of a model.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from adapterkern.ops import graphs


@dataclass(frozen=True, slots=True)
class Vouched:
    """A storage whose values are from −1 to n − 1 and do not change."""

    storage: StorageWeakRef
    version: int
    n: int
    sorted: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)  # kept by kernels/cache.py


_vouched: dict[int, Vouched] = {}


def vouch(index: Tensor, n: int) -> Tensor:
    """Record that ``index`` is ours and fits n adapters; return it.

    Records nothing while a CUDA graph is recorded: its replays write the values again.
    """
    if not torch.compiler.is_compiling() and type(index) is Tensor and not graphs.recording(index.device):
        for identity, entry in list(_vouched.items()):  # a copy: another thread may change the table
            if entry.storage.expired():
                _vouched.pop(identity, None)
        storage = index.untyped_storage()
        _vouched[storage._cdata] = Vouched(StorageWeakRef(storage), _version(index), n)
    return index


def vouched(index: Tensor, n: int) -> Vouched | None:
    """The entry of the storage of ``index``, if its values are known to fit n adapters."""
    if type(index) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(index):  # the latter has no storage
        return None
    entry = _vouched.get(index.untyped_storage()._cdata)
    if entry is None or entry.n > n or entry.version != _version(index) or entry.storage.expired():
        return None
    return entry


def _version(index: Tensor) -> int:
    return 0 if index.is_inference() else index._version
