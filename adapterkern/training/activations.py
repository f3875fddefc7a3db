"""What a step keeps for its backward: recomputed (checkpointing), or kept in the host's memory (offloading).

Both leave every bit of the results. Together they keep each layer's input alone, and that in the host's memory.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from adapterkern.model.llama import LlamaAdapter

SMALLEST = 1 << 16  # bytes of a tensor that is worth a copy: below are norms' and attention's row factors


def check_checkpointing(model: LlamaAdapter) -> None:
    """Raise ``ValueError`` if the backbone's layers cannot be run again in the backward."""
    if not model.base.supports_gradient_checkpointing:
        raise ValueError(
            "checkpoint_activations: expected a backbone that supports gradient checkpointing, got "
            f"{type(model.base).__name__}"
        )


@contextlib.contextmanager
def checkpointed(model: LlamaAdapter) -> Iterator[None]:
    """Inside the block, a training forward keeps each layer's input alone, and its backward runs the layer again."""
    if model.checkpoints_activations:  # the user's own settings stay
        yield
        return
    model.gradient_checkpointing_enable()
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def check_offload(device: torch.device) -> None:
    """Raise ``ValueError`` for a device whose memory is the host's."""
    if device.type == "cpu":
        raise ValueError(
            "offload_activations: expected a backbone on a GPU, got one on the CPU, in whose memory its activations "
            "are anyway"
        )


@contextlib.contextmanager
def offloaded(task: nn.Module, model: LlamaAdapter) -> Iterator[None]:
    """Inside the block, what the layers of ``model`` save in forwards of ``task`` for the backward goes to the host.

    What follows the last layer, logits for example, stays: the backward begins with it.
    """
    offload = Offload(model.device.type)
    handles = [
        task.register_forward_pre_hook(lambda *_: offload.begin()),
        task.register_forward_hook(lambda *_: offload.end(), always_call=True),
        # Not the hooks of tensors around each layer, within which a checkpointed one would keep all that it saves
        *(layer.register_forward_pre_hook(lambda *_: offload.within(True)) for layer in model.layers),
        model.layers[-1].register_forward_hook(lambda *_: offload.within(False)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Moved:
    """A saved tensor in the host's memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        # In the stream of the step: what frees the tensor, and what reads it again, comes after the copy.
        self.host.copy_(tensor, non_blocking=True)


class Offload:
    """Hooks of saved tensors that move activations from devices of ``device_type`` to the host, and back.

    An activation is what has a gradient and is no parameter. Parameters are not moved, frozen ones and their copies for
    autocast included: no gradient flows into these. Of one tensor that several operations save there is one copy.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self._within = False
        self._hooks: Any = None
        self._moved: weakref.WeakValueDictionary[tuple[Any, ...], _Moved] = weakref.WeakValueDictionary()
        self._storages: list[StorageWeakRef] = []  # while these live, no other storage gets the identity of one

    def begin(self) -> None:
        """A forward begins."""
        self._within = True
        self._hooks = saved_tensors_hooks(self.pack, self.unpack)
        self._hooks.__enter__()

    def end(self) -> None:
        """It has ended, with a result or not."""
        self._hooks.__exit__(None, None, None)
        self._moved.clear()
        self._storages.clear()

    def within(self, layers: bool) -> None:
        """Whether what follows is saved by a layer."""
        self._within = layers

    def pack(self, tensor: Tensor) -> Tensor | _Moved:
        """What autograd keeps of ``tensor``."""
        # Of what stays the same memory without its graph: a node that held its own output so would never be freed.
        if not self._within or tensor.device.type != self.device_type or not _is_activation(tensor):
            return tensor.detach()
        storage = tensor.untyped_storage()
        if not SMALLEST <= tensor.nbytes <= storage.nbytes():  # larger is an expanded one
            return tensor.detach()
        key = storage._cdata, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version
        moved = self._moved.get(key)
        if moved is None:
            self._moved[key] = moved = _Moved(tensor)
            self._storages.append(StorageWeakRef(storage))
        return moved

    @staticmethod
    def unpack(kept: Tensor | _Moved) -> Tensor:
        """``tensor`` again."""
        return kept.host.to(kept.device, non_blocking=True) if isinstance(kept, _Moved) else kept


def _is_activation(tensor: Tensor) -> bool:
    base = tensor._base if tensor._is_view() else tensor
    return type(tensor) is Tensor and tensor.requires_grad and base is not None and not base.is_leaf
