"""A run over several processes, as ``torchrun`` or ``accelerate launch`` start them.

A step learns from the same rows however many processes share them: process r of n takes rows r, r + n, r + 2n, … of the
step, in forwards of at most ``batch_size``. Each divides its summed losses by the targets of the whole step, and the
gradients are added up; so a configuration means the same on any number of processes, and a checkpoint of two resumes on
one. Where there are not enough rows for all, a process computes one that is another's, and counts it for nothing: all
of them must take part in every exchange.

How gradients are exchanged is ``engine.py``'s.

Every function here is the identity, or nothing, in a single process.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number. The first, 0, is the one that writes and talks."""
    return dist.get_rank() if count() > 1 else 0


def share(items: Sequence[T], size: int) -> list[tuple[list[T], bool]]:
    """This process's part of ``items`` in batches of at most ``size``; as many on every process.

    A batch that comes with False is there for company's sake: its numbers are another process's. It comes first, so
    that the last one counts wherever one does.
    """
    n = count()
    own = items[rank() :: n]
    batches = [(list(own[start : start + size]), True) for start in range(0, len(own), size)]
    most = -(-len(items[::n]) // size)  # process 0 has the most
    return [([items[0]], False)] * (most - len(batches)) + batches


def total(value: Tensor) -> Tensor:
    """The sum over all processes, on each of them."""
    if count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on one of them; waits for the device."""
    return flag if count() == 1 else bool(total(torch.tensor(float(flag), device=device)).item())


def on_first(work: Callable[[], T]) -> T:
    """What ``work`` gives on the first process, on all of them. What it raises there, the others hear of and raise.

    Raises:
        RuntimeError: on another process than the first, with the first one's error as its text.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            outcome[0] = work()
        except BaseException as error:  # whatever it is, the others must not wait for ever
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(f"process 0: {outcome[1]}")
    return outcome[0]


def each(work: Callable[[], T]) -> T:
    """What ``work``, in which no process waits for another, gives on this one. What it raises on one, all raise.

    Raises:
        RuntimeError: on the other processes, with the first failing one's number and error as its text.
    """
    if count() == 1:
        return work()
    results: list[T] = []
    failure: BaseException | None = None
    try:
        results.append(work())
    except BaseException as error:  # as in `on_first`
        failure = error
    told: list[str | None] = [None] * count()
    dist.all_gather_object(told, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for number, problem in enumerate(told):
        if problem is not None:
            raise RuntimeError(f"process {number}: {problem}")
    return results[0]


def summed(batches: Sequence[T], of: Callable[[T], Tensor], device: torch.device) -> Tensor:
    """Σ of(batch) over all batches, each computed by one of the processes: fp64, on the CPU."""
    results = []
    for (batch,), counts in share(batches, 1):
        result = of(batch)
        results.append(result if counts else torch.zeros_like(result))
    own = torch.stack(results).cpu().double().sum(0)
    return own if count() == 1 else total(own.to(device)).cpu()


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are split over processes."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())  # FSDP2's, DeepSpeed's


def whole(tensor: Tensor) -> Tensor:
    """A shard's whole tensor, which all processes must ask for; another tensor itself."""
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as ``model`` is, on its device."""
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
