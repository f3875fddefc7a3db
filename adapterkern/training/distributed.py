"""A run over several processes, as ``torchrun`` or ``accelerate launch`` start them.

A step learns from the same rows however many processes share them: process r of n takes rows r, r + n, r + 2n, … of the
step, in forwards of at most ``batch_size``. Each divides its summed losses by the targets of the whole step, and the
gradients are added up; so a configuration means the same on any number of processes, and a checkpoint of two resumes on
one. Where there are not enough rows for all, a process computes one that is another's, and counts it for nothing: all
of them must take part in every exchange.

The engine is DistributedDataParallel, where each process holds the whole backbone, or FSDP2 (``shard``), where each
holds a part of every parameter and gathers a layer's when it comes to it. Both *average* gradients, and so a loss is
multiplied by the number of processes beforehand. Under FSDP2 each parameter is split by itself (nothing is flattened,
so frozen and trained ones may differ in dtype), and ClippedAdamW adds its norm up over the shards.

Every function here is the identity, or nothing, in a single process.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from adapterkern.training.config import TrainConfig

T = TypeVar("T")


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number. The first, 0, is the one that writes and talks."""
    return dist.get_rank() if count() > 1 else 0


def share(items: Sequence[T], size: int) -> list[tuple[list[T], bool]]:
    """This process's part of ``items`` in batches of at most ``size``; as many on every process.

    A batch that comes with False is there for company's sake: its numbers are another process's.
    """
    n = count()
    own = items[rank() :: n]
    batches = [(list(own[start : start + size]), True) for start in range(0, len(own), size)]
    most = -(-len(items[::n]) // size)  # process 0 has the most
    return batches + [([items[0]], False)] * (most - len(batches))


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
    return any(isinstance(p, DTensor) for p in module.parameters())


def check(task: Any, config: TrainConfig) -> None:
    """Raise what a run over several processes cannot do, or a run with ``shard`` on one."""
    if count() == 1 and config.shard:
        raise ValueError("shard: expected several processes (torchrun, accelerate launch), got one")
    if config.shard and config.precision == "fp16":
        raise ValueError("precision: expected fp32 or bf16 with shard=True, got fp16, whose scaler knows no shards")
    if count() > 1 and not task.over_processes:
        raise NotImplementedError(f"task: {type(task).__name__} trains in one process only, got {count()}")


def shard(task: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Split every parameter of ``task`` over the processes, in place; a layer's are gathered while it runs."""
    mesh = init_device_mesh(device.type, (count(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(task, mesh=mesh)


def wrap(prepared: nn.Module, parameters: Mapping[str, nn.Parameter], device: torch.device, some_idle: bool) -> Any:
    """The module that exchanges gradients of ``parameters``: DDP around it, or itself where it is sharded.

    ``some_idle`` says that a forward may leave some of the parameters out.
    """
    if count() == 1 or is_sharded(prepared):
        return prepared
    trained = {id(p) for p in parameters.values()}
    for p in prepared.parameters():  # DDP waits for the gradient of everything that asks for one
        p.requires_grad_(id(p) in trained)
    return DistributedDataParallel(
        prepared,
        device_ids=None if device.type == "cpu" else [device],
        find_unused_parameters=some_idle,
    )


@contextlib.contextmanager
def exchanging(run: Any, now: bool) -> Iterator[None]:
    """Within it a backward exchanges gradients only if ``now``: those before a step's last one need not."""
    if now or count() == 1:
        yield
    elif isinstance(run, DistributedDataParallel):
        with run.no_sync():
            yield
    else:
        run.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            run.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """A shard's whole tensor, which all processes must ask for; another tensor itself."""
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as ``model`` is, on its device."""
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


class Unsharded:
    """Puts whole tensors in the place of a module's sharded parameters, for saving.

    Args:
        module: has ``parameters``, which are sharded or not.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._module = module
        names = {id(p): name for name, p in parameters.items() if isinstance(p, DTensor)}
        self._places = [
            (owner, key, names[id(p)])
            for owner in module.modules()
            for key, p in owner._parameters.items()
            if p is not None and id(p) in names
        ]

    @contextlib.contextmanager
    def __call__(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it each parameter is the tensor of its name."""
        if isinstance(self._module, FSDPModule):
            self._module.reshard()  # gathered after an evaluation; a state_dict of a part would put the shards back
        before = [owner._parameters[key] for owner, key, _ in self._places]
        for owner, key, name in self._places:
            owner._parameters[key] = nn.Parameter(tensors[name])
        try:
            yield
        finally:
            for (owner, key, _), parameter in zip(self._places, before, strict=True):
                owner._parameters[key] = parameter
