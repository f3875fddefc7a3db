"""The optimizer: torch and csrc only.

clipped_adamw.py   the ``torch.optim.Optimizer``: arguments, the step, state
plan.py            which tensors a step reads, and whether that is still true
backends.py        the extension's passes; torch's fused AdamW where the extension is missing
"""

from adapterkern.optim.backends import backend
from adapterkern.optim.clipped_adamw import ClippedAdamW

__all__ = ["ClippedAdamW", "backend"]
