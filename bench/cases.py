"""What is measured: a case says what the work is, a variant is one way to do it.

A case states shape, dtype, bytes and FLOPs once, from the mathematics; every variant is judged by the same figures,
whatever it moves itself. A variant carries its error against fp64 and the budget for it: one that is over budget
has no speed worth showing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

COPY = "copy"  # the variant that moves a case's floor bytes and does nothing else


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work.

    ``floor_bytes`` is what any implementation has to read and write in device memory, 0 where that is no useful
    bound; ``flops`` what the mathematics asks for. ``wall`` cases are timed by the host's clock with everything that
    the host does (a training step), the others by the device's own.
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

    ``clock`` replaces the timer where the work happens in another process: it runs once and returns seconds.
    ``info`` goes into the results as it is. ``missing`` says why a variant cannot run here, and then ``run`` is None;
    ``failed`` that it should have. ``close`` is called when its case is over.
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
        """One that raised while it was made: the others of its case are measured all the same."""
        return cls(name, missing=f"{type(error).__name__}: {error}", failed=True)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in fp64 (over 1 where the expected is zero)."""
    expected = expected.detach().double()
    size = expected.norm()
    return ((got.detach().double() - expected).norm() / (size if size > 0 else 1)).item()


def error_budget(eager: float, dtype: torch.dtype) -> float:
    """Twice eager PyTorch's own error in the same dtype, plus one ULP of 16 bits or some eight of fp32."""
    return 2 * eager + max(torch.finfo(dtype).eps, 1e-6)
