"""Who steps: one process, or several under DDP or FSDP2. ``zero.py`` has DeepSpeed's ZeRO behind the same methods.

DistributedDataParallel has the whole backbone in each process; FSDP2 (``shard``) a part of every parameter, and gathers
a layer's when it comes to it. Both *average* gradients, and so a loss is multiplied by the number of processes
beforehand. Under FSDP2 each parameter is split by itself (nothing is flattened, so frozen and trained ones may differ
in dtype), and ClippedAdamW adds its norm up over the shards.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.optimization import make_schedule
from adapterkern.training.run.checkpoint import Gathered
from adapterkern.training.task import Task


class Engine:
    """What a run trains, and how one step of it is made.

    Between the making and :meth:`start` a checkpoint may be loaded into ``parameters``, ``optimizer`` and ``schedule``.

    Attributes:
        parameters: what is trained, by name.
        optimizer, schedule: over them.
        run: the task as it is to be called, after :meth:`start`.
    """

    run: Any

    def __init__(self, task: Task[Any], config: TrainConfig, accelerator: Accelerator, total_steps: int) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        self.check(task, config)
        if config.shard:
            mesh = init_device_mesh(task.model.device.type, (processes.world_size(),))
            for layer in task.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(task, mesh=mesh)
        self.parameters = task.trained(config)
        self.optimizer = self.make_optimizer()
        self.schedule = make_schedule(self.optimizer, config, total_steps)
        self._asked = [p for p in task.parameters() if p.requires_grad]
        self._places = self._find_places()

    def check(self, task: Task[Any], config: TrainConfig) -> None:
        """Raise what cannot be trained in this way."""
        if processes.world_size() == 1 and config.shard:
            raise ValueError("shard: expected several processes (torchrun, accelerate launch), got one")
        if config.shard and config.precision == "fp16":
            raise ValueError("precision: expected fp32 or bf16 with shard=True, got fp16, whose scaler knows no shards")

    def make_optimizer(self) -> Any:
        return self.task.optimizer(self.parameters, self.config)

    def start(self) -> None:
        """Put the module together that exchanges gradients, now that everything has its value."""
        self.task.zero_grad()  # of whatever was before, an earlier run's broken step for one
        # The schedule wraps optimizer.step, and accelerate must find that wrapper when it adds its own.
        self._stepper = self.accelerator.prepare_optimizer(self.optimizer)
        self.run = self.accelerator.prepare_model(self.task, evaluation_mode=True)
        if processes.world_size() == 1 or self.config.shard:
            return
        self._ask_for_trained_only()
        device = self.task.model.device
        self.run = DistributedDataParallel(
            self.run,
            device_ids=None if device.type == "cpu" else [device],
            find_unused_parameters=not self.task.trains_all,
        )

    def _ask_for_trained_only(self) -> None:
        """Let nothing else ask for a gradient: the engines wait for that of everything that does."""
        trained = {id(p) for p in self.parameters.values()}
        for p in self.task.parameters():
            p.requires_grad_(id(p) in trained)

    def end(self) -> None:
        """What asked for a gradient before the run does so again; none is left."""
        self.task.zero_grad()
        for p in self._asked:
            p.requires_grad_(True)

    # A step

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of this process's part of the step's loss; after the ``last`` one all have the sum."""
        with self._exchanging(last):
            self.accelerator.backward(loss * processes.world_size())

    @contextlib.contextmanager
    def _exchanging(self, now: bool) -> Iterator[None]:
        """Within it a backward exchanges gradients only if ``now``: those before a step's last one need not."""
        if now or processes.world_size() == 1:
            yield
        elif isinstance(self.run, DistributedDataParallel):
            with self.run.no_sync():
                yield
        else:
            self.run.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                self.run.set_requires_gradient_sync(True)

    def step(self, loss: Tensor) -> Tensor | None:
        """Make the step, or leave everything as it was where ``loss`` or the norm is not finite.

        Returns the gradient's global norm; None where fp16's scaler skipped the step.
        """
        # An infinite loss can have finite gradients: the optimizer is told to leave that step out, on the device.
        self.optimizer.found_inf = (~loss.isfinite()).float()
        self._stepper.step()
        skipped = self._stepper.step_was_skipped
        self._stepper.zero_grad()
        return None if skipped else self.optimizer.grad_norm

    # Saving

    def gathered(self) -> Gathered:
        """Parameters and optimizer state gathered from all ranks, which must all ask for it."""
        states = {name: self.optimizer.state[p] for name, p in self.parameters.items() if p in self.optimizer.state}
        return Gathered(
            {name: processes.gathered(p.detach()) for name, p in self.parameters.items()},
            {name: {key: processes.gathered(t) for key, t in state.items()} for name, state in states.items()},
        )

    def _find_places(self) -> list[tuple[nn.Module, str, str]]:
        names = {id(p): name for name, p in self.parameters.items()}
        return [
            (owner, key, names[id(p)])
            for owner in self.task.modules()
            for key, p in owner._parameters.items()
            if p is not None and id(p) in names
        ]

    @contextlib.contextmanager
    def with_parameters(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Puts ``tensors``, by name, in the place of the module's parameters inside the block: for saving."""
        if isinstance(self.task, FSDPModule):
            self.task.reshard()  # gathered after an evaluation; a state_dict of a part would put the shards back
        before = [owner._parameters[key] for owner, key, _ in self._places]
        for owner, key, name in self._places:
            owner._parameters[key] = nn.Parameter(tensors[name], requires_grad=False)
        try:
            yield
        finally:
            for (owner, key, _), parameter in zip(self._places, before, strict=True):
                owner._parameters[key] = parameter
