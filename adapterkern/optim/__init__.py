"""The optimizer: torch and csrc only.

clipped_adamw.py   the torch.optim.Optimizer
backends.py        the extension's passes; torch's fused AdamW where it is missing
"""

from adapterkern.optim.backends import backend
from adapterkern.optim.clipped_adamw import ClippedAdamW

__all__ = ["ClippedAdamW", "backend"]
