"""The operator's calls that are not plain, and their right values.

With a residual, with a scale, without LayerNorm, with a gate, with dropout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops.closed_form import stats_dtype
from adapterkern.ops.dropout import Drop
from adapterkern.ops.reference import Weights, adapter_eager
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error


class Case(NamedTuple):
    """The tensors of a call, and the gradient of its y."""

    x: Tensor
    weights: Weights
    residual: Tensor | None
    scale: Tensor | float
    dy: Tensor
    gate: Tensor | None = None  # (T,), or as the rows are
    dropout: float = 0.0

    def to(self, dtype: torch.dtype) -> "Case":
        def cast(t: Any) -> Any:
            return t.to(dtype) if isinstance(t, Tensor) else t

        x, weights, *others = self
        return Case(cast(x), Weights(*map(cast, weights)), *map(cast, others))

    def view(self, *shape: int) -> "Case":
        """The same with rows in another shape."""
        residual = None if self.residual is None else self.residual.view(shape)
        gate = None if self.gate is None else self.gate.view(shape[:-1])
        return self._replace(x=self.x.view(shape), residual=residual, dy=self.dy.view(shape), gate=gate)

    def leaves(self, *wanted: str) -> "Case":
        """The same with tensors of its own; those ``wanted`` by name, or all, require gradients."""

        def leaf(name: str, t: Any) -> Any:
            return t.detach().clone().requires_grad_(not wanted or name in wanted) if isinstance(t, Tensor) else t

        weights = Weights(*(leaf(name, t) for name, t in self.weights._asdict().items()))
        own = {name: leaf(name, getattr(self, name)) for name in ("x", "residual", "scale", "gate")}
        return self._replace(weights=weights, **own)

    def more(self) -> dict[str, Any]:
        """What a call takes besides x and the weights."""
        seed = SEED if self.dropout else None
        return {
            "residual": self.residual, "scale": self.scale, "gate": self.gate, "dropout": self.dropout, "seed": seed
        }  # fmt: skip

    def named(self) -> dict[str, Tensor]:
        """All tensors but dy."""
        given = {"x": self.x, **self.weights._asdict(), "residual": self.residual, "scale": self.scale}
        given["gate"] = self.gate
        return {name: t for name, t in given.items() if isinstance(t, Tensor)}


SEED = 1 << 40 | 5  # both halves of the key

# Whether there is LayerNorm, whether a residual, the scale, whether that is learned, whether a gate and dropout
VARIANTS = {
    "residual": (True, True, 1.0, False, False),
    "scale": (True, False, -1.7, False, False),
    "residual and a learned scale": (True, True, 1.3, True, False),
    "a learned scale of 0": (True, False, 0.0, True, False),
    "no LayerNorm": (False, False, 1.0, False, False),
    "no LayerNorm, a residual and a learned scale": (False, True, 1.3, True, False),
    "a gate and dropout": (True, False, 1.0, False, True),
    "all": (False, True, 1.3, True, True),
}


# Without LayerNorm, numbers near the largest are multiplied as they are, and y has none beyond it.
TABLE = [
    (variant, distribution, dtype)
    for variant in VARIANTS
    for distribution in DISTRIBUTIONS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float16 or distribution != "near fp16 max" or VARIANTS[variant][0]
]


def make_case(
    variant: str, T: int, d: int, r: int, dtype: torch.dtype, distribution: str = "normal", n: int | None = None
) -> Case:
    """A call on (T, d) rows of one adapter, or of ``n`` whose parameters are stacked."""
    norm, with_residual, scale, learned, gated = VARIANTS[variant]
    weights = make_weights(d, r)
    if n is not None:
        weights = Weights(*map(torch.stack, zip(*(make_weights(d, r) for _ in range(n)), strict=True)))
    if not norm:
        weights = weights._replace(norm_weight=None, norm_bias=None)
    x = DISTRIBUTIONS[distribution](torch.randn(T, d, dtype=torch.float64)).to(dtype)
    scales = torch.full((1,), scale) if n is None else scale + torch.arange(n)
    residual, dy = torch.randn(2, T, d).to(dtype)
    gate = torch.randn(T).to(dtype) * (torch.arange(T) % 7 > 0) if gated else None  # some are 0
    return Case(
        x, weights, residual if with_residual else None, scales if learned else scale, dy, gate, 0.3 if gated else 0.0
    )


def evaluate(call: Callable[..., Tensor], case: Case, **how: Any) -> dict[str, Tensor]:
    """y and every gradient of ``call(x, *weights, residual=, scale=, gate=, dropout=, seed=, **how)``, by name."""
    leaf = case.leaves()
    y = call(leaf.x, *leaf.weights, **leaf.more(), **how)
    tensors = leaf.named()
    grads = torch.autograd.grad(y, list(tensors.values()), case.dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(tensors, grads, strict=True))


def eager(
    x: Tensor,
    *weights: Any,
    residual: Tensor | None,
    scale: Any,
    gate: Tensor | None,
    dropout: float,
    seed: int | None,
    low: torch.dtype | None = None,
) -> Tensor:
    """The definition; with ``low`` under autocast to it. ``x`` is (T, d)."""
    r = len(weights[3])
    mask = None if seed is None else Drop(dropout, torch.tensor(seed)).mask(len(x), r, stats_dtype(x.dtype))
    with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        return adapter_eager(x, Weights(*weights), residual=residual, scale=scale, gate=gate, mask=mask).to(x.dtype)


def check(
    case: Case,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
    eps: float,
    index: Tensor | None = None,
) -> None:
    """Our error is within twice theirs. A learned scale's gradient is a sum of T·d products, which may cancel."""
    assert ours.keys() == theirs.keys() == exact.keys()
    wide = case.to(torch.float64)
    more = wide.more() | {"residual": 0 * wide.x, "scale": 1.0}
    branch = ak.adapter(wide.x, *wide.weights, fused=False, index=index, **more)
    for name, o in ours.items():
        t, e = theirs[name], exact[name]
        assert o.shape == e.shape, name
        assert o.dtype == t.dtype, name
        if name == "scale":
            size = (wide.dy * branch).norm()
            assert (o.double() - e).norm() <= 2 * (t.double() - e).norm() + 4 * eps * size, name
        else:
            assert relative_error(o, e) <= 2 * relative_error(t, e) + 4 * eps, name
