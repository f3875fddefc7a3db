"""A run over several processes, as ``torchrun`` or ``accelerate launch`` starts them.

A step learns from the same rows whatever the number of processes: rank r of n takes rows r, r + n, r + 2n, … of the
step, in forwards of at most ``batch_size``. Each rank divides its summed losses by the number of targets of the whole
step, and the gradients are added. So a configuration means the same for any number of processes, and a checkpoint of
two processes resumes on one. All ranks must take part in every collective, so a rank without rows of its own computes
a padding batch, whose result is discarded.

``parallel/`` exchanges the gradients. In a single process every function here is the identity or does nothing.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from adapterkern.model.digest import is_sharded as is_sharded

T = TypeVar("T")


class OtherProcessError(RuntimeError):
    """Another process has failed, which says so itself; the message names it and its error."""


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number. Rank 0 writes files and prints."""
    return dist.get_rank() if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Whether this process prints. Before training has joined the processes, the launcher's ``RANK`` decides."""
    return (rank() if world_size() > 1 else int(os.environ.get("RANK", 0))) == 0


def share(items: Sequence[T], size: int) -> list[tuple[list[T], bool]]:
    """This rank's items in batches of at most ``size``, the same number of batches on every rank.

    A batch paired with False is a padding batch: it keeps this rank in the collectives, and its result is discarded.
    Padding batches come first, so that a rank's last batch counts if any of its batches does.
    """
    n = world_size()
    own = items[rank() :: n]
    batches = [(list(own[start : start + size]), True) for start in range(0, len(own), size)]
    most = -(-len(items[::n]) // size)  # rank 0 has the most
    return [([items[0]], False)] * (most - len(batches)) + batches


def total(value: Tensor) -> Tensor:
    """The sum over all ranks, on each of them."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any rank; waits for the device."""
    return flag if world_size() == 1 else bool(total(torch.tensor(float(flag), device=device)).item())


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result on every rank. If it raises, every rank raises.

    Raises:
        OtherProcessError: on the other ranks, with rank 0's error in its message.
    """
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            outcome[0] = work()
        except BaseException as error:  # of any kind: the other ranks would wait for ever
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise OtherProcessError(f"process 0: {outcome[1]}")
    return outcome[0]


def on_every_rank(work: Callable[[], T]) -> T:
    """Run ``work``, which may not contain a collective, on every rank. If one raises, every rank raises.

    Raises:
        RuntimeError: on ranks that did not fail, with the number and the error of the first one that did.
    """
    if world_size() == 1:
        return work()
    results: list[T] = []
    failure: BaseException | None = None
    try:
        results.append(work())
    except BaseException as error:  # as in `on_rank_zero`
        failure = error
    problems: list[str | None] = [None] * world_size()
    dist.all_gather_object(problems, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for number, problem in enumerate(problems):
        if problem is not None:
            raise OtherProcessError(f"process {number}: {problem}")
    return results[0]


def merged(own: dict[int, T]) -> dict[int, T]:
    """The entries of all ranks, on every rank."""
    if world_size() == 1:
        return own
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return {key: value for of_rank in found for key, value in of_rank.items()}


def sum_over_batches(batches: Sequence[T], of: Callable[[T], Tensor], device: torch.device) -> Tensor:
    """Σ of(batch) over all batches, each computed by one rank: fp64, on the CPU."""
    results = []
    for (batch,), counts in share(batches, 1):
        result = of(batch)
        results.append(result if counts else torch.zeros_like(result))
    own = torch.stack(results).cpu().double().sum(0)
    return own if world_size() == 1 else total(own.to(device)).cpu()


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, a collective; any other tensor unchanged."""
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """This rank's shard of a full tensor, on the device and with the placement of ``reference``."""
    if not isinstance(reference, DTensor) or tensor.shape != reference.shape:
        return tensor
    return distribute_tensor(
        tensor.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None
    )
