"""What test_zero.py has two processes do under DeepSpeed's ZeRO, each stage in turn."""

import logging
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from accelerate.state import AcceleratorState

from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.training import NonFiniteError, train
from adapterkern.training.parallel.deepspeed import Zero
from adapterkern.training.task import Task
from tests.support import exchanged, tiny_run
from tests.support.tiny_qa import shared_run
from tests.support.two_processes import ROWS, run


def blow_up() -> list[bool]:
    """Whether each trained parameter is as before a step whose loss is infinite."""
    before: list[torch.Tensor] = []
    engines: list[Zero] = []
    start, forward = Zero.start, Task.forward

    def look(self: Zero) -> None:
        start(self)
        engines.append(self)
        before.extend(p.clone() for p in self.gathered().parameters.values())

    def infinite(self: Task, *args: Any, **kwargs: Any) -> Any:
        loss, correct = forward(self, *args, **kwargs)
        return loss + math.inf, correct  # with finite gradients

    patches = mock.patch.object(Zero, "start", look), mock.patch.object(Task, "forward", infinite)
    with patches[0], patches[1], pytest.raises(NonFiniteError, match="the loss is inf; the step was not applied"):
        run(None, max_steps=1, warmup=0.0)
    return [torch.equal(a, b) for a, b in zip(before, engines[0].gathered().parameters.values(), strict=True)]


def work(rank: int, folder: Path) -> dict[str, Any]:
    logging.disable(logging.WARNING)  # DeepSpeed's log
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute's compilation, to replace gloo
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    found: dict[str, Any] = {}
    for stage in (2, 3):
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
        AcceleratorState._reset_state()
        name = f"zero{stage}"
        found[name] = run(folder / name).metrics
        run(folder / f"{name} bf16", precision="bf16")
        run(folder / f"one to {name}", resume=True)
        run(folder / f"{name} causal-lm", task="causal-lm")
        run(folder / f"{name} modules", modules=("embed_tokens", "layers.3.mlp"))
        found[f"{name} qa"] = shared_run()
        found[f"{name} qa bf16"] = shared_run(precision="bf16")
        found[f"{name} infinite"] = blow_up()

    AcceleratorState._reset_state()
    found["exchanged"] = {persistent: exchanged.zero_work(persistent) for persistent in exchanged.PERSISTENT}

    multitask = tiny_run.model()
    zero = {"stage": 3}
    for name, values, settings in (
        ("shard", {"shard": True}, {}),
        ("compile", {"compile": True}, {}),
        ("fp16", {"precision": "fp16"}, {}),
        ("bf16 backbone", {"dtype": torch.bfloat16}, {}),
        ("task", {"task": MultiTask(multitask, ["default"])}, {}),
        ("optimizer", {}, {"optimizer": {"type": "AdamW"}}),
        ("offload", {}, {"zero_optimization": zero | {"offload_param": {"device": "cpu"}}}),
        ("stage", {}, {"zero_optimization": zero | {"stage": 0}}),
    ):
        expected = {"zero_optimization": zero} | settings
        with mock.patch.object(Zero, "_settings", lambda self, expected=expected: expected):
            try:
                if "task" in values:
                    rows = {"default": ROWS}
                    train(multitask, rows, tiny_run.quiet(), tokenizer=tiny_run.tokenizer(), **values)
                else:
                    run(None, **values)
            except (ValueError, NotImplementedError) as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found
