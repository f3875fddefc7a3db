"""Initialize adapters from given matrices, as their best low-rank approximations.

With ``activation="identity"`` an adapter is a low-rank map of the normalized residual stream,

    y = x + W_up·(W_down·LayerNorm(x) + b_down) + b_up          W_up·W_down of rank r

For a matrix W, the factors W_up = U_r·√S_r and W_down = √S_r·V_rᵀ from its singular value decomposition make
W_up·W_down the matrix of rank r that is nearest to W (Eckart and Young 1936). The map is applied to LayerNorm(x) and
not to x: its input has mean 0 and variance 1 in each row, so a map of x itself cannot be represented, unless the
adapter has none (``layer_norm=False``). A scale multiplies the map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adapterkern.model.llama import LlamaAdapter


def init_from_weights(
    model: LlamaAdapter, weights: Mapping[int, Tensor | Sequence[Tensor]], name: str | None = None
) -> None:
    """Set adapters to the best low-rank approximations of ``weights``.

    LayerNorm's weight becomes 1 and its bias 0, the other biases 0. With an activation other than ``"identity"``,
    ``up·down`` is still the approximation; the activation is applied between the two factors.

    Args:
        model: the model whose adapters are set.
        weights: layer (from 0, negative from the end) → the matrix (d, d) to approximate, applied to column vectors, in
            any floating dtype; with ``depth`` > 1 a sequence of ``depth`` matrices, in the order of the adapters.
        name: the adapter, default the active one.

    Raises:
        ValueError: the adapter is no bottleneck, there is none at a layer, the number or shape of its matrices does not
            fit, a matrix is not finite, or ``adapter_dim`` is larger than d. Then nothing is changed.
    """
    config = model.adapter_config(name)
    sites = model.adapters[model._check_name(name)]
    d, count = model.decoder.config.hidden_size, len(model.layers)
    if config.kind != "bottleneck":
        raise ValueError(f"kind: expected 'bottleneck' for an adapter that approximates matrices, got {config.kind!r}")
    if config.adapter_dim > d:
        raise ValueError(f"adapter_dim: expected at most hidden_size={d} for matrices, got {config.adapter_dim}")
    chosen: list[tuple[Any, Tensor]] = []
    for layer, given in weights.items():
        site = layer + count if layer < 0 else layer
        if site not in (config.layers or ()):
            raise ValueError(f"weights: expected layers among {list(config.layers or ())}, got {layer}")
        matrices = [given] if isinstance(given, Tensor) and given.dim() == 2 else list(given)
        if len(matrices) != config.depth or any(matrix.shape != (d, d) for matrix in matrices):
            shapes = [tuple(matrix.shape) for matrix in matrices]
            raise ValueError(f"weights: expected {config.depth} of shape ({d}, {d}) for layer {layer}, got {shapes}")
        if not all(matrix.isfinite().all() for matrix in matrices):
            raise ValueError(f"weights: expected finite numbers, got inf or nan for layer {layer}")
        chosen += zip(sites[str(site)], matrices, strict=True)  # type: ignore[index]
    for adapter, matrix in chosen:
        adapter.reset_parameters("svd", matrix)
