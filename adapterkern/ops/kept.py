"""What is made of an adapter's parameters, kept until they change.

An entry is valid while each parameter is the same storage (compared by a weak reference, so that a reused address is no
hit), read with the same dtype, shape and strides, at the same address and version, and while no optimizer has stepped
since. The version counter sees in-place updates and ``load_state_dict``. The step hook sees optimizers that write
through ``.data`` or a flat buffer (DeepSpeed, FSDP), which leave the counter unchanged. Neither sees what is written
past PyTorch: through ``p.data``, by torch.distributed's collectives, by way of NumPy or DLPack. ``parameters_changed``
says so. Of memory that processes share nothing is kept on a CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def parameters_changed() -> None:
    """Say that parameters of adapters have been written in a way that PyTorch does not count.

    Which are: writes through ``p.data`` outside an optimizer, ``torch.distributed.broadcast(p)`` and other collectives
    into parameters, and writes to NumPy's or DLPack's view of their memory. Whatever the kernels keep of any parameters
    is then made again at its next use.
    """
    _count_step()


@dataclass(slots=True)
class Entry(Generic[T]):
    """What was made, and of what."""

    storages: tuple[StorageWeakRef, ...]
    state: tuple[Any, ...]
    prepared: T

    def expired(self) -> bool:
        return any(s.expired() for s in self.storages)

    def valid(self, state: tuple[Any, ...]) -> bool:
        # While a weak reference to a storage lives, no other storage gets its identity.
        return self.state == state and not self.expired()


def state_of(weights: Sequence[Tensor], storages: Sequence[UntypedStorage]) -> tuple[Any, ...]:
    """A value that differs whenever the weights may."""
    return (_steps, *(s._cdata for s in storages), *((w._version, w.dtype, w.shape, w.stride()) for w in weights))


def uncounted(weights: Sequence[Tensor], storages: Sequence[UntypedStorage]) -> bool:
    """Whether a write may leave no trace in ``state_of``, so that nothing may be kept.

    Inference tensors have no version, and another process counts its own writes to memory that they share.
    """
    shared = (w.is_cpu and s.is_shared() for w, s in zip(weights, storages, strict=True))  # on a GPU all memory is
    return any(w.is_inference() for w in weights) or any(shared)


def drop_expired(*tables: dict[Any, Entry[Any]]) -> None:
    """Remove the entries of parameters that are gone."""
    for entries in tables:
        for key, entry in list(entries.items()):  # a copy: another thread may change the table
            if entry.expired():
                entries.pop(key, None)


class Kept(Generic[T]):
    """The results of ``make(weights, *how)``; some of the weights may be None."""

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._entries: dict[tuple[Any, ...], Entry[T]] = {}

    def get(self, weights: Sequence[Tensor | None], *how: Any) -> T:
        """``make(weights, *how)``, or its last result if the parameters have not changed since."""
        given: Any = weights if weights[0] is not None else [w for w in weights if w is not None]
        storages = [w.untyped_storage() for w in given]
        if uncounted(given, storages):
            return self._make(weights, *how)
        key = (*how, len(weights), *(w.data_ptr() for w in given))
        state = state_of(given, storages)
        entry = self._entries.get(key)
        if entry is not None and entry.valid(state):
            return entry.prepared
        drop_expired(self._entries)
        entry = Entry(tuple(map(StorageWeakRef, storages)), state, self._make(weights, *how))
        self._entries[key] = entry
        return entry.prepared

    def clear(self) -> None:
        """Forget all of them."""
        self._entries.clear()
