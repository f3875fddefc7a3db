"""DeepSpeed's ZeRO as the engine of a run: moments and gradients sharded over ranks, at stage 3 the backbone too.

``accelerate launch`` with one of ``docs/accelerate/zero*.yaml`` selects it. Stages 1 and 2 shard the state of the
trained parameters, which is small for adapters; stage 3 is for a backbone that does not fit on one device.

ZeRO keeps the trained parameters in flat fp32 buffers. Each rank has a shard of them, and ClippedAdamW steps on that
shard, so the global norm and the clipping are DeepSpeed's. Checkpoints are gathered from the shards and are the same as
without DeepSpeed: a run of two processes under ZeRO resumes on one without it, and the reverse. With
``precision="bf16"`` DeepSpeed casts the whole module, adapters included, and keeps fp32 copies in the buffers.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from adapterkern.model.copies import has_tied_copies
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.parallel.engine import Engine
from adapterkern.training.parallel.extension import waits_told
from adapterkern.training.run.checkpoint import Gathered
from adapterkern.training.task import Task

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Engine):
    """An engine over DeepSpeed, configured by accelerate's plugin."""

    def check(self, task: Task[Any], config: TrainConfig) -> None:
        """Raise ``ValueError`` or ``NotImplementedError`` for settings that conflict or are not supported."""
        super().check(task, config)
        settings = self._settings()
        for name in ("optimizer", "scheduler"):
            if name in settings:
                raise ValueError(
                    f"{name}: expected none in DeepSpeed's configuration, because TrainConfig sets it; got one"
                )
        zero = settings["zero_optimization"]
        if zero["stage"] not in (1, 2, 3):
            raise ValueError(f"zero_optimization.stage: expected 1, 2 or 3, got {zero['stage']!r}")
        for name in ("offload_optimizer", "offload_param"):
            if (device := zero.get(name, {}).get("device", "none")) != "none":
                raise NotImplementedError(f"zero_optimization.{name}: expected the device 'none', got {device!r}")
        if config.shard:
            raise ValueError("shard: expected False under DeepSpeed, whose stage 3 shards the backbone; got True")
        if config.compile:
            raise ValueError("compile: expected False under DeepSpeed, got True")
        if config.best is not None:
            raise NotImplementedError(f"best: expected a run without DeepSpeed, got {config.best!r:.80} under it")
        if config.precision == "fp16":
            raise ValueError("precision: expected fp32 or bf16 under DeepSpeed, got fp16")
        dtypes = {p.dtype for p in task.parameters()}
        if config.precision == "fp32" and dtypes != {torch.float32}:
            raise ValueError(f"precision: expected bf16 under DeepSpeed for parameters of {dtypes}, got fp32")
        if zero["stage"] == 3 and has_tied_copies(task.model.base):
            raise NotImplementedError(
                "modules_to_save: expected no tied embeddings under ZeRO-3, which gathers a parameter for the module "
                "that has it; use stage 2, or shard=True without DeepSpeed"
            )
        if config.adapter_drop:
            raise NotImplementedError(
                f"adapter_drop: expected 0 under DeepSpeed, whose forwards all run the same modules, got "
                f"{config.adapter_drop}"
            )
        if not task.uniform:
            name = type(task).__name__
            raise NotImplementedError(
                f"task: expected one whose forwards all run the same modules (uniform), got {name}"
            )

    def make_optimizer(self) -> Any:
        return self.task.optimizer(self.parameters, dataclasses.replace(self.config, max_norm=math.inf))

    def _settings(self) -> dict[str, Any]:
        return self.accelerator.state.deepspeed_plugin.deepspeed_config

    def start(self) -> None:
        self.task.zero_grad()
        self._require_trained_only()
        rows = self.config.batch_size
        self._settings().update(
            train_batch_size=rows * processes.world_size(),  # this and the next only feed DeepSpeed's statistics
            train_micro_batch_size_per_gpu=rows,
            gradient_accumulation_steps=1,  # `backward` marks a step's last one itself
            gradient_clipping=0.0 if math.isinf(self.config.max_norm) else self.config.max_norm,
        )
        if self.config.precision == "bf16":  # bf16 parameters meet fp32 activations: norms, a head's mean
            autocast = torch.autocast(self.task.model.device.type, torch.bfloat16)
            self.task.forward = autocast(self.task.forward)  # type: ignore[method-assign]
        loaded = {name: self.optimizer.state.pop(p) for name, p in self.parameters.items() if p in self.optimizer.state}
        with waits_told():  # it compiles extensions
            self.run, stepper = self.accelerator.prepare(self.task, self.optimizer)
        self._zero = stepper.optimizer
        self._make_state(loaded)

    def _make_state(self, loaded: dict[str, dict[str, Tensor]]) -> None:
        """Optimizer state for this rank's flat shards: zeros, or a checkpoint's moments."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

        split = self._settings()["zero_optimization"]["stage"] == 3
        flat = self._zero.fp32_partitioned_groups_flat if split else self._zero.single_partition_of_fp32_groups
        # ClippedAdamW would create it in the first step. But DeepSpeed links it to the parameters once the first
        # *group* has stepped, when the other groups would have none yet.
        steps = max((state["step"].item() for state in loaded.values()), default=0.0)
        for part in flat:
            self.optimizer.state[part] = {key: torch.zeros_like(part) for key in _MOMENTS}
            self.optimizer.state[part]["step"] = torch.tensor(steps, device=part.device)
        if not split:
            for members, part in zip(self._zero.bit16_groups, flat, strict=True):
                lazy_init_hp_params_optimizer_state(members, part, self.optimizer.state)
        for name, state in loaded.items():
            for key in _MOMENTS:
                safe_set_full_optimizer_state(self.parameters[name], state[key], key)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.run.set_gradient_accumulation_boundary(is_boundary=last)
        self.run.backward(loss * processes.world_size())

    def step(self, loss: Tensor) -> Tensor | None:
        self.optimizer.found_inf = (~loss.isfinite()).float()
        self.run.step()
        norm = math.inf if self._zero.overflow else self.run.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=loss.device)

    def gathered(self) -> Gathered:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameters = {name: safe_get_full_fp32_param(p) for name, p in self.parameters.items()}
        step = next(iter(self.optimizer.state.values()))["step"]
        if not step:
            return Gathered(parameters, {})
        return Gathered(
            parameters,
            {
                name: {key: safe_get_full_optimizer_state(p, key) for key in _MOMENTS} | {"step": step}
                for name, p in self.parameters.items()
            },
        )
