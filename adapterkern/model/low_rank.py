"""Adapters that begin as low-rank maps that are given.

With ``activation="identity"`` an adapter is a low-rank map of the normalised residual stream,

    y = x + W_up·(W_down·LayerNorm(x) + b_down) + b_up          W_up·W_down of rank r

and for a matrix W the factors W_up = U_r·√S_r, W_down = √S_r·V_rᵀ from its singular value decomposition make
W_up·W_down the matrix of rank r that is nearest to W (Eckart and Young 1936). The map is of LayerNorm(x), not of x:
each row of the stream comes to it with mean 0 and variance 1, so a map of x itself cannot be given in this way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adapterkern.model.llama import LlamaAdapter


def init_from_weights(
    model: LlamaAdapter, weights: Mapping[int, Tensor | Sequence[Tensor]], name: str | None = None
) -> None:
    """Begin adapters as the best low-rank approximations of ``weights``; LayerNorm becomes 1 and 0, the biases 0.

    Args:
        model: its adapters of any activation; with another than ``"identity"``, ``up·down`` is the map all the same,
            but an activation stands between the factors.
        weights: for each layer (from 0, negative from the end) that shall begin so, a matrix (d, d) that maps columns,
            in any floating dtype; for ``depth`` above 1 so many, the first adapter's first.
        name: the adapter, by default the active one.

    Raises:
        ValueError: there is no adapter at a layer, the number or shape of its matrices does not fit, or one is not
            finite; or ``adapter_dim`` is larger than d. Nothing is changed then.
    """
    config = model.adapter_config(name)
    sites = model.adapters[model._check_name(name)]
    d, count = model.config.hidden_size, len(model.layers)
    if config.adapter_dim > d:
        raise ValueError(f"adapter_dim: expected at most hidden_size={d} for matrices, got {config.adapter_dim}")
    chosen: list[tuple[Any, Tensor]] = []
    for layer, given in weights.items():
        site = layer + count if layer < 0 else layer
        if site not in (config.layers or ()):
            raise ValueError(f"weights: expected layers out of {list(config.layers or ())}, got {layer}")
        matrices = [given] if isinstance(given, Tensor) and given.dim() == 2 else list(given)
        if len(matrices) != config.depth or any(matrix.shape != (d, d) for matrix in matrices):
            shapes = [tuple(matrix.shape) for matrix in matrices]
            raise ValueError(f"weights: expected {config.depth} of shape ({d}, {d}) for layer {layer}, got {shapes}")
        if not all(matrix.isfinite().all() for matrix in matrices):
            raise ValueError(f"weights: expected finite numbers, got others for layer {layer}")
        chosen += zip(sites[str(site)], matrices, strict=True)  # type: ignore[index]
    for adapter, matrix in chosen:
        adapter.reset_parameters("svd", matrix)
