"""``Adapter``: one bottleneck adapter, as a module."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapterkern import checks
from adapterkern.ops.checks import MAX_ADAPTER_DIM
from adapterkern.ops.choice import fused_enabled
from adapterkern.ops.normed import Made, adapter_before_norm
from adapterkern.ops.operator import adapter
from adapterkern.ops.reference import ACTIVATIONS, add_branch
from adapterkern.ops.stock import eager_autocast, stock_dtype

INITS = ("identity", "xavier", "svd")


class Following(Protocol):
    """The norm that reads an adapter's y: next_norm.py."""

    def factor(self, x: Tensor) -> Any: ...

    def hand(self, y: Tensor, made: Made) -> None: ...


class Adapter(nn.Module):
    """``y = x + up(act(down(norm(x))))``: a bottleneck adapter on the residual stream (Houlsby et al. 2019).

    With all arguments ``y = residual + scale · up(dropout(act(down(norm(x)))))``: given a residual that is not x, the
    parallel adapter of He et al. (2022, arXiv:2110.04366).

    ``norm`` is an ``nn.LayerNorm``, ``down`` and ``up`` are ``nn.Linear``. With ``fused=True`` they only hold the
    parameters, and one fused operator computes y. With ``fused=False`` they are called one by one, except where they do
    not accept x's dtype together with their parameters' (such as fp32 x and bf16 parameters): then they are cast.

    Args:
        hidden_size: d, the width of the residual stream.
        adapter_dim: r, the width of the bottleneck, 1 to 512.
        activation: ``"silu"``, ``"gelu"``, ``"relu"``, ``"tanh"`` or ``"identity"``.
        eps: added to LayerNorm's variance.
        init: see ``reset_parameters``.
        fused: whether to use the fused operator; can be changed at any time.
        x_free: keep y instead of x for the backward, see ``adapterkern.adapter``; only if ``fused``.
        layer_norm: without it ``norm`` is an ``nn.Identity``, and ``down`` reads x itself.
        scale: the factor of the branch; can be changed at any time: ``adapter.scale = 0.5``, or ``set_scale``.
        learned_scale: ``adapter.scale`` is an fp32 parameter of shape (1,), which starts with this value.
        dropout: the probability, from 0 to below 1, that a number of the bottleneck is dropped, in training mode and
            while ``down`` requires a gradient: see ``adapterkern.adapter``. torch's generator of x's device decides.
        device, dtype: of the parameters; the default dtype is fp32 even if x is bf16 or fp16.

    Shapes: x, residual and y ``(..., hidden_size)``; y has x's dtype, and the residual must. No residual is x.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range; the message names it.
    """

    norm: Any  # nn.LayerNorm or nn.Identity

    def __init__(
        self,
        hidden_size: int,
        adapter_dim: int = 64,
        *,
        activation: str = "silu",
        eps: float = 1e-5,
        init: str = "identity",
        fused: bool = True,
        x_free: bool = False,
        layer_norm: bool = True,
        scale: float = 1.0,
        learned_scale: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.integer("hidden_size", hidden_size, 1)
        checks.integer("adapter_dim", adapter_dim, 1, MAX_ADAPTER_DIM)
        checks.choice("activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self.fused = checks.flag("fused", fused)
        self.x_free = checks.flag("x_free", x_free)
        checks.number("eps", eps, "[0, inf)")
        checks.number("scale", scale, "(-inf, inf)")
        self.scale: float | nn.Parameter = float(scale)
        if checks.flag("learned_scale", learned_scale):  # not without dimensions, which FSDP does not shard
            self.scale = nn.Parameter(torch.full((1,), scale, device=device, dtype=torch.float32))
        self.dropout = float(checks.number("dropout", dropout, "[0, 1)"))
        self.layer_norm = checks.flag("layer_norm", layer_norm)
        self.norm = nn.LayerNorm(hidden_size, eps=eps, device=device, dtype=dtype) if layer_norm else nn.Identity()
        self.down = nn.Linear(hidden_size, adapter_dim, device=device, dtype=dtype)
        self.up = nn.Linear(adapter_dim, hidden_size, device=device, dtype=dtype)
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str = "identity", matrix: Tensor | None = None) -> None:
        """Draw new weights; LayerNorm's weight becomes 1 and its bias 0, the other biases 0. The scale stays.

        ``"identity"``: Xavier-uniform ``down``, zero ``up``: y = x until training changes ``up``. ``"xavier"``: both
        Xavier-uniform. ``"svd"``: both from the truncated SVD of ``matrix`` (d, d), U·√S and √S·Vᵀ, so that ``up·down``
        is its best approximation of rank r, up to fp32 rounding; without ``matrix``, of a random Xavier-normal matrix.
        With ``activation="identity"`` the adapter then adds that map of the normalized input:
        y = x + up·down·LayerNorm(x).

        Raises:
            ValueError: ``init`` is unknown, ``matrix`` has another shape or is given with another ``init``, or
                ``adapter_dim`` is larger than d with ``"svd"``.
        """
        checks.choice("init", init, INITS)
        r, d = self.down.weight.shape
        if matrix is not None and (init != "svd" or matrix.shape != (d, d)):
            raise ValueError(
                f"matrix: expected shape ({d}, {d}) with init='svd', got {tuple(matrix.shape)} and {init!r}"
            )
        factors = _svd_factors(matrix, d, r, self.down.weight.device) if init == "svd" else None
        if self.layer_norm:
            self.norm.reset_parameters()
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if factors is not None:
            self.down.weight.copy_(factors[0])
            self.up.weight.copy_(factors[1])
            return
        nn.init.xavier_uniform_(self.down.weight)
        if init == "identity":
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.xavier_uniform_(self.up.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, following: Following | None = None) -> Tensor:
        """y; the norm that is ``following`` is left its output, if that could be made with y."""
        norm, down, up = self.norm, self.down, self.up
        self.check_modules()
        fused = self.fused and fused_enabled()
        gamma, beta, eps = (norm.weight, norm.bias, norm.eps) if self.layer_norm else (None, None, 0.0)
        dropout = self.active_dropout
        # The modules themselves only accept x in their parameters' dtype, or in a lower one with fp32 parameters.
        if fused or dropout or stock_dtype(x, (gamma, down.weight, up.weight)) is not None:
            weights = gamma, beta, down.weight, down.bias, up.weight, up.bias
            how: dict[str, Any] = {"eps": eps, "activation": self.activation, "fused": fused, "x_free": self.x_free}
            how |= {"scale": self.scale, "dropout": dropout}
            next_norm = following.factor(x) if following is not None and fused and residual is None else None
            if next_norm is None:
                return adapter(x, *weights, residual=residual, **how)
            y, made = adapter_before_norm(x, *weights, next_norm.weight, next_eps=next_norm.eps, **how)
            if made is not None:
                following.hand(y, made)  # type: ignore[union-attr]  # which has given its factor
            return y
        with eager_autocast(x):
            branch = up(ACTIVATIONS[self.activation].fn(down(norm(x))))
            return add_branch(x if residual is None else residual, branch, self.scale).to(x.dtype)

    @property
    def active_dropout(self) -> float:
        """``dropout`` while the adapter is trained, 0 otherwise: a frozen one has learned what it has."""
        return self.dropout if self.dropout and self.training and self.down.weight.requires_grad else 0.0

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set the scale, learned or not."""
        if isinstance(self.scale, Tensor):
            self.scale.fill_(scale)
        else:
            self.scale = scale

    def check_modules(self) -> None:
        """Raise ``TypeError`` if something has replaced ``down`` or ``up`` by another kind of module."""
        for name in ("down", "up"):
            module = getattr(self, name)
            if not isinstance(module, nn.Linear):
                raise TypeError(
                    f"adapter.{name}: expected an nn.Linear, got {type(module).__module__}.{type(module).__name__}, by "
                    "which something has replaced it; convert the backbone alone: quantize_dynamic(model.base, "
                    "inplace=True), quantize_(model.base, ...)"
                )

    def extra_repr(self) -> str:
        scale = ", learned scale" if isinstance(self.scale, Tensor) else f", scale={self.scale}" * (self.scale != 1)
        dropout = f", dropout={self.dropout}" * (self.dropout != 0)
        return f"activation={self.activation!r}, fused={self.fused}{scale}{dropout}"


class InTurn(nn.Sequential):
    """Adapters one after the other, of which the last is told what norm follows."""

    def forward(self, x: Tensor, following: Following | None = None) -> Tensor:
        *before, last = self
        for one in before:
            x = one(x)
        return last(x) if following is None else last(x, following=following)


class Beside(nn.Sequential):
    """Adapters that run parallel to a module: each reads x, and adds its branch to the stream that the module left."""

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        for one in self:
            hidden = one(x.to(hidden.dtype), hidden)
        return hidden


def plain(tensor: Tensor) -> Tensor:
    """A weight that torchao has quantized as an ordinary tensor; any other as it is."""
    return tensor if type(tensor).dequantize is Tensor.dequantize else tensor.dequantize()


def _svd_factors(matrix: Tensor | None, d: int, r: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if r > d:
        raise ValueError(f"adapter_dim: expected at most hidden_size={d} with init='svd', got {r}")
    if matrix is None:
        # A random matrix needs no exact SVD: 0.2 s instead of 30 s at d=4096.
        matrix = torch.randn(d, d, device=device) / math.sqrt(d)
        U, S, V = torch.svd_lowrank(matrix, q=min(d, r + 8), niter=2)
        Vt = V.T
    else:
        # fp64: if singular values are close together, the error of fp32's singular vectors is 100 times fp32's rounding
        # (d=576, r=64, a Gaussian matrix: error of up·down 7e-6 against 4e-8, in 0.06 s against 0.10 s).
        U, S, Vt = torch.linalg.svd(matrix.to(device, torch.float64), full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root
