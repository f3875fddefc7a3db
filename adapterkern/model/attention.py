"""Which implementation of attention transformers runs in a backbone: a choice of speed and memory."""

from collections.abc import Collection
from typing import Any

import torch

from adapterkern import checks

CHOICES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
_ON_A_CPU = ("sdpa", "eager")


def check_attn(attn: str | None, device: torch.device, dtypes: Collection[str] = ()) -> None:
    """Raise what can be known before weights are read.

    Args:
        dtypes: those in which attention may run: the backbone's, and autocast's.

    Raises:
        ImportError: its package is not installed.
        ValueError: ``attn`` is unknown, or does not run on the device or in any of these dtypes.
    """
    if attn is None:
        return
    checks.choice("attn", attn, CHOICES)
    if attn in _ON_A_CPU:
        return
    if device.type == "cpu":
        raise ValueError(f"attn: expected one of {', '.join(_ON_A_CPU)} on a CPU, got {attn}, which needs a GPU")
    if not attn.startswith("flash"):
        return
    import transformers.utils

    number = attn[-1]
    available: Any = getattr(transformers.utils, f"is_flash_attn_{number}_available", lambda: False)
    if not available():
        package = "flash-attn" if number == "2" else f"flash_attn_{number}"
        raise ImportError(f"attn: expected {package} for {attn}, which transformers does not find installed")
    if dtypes and set(dtypes) == {"fp32"}:
        raise ValueError(f"attn: expected sdpa, eager or flex_attention in fp32, got {attn}, which has 16 bits alone")
