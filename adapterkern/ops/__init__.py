"""The operator: torch and triton only.

operator.py      ``adapter()``: schema, fake, autograd, autocast; index.py, graphs.py: what it may keep between calls
checks.py        what an input may be
reference.py     the equations: definition, oracle, baseline
closed_form.py   the operator from ATen operations: fp64, and where nothing native fits
kernels/         Triton
"""

from adapterkern.ops.operator import MAX_ADAPTER_DIM, adapter, backend, fused_enabled

__all__ = ["MAX_ADAPTER_DIM", "adapter", "backend", "fused_enabled"]
