"""Accelerate set up for one run: autocast and the gradient scaler, on the device that the model is on."""

import atexit
import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from torch import nn

from adapterkern.model.decoder import modes_kept
from adapterkern.training.parallel.extension import waits_told

_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(precision: str, device: torch.device) -> Accelerator:
    """An ``Accelerator`` for ``device`` and ``precision`` that moves no module and no tensor.

    Raises:
        NotImplementedError: accelerate is configured for its own FSDP or Megatron-LM.
    """
    mixed = _ACCELERATE_NAMES[precision]
    # accelerate keeps one state per process and refuses another precision or device. A second run may need one (fp32,
    # then bf16 in the next notebook cell); transformers' TrainingArguments resets the state in the same way.
    shared = AcceleratorState._shared_state
    if shared:
        state = AcceleratorState()
        if (state.mixed_precision, state.device.type) != (mixed, device.type):
            AcceleratorState._reset_state(reset_partial_state=state.device.type != device.type)
    # With cpu=True accelerate ignores DeepSpeed.
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    cpu = device.type == "cpu" and not deepspeed
    # Overrides ACCELERATE_GRADIENT_ACCUMULATION_STEPS, by which accelerate would divide every gradient.
    undivided = GradientAccumulationPlugin(num_steps=1)
    grouped = _in_group()
    with waits_told() if deepspeed else contextlib.nullcontext():  # DeepSpeed compiles its collectives
        accelerator = Accelerator(
            mixed_precision=mixed, cpu=cpu, device_placement=False, gradient_accumulation_plugin=undivided
        )
    if _in_group() and not grouped:
        atexit.register(_leave_group)
    accelerator.sync_gradients = True  # process-wide state; a user's own loop may have left it False
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        engine = accelerator.distributed_type.value
        raise NotImplementedError(
            f"train: expected accelerate without an engine of its own, got {engine}: "
            "launch as for DDP, and set shard=True for FSDP2"
        )
    if precision == "fp16" and accelerator.scaler is None:
        # On a CPU accelerate accepts mixed_precision="fp16" and silently trains in fp32; torch supports it.
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler(device.type)
    return accelerator


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _leave_group() -> None:
    """End gloo's threads before Python's interpreter ends.

    One that then lets go of the last collective's tensors aborts the process (pytorch issue 190489). A mesh's group
    outlives this, in DTensor's caches. NCCL has no such threads, and its groups wait for each other.
    """
    if _in_group() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


@contextlib.contextmanager
def left_as_found(module: nn.Module) -> Iterator[None]:
    """On exit restores the module's training modes, and its ``forward``, which ``prepare_model`` wraps in autocast."""
    names = ("forward", "_original_forward")
    forward = {name: vars(module)[name] for name in names if name in vars(module)}
    try:
        with modes_kept(module):
            yield
    finally:
        for name in names:
            vars(module).pop(name, None)
        vars(module).update(forward)
