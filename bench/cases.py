"""What is measured: a case is a piece of work, a variant is one way to do it.

A case states shape, dtype, bytes and FLOPs once, from the formula; every variant is judged by these figures, whatever
it moves itself. A variant has its error against fp64 and the budget for it; over budget, no speed is shown.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

COPY = "copy"  # the variant that only moves the case's floor bytes


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work.

    ``floor_bytes``: bytes of device memory that any implementation must read and write, or 0 where that is no useful
    bound. ``flops``: floating-point operations of the formula. ``wall``: timed by the host's clock, with everything
    that the host does (a training step); other cases are timed by the device's clock.
    """

    part: str
    name: str
    shape: Mapping[str, Any] = dataclasses.field(hash=False)
    floor_bytes: int = 0
    flops: int = 0
    wall: bool = False


@dataclasses.dataclass
class Variant:
    """One way to do a case's work: ``run`` does it once.

    ``clock`` replaces the timer where another process does the work: it runs once and returns seconds. ``info`` is
    copied into the results. ``missing`` is the reason why a variant cannot run here (``run`` is None then), ``failed``
    whether that is an error. ``close`` is called when the case is over.
    """

    name: str
    run: Callable[[], object] | None = None
    error: float | None = None
    budget: float | None = None
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    clock: Callable[[], float] | None = None
    missing: str = ""
    failed: bool = False
    close: Callable[[], object] = lambda: None

    @classmethod
    def broken(cls, name: str, error: Exception) -> "Variant":
        """A variant that raised while it was built; the others of its case are still measured."""
        return cls(name, missing=f"{type(error).__name__}: {error}", failed=True)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in fp64 (the absolute error where ``expected`` is zero)."""
    expected = expected.detach().double()
    size = expected.norm()
    return ((got.detach().double() - expected).norm() / (size if size > 0 else 1)).item()


def error_budget(eager: float, dtype: torch.dtype) -> float:
    """Twice eager PyTorch's error in the same dtype, plus one ULP in 16 bits or about eight in fp32."""
    return 2 * eager + max(torch.finfo(dtype).eps, 1e-6)
