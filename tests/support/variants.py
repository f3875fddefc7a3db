"""The operator's calls that are not plain: with a residual, with a scale, without LayerNorm; and their right values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.ops.reference import Weights, adapter_eager
from tests.support.numerics import DISTRIBUTIONS, make_weights, relative_error


class Case(NamedTuple):
    """The tensors of a call, and the gradient of its y."""

    x: Tensor
    weights: Weights
    residual: Tensor | None
    scale: Tensor | float
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        def cast(t: Any) -> Any:
            return t.to(dtype) if isinstance(t, Tensor) else t

        x, weights, *others = self
        return Case(cast(x), Weights(*map(cast, weights)), *map(cast, others))

    def view(self, *shape: int) -> "Case":
        """The same with rows in another shape."""
        residual = None if self.residual is None else self.residual.view(shape)
        return self._replace(x=self.x.view(shape), residual=residual, dy=self.dy.view(shape))

    def leaves(self, *wanted: str) -> "Case":
        """The same with tensors of its own; those ``wanted`` by name, or all, require gradients."""

        def leaf(name: str, t: Any) -> Any:
            return t.detach().clone().requires_grad_(not wanted or name in wanted) if isinstance(t, Tensor) else t

        weights = Weights(*(leaf(name, t) for name, t in self.weights._asdict().items()))
        own = {name: leaf(name, getattr(self, name)) for name in ("x", "residual", "scale")}
        return self._replace(weights=weights, **own)

    def named(self) -> dict[str, Tensor]:
        """All tensors but dy."""
        given = {"x": self.x, **self.weights._asdict(), "residual": self.residual, "scale": self.scale}
        return {name: t for name, t in given.items() if isinstance(t, Tensor)}


# Whether there is LayerNorm, whether a residual, the scale, and whether that is learned
VARIANTS = {
    "residual": (True, True, 1.0, False),
    "scale": (True, False, -1.7, False),
    "residual and a learned scale": (True, True, 1.3, True),
    "a learned scale of 0": (True, False, 0.0, True),
    "no LayerNorm": (False, False, 1.0, False),
    "no LayerNorm, a residual and a learned scale": (False, True, 1.3, True),
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
    norm, with_residual, scale, learned = VARIANTS[variant]
    weights = make_weights(d, r)
    if n is not None:
        weights = Weights(*map(torch.stack, zip(*(make_weights(d, r) for _ in range(n)), strict=True)))
    if not norm:
        weights = weights._replace(norm_weight=None, norm_bias=None)
    x = DISTRIBUTIONS[distribution](torch.randn(T, d, dtype=torch.float64)).to(dtype)
    scales = torch.full((1,), scale) if n is None else scale + torch.arange(n)
    residual, dy = torch.randn(2, T, d).to(dtype)
    return Case(x, weights, residual if with_residual else None, scales if learned else scale, dy)


def evaluate(call: Callable[..., Tensor], case: Case, **how: Any) -> dict[str, Tensor]:
    """y and every gradient of ``call(x, *weights, residual=, scale=, **how)``, by name."""
    leaf = case.leaves()
    y = call(leaf.x, *leaf.weights, residual=leaf.residual, scale=leaf.scale, **how)
    tensors = leaf.named()
    grads = torch.autograd.grad(y, list(tensors.values()), case.dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(tensors, grads, strict=True))


def eager(x: Tensor, *weights: Any, residual: Tensor | None, scale: Any, low: torch.dtype | None = None) -> Tensor:
    """The definition; with ``low`` under autocast to it."""
    with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        return adapter_eager(x, Weights(*weights), residual=residual, scale=scale).to(x.dtype)


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
    branch = ak.adapter(wide.x, *wide.weights, residual=0 * wide.x, fused=False, index=index)
    for name, o in ours.items():
        t, e = theirs[name], exact[name]
        assert o.shape == e.shape, name
        assert o.dtype == t.dtype, name
        if name == "scale":
            size = (wide.dy * branch).norm()
            assert (o.double() - e).norm() <= 2 * (t.double() - e).norm() + 4 * eps * size, name
        else:
            assert relative_error(o, e) <= 2 * relative_error(t, e) + 4 * eps, name
