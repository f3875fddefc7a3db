"""What a call of the operator has besides x and its parameters, for the implementations over rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from adapterkern.ops.dropout import Drop


class Call(NamedTuple):
    """The settings of one call over T rows, the same in its forward and its backward."""

    eps: float
    activation: str
    compute: torch.dtype  # of the products' operands and of z, which the backward goes by
    scale: Tensor | float = 1.0  # of one adapter: a Tensor without dimensions is learned
    gate: Tensor | None = None  # (T,)
    drop: Drop | None = None
