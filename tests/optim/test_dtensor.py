"""ClippedAdamW over DTensors in two processes: shards share one norm."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from adapterkern.optim import ClippedAdamW
from tests.support.optim_oracle import TILE, Oracle, parameters, set_grads, worst
from tests.support.pair import leave

pytestmark = pytest.mark.slow


def _sharded_run(rank: int, world: int, file: str) -> None:
    """DTensors of two placements beside a plain parameter: three buckets that share one norm."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    full = parameters([9, TILE + 2, 1, 5, 7])
    placements = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]
    sharded = [nn.Parameter(distribute_tensor(p.detach(), mesh, at)) for p, at in zip(full, placements, strict=False)]
    params = [*sharded, full[4]]
    optimizer, oracle = ClippedAdamW(params, lr=1e-3), Oracle(full)
    for step in range(4):
        grads = set_grads(full, step)
        for p, g, at in zip(sharded, grads, placements, strict=False):
            p.grad = distribute_tensor(g, mesh, at)
        norm = oracle.step(grads)
        if step == 2:  # one rank's infinity skips the step on all
            shard = sharded[1].grad.to_local()
            kept = shard.clone()
            if rank == 1:
                shard[0] = math.inf
            optimizer.step()
            assert optimizer.skipped == 1
            shard.copy_(kept)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    assert all(p._version >= 4 for p in params)  # a DTensor's own counter, not its shard's
    assert worst([p.full_tensor() if hasattr(p, "full_tensor") else p for p in params], oracle.params) < 1e-6
    leave()


def _fsdp_run(rank: int, world: int, file: str) -> None:
    """FSDP2 against the same model unsharded, with the state dict saved and loaded in between."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 70), nn.SiLU(), nn.Linear(70, 33))
    whole = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizers = [ClippedAdamW(m.parameters(), lr=1e-2, max_norm=0.01) for m in (model, whole)]
    for step in range(4):
        x = torch.randn(8, 33)
        model(x.chunk(world)[rank]).square().mean().backward()
        whole(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert optimizers[0].grad_norm.item() == pytest.approx(optimizers[1].grad_norm.item(), rel=1e-5)
        if step == 1:
            set_optimizer_state_dict(model, optimizers[0], get_optimizer_state_dict(model, optimizers[0]))
    sharded = [p.full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]  # fully_shard has made them DTensors
    assert worst(sharded, [p.detach().double() for p in whole.parameters()]) < 1e-4
    leave()


@pytest.mark.parametrize("run", [_sharded_run, _fsdp_run])
def test_dtensor_shards_share_one_norm(tmp_path: Path, run: Callable[[int, int, str], None]) -> None:
    torch.multiprocessing.spawn(run, (2, str(tmp_path / "rendezvous")), nprocs=2)
