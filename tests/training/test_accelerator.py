"""Accelerate, set up for several runs in one process."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator, DistributedType

from adapterkern.training.parallel.accelerator import make_accelerator

CPU = torch.device("cpu")


@pytest.mark.parametrize("order", [("fp32", "bf16", "fp16"), ("fp16", "fp32", "bf16")])
def test_each_run_has_its_own_precision(order: tuple[str, ...]) -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for precision in order:
        accelerator = make_accelerator(precision, CPU)
        layer = accelerator.prepare_model(torch.nn.Linear(4, 4))
        with accelerator.autocast():
            product = torch.ones(2, 4) @ layer.weight
        assert product.dtype == dtypes[precision]
        assert (accelerator.scaler is not None) == (precision == "fp16")
        assert layer(torch.ones(2, 4)).dtype == torch.float32  # accelerate returns outputs in fp32


def test_gradients_are_not_divided_by_the_environment_s_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    Accelerator(cpu=True).sync_gradients = False  # as a user's own loop may leave it
    accelerator = make_accelerator("fp32", CPU)
    x = torch.ones(1, requires_grad=True)
    accelerator.backward(x.sum())
    assert x.grad == 1
    assert accelerator.sync_gradients


@pytest.mark.parametrize("engine", ["FSDP", "MEGATRON_LM"])
def test_engines_that_would_not_work_are_refused(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(engine))
    with pytest.raises(NotImplementedError, match=f"got {engine}: .* set shard=True"):
        make_accelerator("fp32", CPU)


LAST = """
import atexit, torch, torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))  # runs after all that are registered later
from adapterkern.training.parallel.accelerator import make_accelerator
{before}
make_accelerator("fp32", torch.device("cpu"))
assert dist.is_initialized()
"""


@pytest.mark.parametrize(("before", "left"), [("", False), ("dist.init_process_group('gloo')", True)])
def test_a_group_that_a_run_has_made_is_left_before_the_interpreter_ends(before: str, left: bool) -> None:
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    started = [sys.executable, "-c", LAST.format(before=before)]
    done = subprocess.run(started, env=os.environ | one, capture_output=True, text=True, check=True)
    assert done.stdout == f"{left}\n"
