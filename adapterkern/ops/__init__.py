"""The operator: torch and triton only.

operator.py      ``adapter()``
normed.py        ``adapter_and_norm()``: the adapter and the RMSNorm that reads its y
registered.py    what PyTorch sees of it: schema, implementations, fake, autograd, autocast
choice.py        which implementation runs, and why
checks.py        what an input may be
call.py          a call's settings, for the implementations over rows
reference.py     the equations: definition, oracle, baseline
stock.py         eager PyTorch's casts and mixed batches
closed_form.py   the operator from ATen operations: fp64, and where nothing native fits
native.py        the CPU kernel's door (csrc/adapter_cpu.h)
native_normed.py the same with a sum before the adapter and the RMSNorm behind it; triton_normed.py on a GPU
readable.py      tensors as that kernel reads them
rows.py          from any shape and several adapters to the rows of one, for these two
kept.py          what is made of parameters, kept until they change
kernels/         Triton, and the door of csrc/adapter_cluster.h
index.py         whose index values are known, so that no call checks or sorts them again
dropout.py       the mask of dropout, from a seed and a position
graphs.py        whether a CUDA graph is being recorded
"""

from adapterkern.ops.checks import MAX_ADAPTER_DIM
from adapterkern.ops.choice import backend, fused_enabled, kernels_asked
from adapterkern.ops.kept import parameters_changed
from adapterkern.ops.normed import adapter_and_norm
from adapterkern.ops.operator import adapter

__all__ = [
    "MAX_ADAPTER_DIM",
    "adapter",
    "adapter_and_norm",
    "backend",
    "fused_enabled",
    "kernels_asked",
    "parameters_changed",
]
