"""``Adapter``, the module, and ``AdapterConfig``: where adapters stand in a decoder, and how large they are."""

import dataclasses
import logging
import math
import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapterkern.ops.checks import MAX_ADAPTER_DIM
from adapterkern.ops.choice import fused_enabled
from adapterkern.ops.operator import adapter, eager_autocast, stock_dtype
from adapterkern.ops.reference import ACTIVATIONS

logger = logging.getLogger(__name__)

INITS = ("identity", "xavier", "svd")
POSITIONS = ("layer", "attention")


class Adapter(nn.Module):
    """``y = x + up(act(down(norm(x))))``: a bottleneck adapter on the residual stream (Houlsby et al. 2019).

    ``norm`` is an ``nn.LayerNorm``, ``down`` and ``up`` are ``nn.Linear``; with ``fused=True`` they only hold the
    parameters and one fused operator does the work, with ``fused=False`` they are called one by one (but for x of a
    dtype that they cannot take beside their parameters', such as fp32 x and bf16 parameters: then they are cast).

    Args:
        hidden_size: d, the width of the residual stream.
        adapter_dim: r, the width of the bottleneck, 1 to 512.
        activation: ``"silu"``, ``"gelu"``, ``"relu"``, ``"tanh"`` or ``"identity"``.
        eps: added to LayerNorm's variance.
        init: see :meth:`reset_parameters`.
        fused: whether to use the fused operator; may be changed at any time.
        x_free: keep y instead of x for the backward, see :func:`adapterkern.adapter`; only where fused.
        device, dtype: of the parameters; fp32 also where x is bf16 or fp16.

    Shapes: x and y ``(..., hidden_size)``; y has x's dtype.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_int("hidden_size", hidden_size, 1)
        _check_int("adapter_dim", adapter_dim, 1, MAX_ADAPTER_DIM)
        _check_choice("activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self.fused = fused
        self.x_free = x_free
        self.norm = nn.LayerNorm(hidden_size, eps=eps, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_size, adapter_dim, device=device, dtype=dtype)
        self.up = nn.Linear(adapter_dim, hidden_size, device=device, dtype=dtype)
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str = "identity", matrix: Tensor | None = None) -> None:
        """Draw the weights anew; LayerNorm becomes 1 and 0, the biases 0.

        ``"identity"``: Xavier-uniform ``down``, zero ``up``: y = x until training moves it. ``"xavier"``: both
        Xavier-uniform. ``"svd"``: both from the truncated SVD of ``matrix`` (d, d), U·√S and √S·Vᵀ, so that ``up·down``
        is its best approximation of rank r, to fp32's rounding; without ``matrix``, of a Xavier-normal random one. With
        ``activation="identity"`` the adapter then adds that map of the normalised input: y = x + up·down·LayerNorm(x).
        """
        _check_choice("init", init, INITS)
        d, r = self.norm.normalized_shape[0], self.down.out_features
        if matrix is not None and (init != "svd" or matrix.shape != (d, d)):
            raise ValueError(
                f"matrix: expected shape ({d}, {d}) with init='svd', got {tuple(matrix.shape)} and {init!r}"
            )
        factors = _svd_factors(matrix, d, r, self.down.weight.device) if init == "svd" else None
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

    def forward(self, x: Tensor) -> Tensor:
        norm, down, up = self.norm, self.down, self.up
        fused = self.fused and fused_enabled()
        # Called one by one, the modules take x in their parameters' dtype only, or in a lower one beside fp32.
        if fused or stock_dtype(x, (norm.weight, down.weight, up.weight)) is not None:
            return adapter(
                x,
                norm.weight,
                norm.bias,
                down.weight,
                down.bias,
                up.weight,
                up.bias,
                eps=norm.eps,
                activation=self.activation,
                fused=fused,
                x_free=self.x_free,
            )
        with eager_autocast(x):
            return (x + up(ACTIVATIONS[self.activation].fn(down(norm(x))))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, fused={self.fused}"


def _svd_factors(matrix: Tensor | None, d: int, r: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if r > d:
        raise ValueError(f"adapter_dim: expected at most hidden_size={d} with init='svd', got {r}")
    if matrix is None:
        # A random matrix's subspace needs no exact SVD: 0.2 s instead of half a minute at d=4096.
        matrix = torch.randn(d, d, device=device) / math.sqrt(d)
        U, S, V = torch.svd_lowrank(matrix, q=min(d, r + 8), niter=2)
        Vt = V.T
    else:
        # In fp64: where singular values lie close together, fp32's singular vectors are off by 100 times fp32's
        # rounding (d=576, r=64, a Gaussian matrix: up·down off by 7e-6 against 4e-8, in 0.06 s against 0.10 s).
        U, S, Vt = torch.linalg.svd(matrix.to(device, torch.float64), full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root


def adapter_num_params(hidden_size: int, adapter_dim: int) -> int:
    """Parameters of one adapter: two (r, d) weights, r + d biases, LayerNorm's 2d."""
    return adapter_dim * (2 * hidden_size + 1) + 3 * hidden_size


def largest_adapter_dim(hidden_size: int, adapters: int, max_params: int) -> int:
    """The largest ``adapter_dim`` with which so many adapters fit ``max_params``; 0 if none does."""
    fit = (max_params // adapters - adapter_num_params(hidden_size, 0)) // (2 * hidden_size + 1)
    return max(0, min(fit, MAX_ADAPTER_DIM))


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Where adapters stand in a decoder, and how large they are.

    Args:
        adapter_dim: r, the width of each bottleneck, 1 to 512.
        position: ``"layer"``: on the residual stream after a decoder layer; ``"attention"``: on it between attention
            and the feed-forward network.
        every: k takes layers k−1, 2k−1, … (from 0).
        layers: these layers outright, from 0; negative ones count from the end. Not together with ``every``.
        depth: adapters in sequence at each site.
        activation, init, eps, x_free: as in :class:`Adapter`.
        max_params: a budget for all sites together: the largest ``adapter_dim`` that fits replaces the one given.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of its range; the message names it.
    """

    adapter_dim: int = 64
    position: Literal["layer", "attention"] = "layer"
    every: int = 1
    layers: tuple[int, ...] | list[int] | None = None
    depth: int = 1
    activation: str = "silu"
    init: str = "identity"
    eps: float = 1e-5
    x_free: bool = False
    max_params: int | None = None

    def __post_init__(self) -> None:
        _check_int("adapter_dim", self.adapter_dim, 1, MAX_ADAPTER_DIM)
        _check_choice("position", self.position, POSITIONS)
        _check_int("every", self.every, 1)
        _check_int("depth", self.depth, 1)
        _check_choice("activation", self.activation, tuple(ACTIVATIONS))
        _check_choice("init", self.init, INITS)
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)):
            raise TypeError(f"eps: expected a number, got {self.eps!r}")
        if not 0 <= self.eps <= sys.float_info.max:
            raise ValueError(f"eps: expected a finite number >= 0, got {self.eps!r}")
        if not isinstance(self.x_free, bool):
            raise TypeError(f"x_free: expected True or False, got {self.x_free!r}")
        if self.max_params is not None:
            _check_int("max_params", self.max_params, 1)
        if self.layers is not None:
            if not isinstance(self.layers, (list, tuple)):
                raise TypeError(f"layers: expected a list of layer numbers, got {self.layers!r}")
            for layer in self.layers:
                _check_int("layers", layer)
            if self.every != 1:
                raise ValueError(f"layers: expected no layers together with every={self.every}, got {self.layers!r}")
            object.__setattr__(self, "layers", tuple(self.layers))

    def site_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that bear adapters in a decoder of ``num_layers``, ascending.

        Raises:
            ValueError: no layer is left, or one is out of range or named twice.
        """
        if self.layers is None:
            sites = tuple(range(self.every - 1, num_layers, self.every))
            if not sites:
                raise ValueError(f"every: expected at most the {num_layers} layers of the model, got {self.every}")
            return sites
        for layer in self.layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"layers: expected numbers from {-num_layers} to {num_layers - 1}, got {layer}")
        sites = tuple(sorted({layer % num_layers for layer in self.layers}))
        if len(sites) != len(self.layers) or not sites:
            raise ValueError(f"layers: expected at least one layer and none twice, got {list(self.layers)}")
        return sites

    def num_params(self, hidden_size: int, num_layers: int) -> int:
        """Trainable parameters in a decoder of this shape."""
        return len(self.site_layers(num_layers)) * self.depth * adapter_num_params(hidden_size, self.adapter_dim)

    def resolve(self, hidden_size: int, num_layers: int) -> "AdapterConfig":
        """This configuration with ``layers`` named outright and ``max_params`` turned into an ``adapter_dim``.

        Raises:
            ValueError: not even ``adapter_dim=1`` fits the budget, or ``svd`` cannot fill the bottleneck.
        """
        sites = self.site_layers(num_layers)
        resolved = dataclasses.replace(self, every=1, layers=sites, max_params=None)
        most = hidden_size if self.init == "svd" else MAX_ADAPTER_DIM
        if self.max_params is None:
            if self.adapter_dim > most:
                raise ValueError(
                    f"adapter_dim: expected at most hidden_size={hidden_size} with init='svd', got {self.adapter_dim}"
                )
            return resolved
        count = len(sites) * self.depth
        dim = min(most, largest_adapter_dim(hidden_size, count, self.max_params))
        if dim == 0:
            raise ValueError(
                f"max_params: expected at least {count * adapter_num_params(hidden_size, 1):,}, what {count} adapters "
                f"of adapter_dim=1 take at hidden_size={hidden_size}, got {self.max_params:,}"
            )
        resolved = dataclasses.replace(resolved, adapter_dim=dim)
        logger.warning(
            "max_params=%s: chose adapter_dim=%d, %s parameters in %d adapters",
            f"{self.max_params:,}",
            resolved.adapter_dim,
            f"{resolved.num_params(hidden_size, num_layers):,}",
            count,
        )
        return resolved

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them back."""
        fields = dataclasses.asdict(self)
        return fields | {"layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "AdapterConfig":
        """The reverse of :meth:`to_dict`. Raises ``ValueError`` that names an unknown field."""
        if not isinstance(fields, dict):
            raise TypeError(f"config: expected an object of fields, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"{unknown[0]}: unknown field; expected one of {', '.join(sorted(known))}")
        return cls(**fields)


def _check_int(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected an integer {bounds}, got {value}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
