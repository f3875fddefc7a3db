"""What one of two processes receives in a step, and what it holds: counted from the collectives and the tensors."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapterkern as ak
from adapterkern.model.memory import Shape, Training
from adapterkern.model.scale import Scale
from adapterkern.training import train
from adapterkern.training.loop import Run
from tests.support import tiny_run

SHAPE = Shape(32, 4, 64, 4, 2, 8, 128)  # of tiny_run
SMALL = 100  # bytes of an all-reduce or broadcast: a loss, a norm, positions; gradients have more
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# 7 rows are cut into 4 and 3; adapters from the first layer on, and above
DDP = {
    "plain": {"adapter_dim": 7, "layers": (2, 3)},
    "two forwards": {"adapter_dim": 7, "layers": (2, 3)},
}
ZERO, PERSISTENT = ("plain", "all layers", "checkpointed"), (0, 300)
SHARDED: dict[str, dict[str, Any]] = DDP | {
    "bf16": {"adapter_dim": 7, "layers": (1, 3)},
    "checkpointed": {"adapter_dim": 7, "layers": (1, 3)},
    "all layers": {"adapter_dim": 5, "layers": (0, 1, 2, 3), "depth": 2, "learned_scale": True},
    "attention": {"adapter_dim": 4, "layers": (2,), "position": "attention", "layer_norm": False},
    "prompts": {"kind": "prompt", "adapter_dim": 64, "prompt_length": 5, "layers": (2, 3), "prompt_gate": "head"},
    "biases": {"adapter_dim": 4, "layers": (3,), "bias_scale": True},
}


def scale(adapter: dict[str, Any], dtype: str = "fp32", full: bool = False) -> Scale:
    config = ak.AdapterConfig(**adapter).resolve(SHAPE.hidden_size, SHAPE.num_layers, SHAPE.inside)
    return Scale(Training(SHAPE, config, 16, 16, dtype), 2, full)


class Received(TorchDispatchMode):
    """Bytes that this process receives, of two, by a collective's name; and the most that FSDP2 holds gathered."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}
        self.gathered = 0
        states = [m._get_fsdp_state() for m in module.modules() if isinstance(m, FSDPModule)]
        self._groups: list[Any] = [state._fsdp_param_group for state in states]

    def _held(self) -> int:
        """Bytes of whole parameters, and of the buffers that they are gathered in."""
        held = [out for group in self._groups for p in group.fsdp_params for out in p.all_gather_outputs]
        results = [group._all_gather_result for group in self._groups]
        waiting = [getattr(group.comm_ctx, "all_gather_state", None) for group in self._groups]
        results += [state.all_gather_result for state in waiting if state is not None]
        held += [result.all_gather_output for result in results if result is not None]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathered = max(self.gathered, self._held())
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.name().split("::")[1].strip("_")
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            count = max(t.nbytes for t in tensors)  # of the whole, of which half is its own
            if name in ("allgather_base", "reduce_scatter_base"):
                self.bytes[name] = self.bytes.get(name, 0) + count // 2
            elif count > SMALL:  # an all-reduce goes twice
                self.bytes[name] = self.bytes.get(name, 0) + count
        return func(*args, **(kwargs or {}))


def _local(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def step(adapter: dict[str, Any], name: str = "", dtype: str = "fp32", **values: Any) -> dict[str, Any]:
    """What a training's last step exchanges, and the bytes that its tensors take."""
    model = tiny_run.model(**adapter)
    model.base.to(DTYPES[dtype])
    found: dict[str, Any] = {}
    counted = Run._step

    def count(self: Run[Any], examples: Any) -> None:
        with Received(self.engine.run) as received:
            counted(self, examples)
        found.update(received=received.bytes, gathered=received.gathered)
        found["weights"] = sum(_local(p) for p in self.model.base.parameters())
        moments = [state[key] for state in self.engine.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        learned = list(self.engine.parameters.values())
        found["trained"] = sum(_local(t) for t in moments) + 2 * sum(_local(t) for t in learned)  # and their gradients
        if hasattr(self.engine.run, "_get_ddp_logging_data"):
            found["buckets"] = self.engine.run._get_ddp_logging_data()["bucket_sizes"]

    sizes = {"batch_size": 1, "accumulation": 4} if name == "two forwards" else {"batch_size": 2, "accumulation": 2}
    more = {"precision": dtype, "checkpoint_activations": name == "checkpointed", "epochs": 4, "max_steps": 3} | sizes
    rows = [{"text": row["text"]} for row in tiny_run.rows(4)]
    config = tiny_run.quiet(task="causal-lm", **more | values)
    with mock.patch.object(Run, "_step", count):
        train(model, rows, config, tokenizer=tiny_run.tokenizer())
    return found


def full(dtype: str) -> dict[str, Any]:
    """Full fine-tuning under torch's FSDP2, without anything of ours: fp32 parameters, computed in ``dtype``."""
    llama: Any = tiny_run.model().base
    mesh, policy = init_device_mesh("cpu", (2,)), MixedPrecisionPolicy(DTYPES[dtype])
    for layer in llama.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(llama, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(llama.requires_grad_(True).parameters())
    ids = torch.arange(32).view(2, 16)
    for _ in range(2):
        with Received(llama) as received:
            nn.functional.cross_entropy(llama(ids).logits.flatten(0, 1).float(), ids.flatten()).backward()
            optimizer.step()
    states = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    states += [t for p in llama.parameters() for t in (p, p.grad)]
    found = {"received": received.bytes, "gathered": received.gathered}
    return found | {"trained": sum(map(_local, states)), "weights": 0}


def work() -> dict[str, Any]:
    """Under DDP and FSDP2."""
    found = {f"ddp {name}": step(adapter, name) for name, adapter in DDP.items()}
    for name, adapter in SHARDED.items():
        found[f"shard {name}"] = step(adapter, name, "bf16" if name == "bf16" else "fp32", shard=True)
    return found | {f"full {dtype}": full(dtype) for dtype in DTYPES}


def zero_work(persistent: int) -> dict[str, Any]:
    """Under ZeRO-3, which keeps nothing gathered meanwhile; ``persistent`` as in ``Scale.exchanged``."""
    from adapterkern.training.parallel.deepspeed import Zero

    nothing = dict.fromkeys(("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"), 0)
    own = Zero._settings

    def settings(self: Zero) -> dict[str, Any]:
        found = own(self)
        more = nothing | {"param_persistence_threshold": persistent}
        found["zero_optimization"] |= {f"stage3_{name}": value for name, value in more.items()}
        return found

    with mock.patch.object(Zero, "_settings", settings):
        return {name: step(SHARDED[name], name) for name in ZERO}
