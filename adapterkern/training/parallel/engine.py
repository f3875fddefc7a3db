"""How a step runs in one process, or in several under DDP or FSDP2. ``deepspeed.py`` does the same under DeepSpeed.

DDP keeps the whole backbone in each process. FSDP2 (``shard``) keeps a shard of every parameter and gathers a layer's
parameters when it runs. Both *average* gradients, so the loss is multiplied by the number of processes beforehand.
FSDP2 shards each parameter separately (nothing is flattened, so frozen and trained parameters may differ in dtype), and
ClippedAdamW sums its norm over the shards.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
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
    """The trained parameters of a run, their optimizer, and how a step updates them.

    Before ``start``, a checkpoint may be loaded into ``parameters``, ``optimizer`` and ``schedule``.

    Attributes:
        parameters: the trained parameters, by name.
        optimizer, schedule: for these parameters.
        run: the prepared task, to be called instead of ``task``; set by ``start``.
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
        self._required_grad = [p for p in task.parameters() if p.requires_grad]
        self._places = self._find_places()

    def check(self, task: Task[Any], config: TrainConfig) -> None:
        """Raise ``ValueError`` for settings that this engine does not support."""
        if processes.world_size() == 1 and config.shard:
            raise ValueError("shard: expected several processes (torchrun, accelerate launch), got one")
        if config.shard and task.model.quantization_method is not None:
            raise ValueError("shard: expected a backbone that is not quantized, whose parameters are plain tensors")
        if config.shard and config.precision == "fp16":
            raise ValueError(
                "precision: expected fp32 or bf16 with shard=True, got fp16, whose scaler does not support shards"
            )

    def make_optimizer(self) -> Any:
        return self.task.optimizer(self.parameters, self.config)

    def start(self) -> None:
        """Build ``run``, after a checkpoint may have been loaded."""
        self.task.zero_grad()  # gradients left by an earlier run's interrupted step, for example
        # The schedule has wrapped optimizer.step; accelerate must add its own wrapper after that.
        self._stepper = self.accelerator.prepare_optimizer(self.optimizer)
        self.run = self.accelerator.prepare_model(self.task, evaluation_mode=True)
        if processes.world_size() == 1 or self.config.shard:
            return
        self._require_trained_only()
        device = self.task.model.device
        self.run = DistributedDataParallel(
            self.run,
            device_ids=None if device.type == "cpu" else [device],
            find_unused_parameters=not self.task.trains_all or self.config.adapter_drop > 0,
        )

    def _require_trained_only(self) -> None:
        """Set ``requires_grad`` of the trained parameters alone: engines wait for the gradient of all that have it."""
        trained = {id(p) for p in self.parameters.values()}
        for p in self.task.parameters():
            p.requires_grad_(id(p) in trained)

    def end(self) -> None:
        """Restore ``requires_grad``, and drop all gradients."""
        self.task.zero_grad()
        for p in self._required_grad:
            p.requires_grad_(True)

    # A step

    def forward(self, inputs: Any, last: bool) -> Any:
        """``run(inputs)``. DDP decides in it, not in ``backward``, whether that will exchange gradients."""
        alone = isinstance(self.run, DistributedDataParallel) and not last
        with self.run.no_sync() if alone else contextlib.nullcontext():
            return self.run(inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of this rank's share of the loss; after the ``last`` one every rank has the sum."""
        kept_back = self.config.shard and not last
        if kept_back:
            self.run.set_requires_gradient_sync(False)
        try:
            self.accelerator.backward(loss * processes.world_size())
        finally:
            if kept_back:
                self.run.set_requires_gradient_sync(True)

    def step(self, loss: Tensor) -> Tensor | None:
        """Update the parameters; no change if ``loss`` or the gradient norm is not finite.

        Returns:
            the global norm of the gradient before clipping; None if the fp16 scaler skipped the step.
        """
        # An infinite loss can have finite gradients. `found_inf` makes the optimizer skip the step without a host sync.
        self.optimizer.found_inf = (~loss.isfinite()).float()
        self._stepper.step()
        skipped = self._stepper.step_was_skipped
        self._stepper.zero_grad()
        return None if skipped else self.optimizer.grad_norm

    # Saving

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the trained parameters these values, which are gathered ones; a collective."""
        if isinstance(self.task, FSDPModule):
            self.task.reshard()  # what was gathered for a forward would be of the values before
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(processes.sharded_like(tensors[name], parameter))

    def gathered(self) -> Gathered:
        """Parameters and optimizer state gathered from all ranks, a collective."""
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
        """Inside the block the module has ``tensors``, by name, as its trained parameters: for saving."""
        if isinstance(self.task, FSDPModule):
            self.task.reshard()  # gathered since the last forward; a state_dict would reshard then, and undo this
        before = [owner._parameters[key] for owner, key, _ in self._places]
        for owner, key, name in self._places:
            owner._parameters[key] = nn.Parameter(tensors[name], requires_grad=False)
        try:
            yield
        finally:
            for (owner, key, _), parameter in zip(self._places, before, strict=True):
                owner._parameters[key] = parameter
