"""Accelerate, set up for one run: autocast and the gradient scaler, on the device where the model already is."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from torch import nn

from adapterkern.model.decoder import modes_kept

_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(precision: str, device: torch.device) -> Accelerator:
    """An ``Accelerator`` that trains on ``device`` in ``precision`` and moves nothing.

    Raises:
        NotImplementedError: FSDP or Megatron, as accelerate does them.
    """
    mixed = _ACCELERATE_NAMES[precision]
    # accelerate keeps one state a process and refuses another precision or device in it. A second run may well want one
    # (fp32 today, bf16 in the next cell), and transformers' TrainingArguments starts anew in the same way.
    shared = AcceleratorState._shared_state
    if shared:
        state = AcceleratorState()
        if (state.mixed_precision, state.device.type) != (mixed, device.type):
            AcceleratorState._reset_state(reset_partial_state=state.device.type != device.type)
    # accelerate does not look for DeepSpeed where it is told to use the CPU.
    cpu = device.type == "cpu" and not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    # A plugin goes before ACCELERATE_GRADIENT_ACCUMULATION_STEPS, by which accelerate would divide every gradient.
    whole = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(
        mixed_precision=mixed, cpu=cpu, device_placement=False, gradient_accumulation_plugin=whole
    )
    accelerator.sync_gradients = True  # of the whole process too: a loop of the user's own may have left it off
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        engine = accelerator.distributed_type.value
        raise NotImplementedError(
            f"train: expected processes without an engine of accelerate's own, got {engine}: "
            "launch them as for DDP, and set shard=True (--shard) for FSDP2"
        )
    if precision == "fp16" and accelerator.scaler is None:
        # On a CPU accelerate takes mixed_precision="fp16" and then trains in fp32 without a word. torch has both parts.
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler(device.type)
    return accelerator


@contextlib.contextmanager
def left_as_found(module: nn.Module) -> Iterator[None]:
    """After it the module has its own forward again, which ``prepare_model`` wraps in autocast for good, and its modes.

    Also when something raises within it.
    """
    names = ("forward", "_original_forward")
    forward = {name: vars(module)[name] for name in names if name in vars(module)}
    try:
        with modes_kept(module):
            yield
    finally:
        for name in names:
            vars(module).pop(name, None)
        vars(module).update(forward)
