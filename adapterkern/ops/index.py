"""``index``, the adapter of each sequence: what it may be, and whose values need no look.

A look at the values costs a GPU five launches, and the backward sorts them with three more, at every call. A version
counter cannot tell whether either is still true: the replay of a CUDA graph and another library's kernel write a tensor
without counting. So it is done once only for tensors that this package has made from values it has looked at, and that
nobody else writes (`vouch`); `mixing` makes one such tensor for all sites of a model.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from adapterkern.ops import graphs


@dataclass(frozen=True, slots=True)
class Vouched:
    """A storage whose values are from −1 to n − 1 and stay what they are."""

    storage: StorageWeakRef
    version: int
    n: int
    sorted: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)  # of kernels.cache


_vouched: dict[int, Vouched] = {}


def vouch(index: Tensor, n: int) -> Tensor:
    """``index``, noted as ours and right for n adapters; not in a recording, whose replays make the values anew."""
    if not torch.compiler.is_compiling() and type(index) is Tensor and not graphs.recording(index.device):
        for identity, entry in list(_vouched.items()):  # another thread may be at it too
            if entry.storage.expired():
                _vouched.pop(identity, None)
        storage = index.untyped_storage()
        _vouched[storage._cdata] = Vouched(StorageWeakRef(storage), _version(index), n)
    return index


def vouched(index: Tensor, n: int) -> Vouched | None:
    """What is noted of the storage of ``index``, if its values are known to fit n adapters."""
    entry = _vouched.get(index.untyped_storage()._cdata) if type(index) is Tensor else None
    if entry is None or entry.n > n or entry.version != _version(index) or entry.storage.expired():
        return None
    return entry


def _version(index: Tensor) -> int:
    return 0 if index.is_inference() else index._version


def check_dtype(index: object) -> None:
    """Raise the ``TypeError`` for what is no tensor of integers."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: expected a torch.Tensor of dtype int64 or int32, got {got}")


def check_values(index: Tensor, n: int) -> None:
    """Raise the ``ValueError`` for a value that is none of n adapters; a GPU reports it itself, asynchronously."""
    if not torch.compiler.is_compiling() and vouched(index, n) is not None:
        return
    within = ((index >= -1) & (index < n)).all()
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        if not within:
            raise ValueError(
                f"index: expected values from -1 to {n - 1}, got {index.min().item()} to {index.max().item()}"
            )
    else:
        torch._assert_async(within, f"adapterkern: index: expected values from -1 to {n - 1}")


def check_index(index: Tensor, x: Tensor, n: int) -> None:
    """Raise what is wrong with ``index`` beside ``x`` and n stacked adapters."""
    check_dtype(index)
    if index.device != x.device:
        raise ValueError(f"index: expected device {x.device} like x, got {index.device}")
    if index.dim() >= x.dim() or index.shape != x.shape[: index.dim()]:
        raise ValueError(f"index: expected leading dimensions of x, {tuple(x.shape[:-1])}, got {tuple(index.shape)}")
    check_values(index, n)
