"""What is inside a backbone's layers, by which some parameters of an adapter count: of linear layers, and of heads."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from adapterkern.model.config import AdapterConfig


class Inside(NamedTuple):
    """The sizes of what layers have inside."""

    heads: int  # of queries
    outputs: tuple[int, ...]  # of each layer's linear layers together


def needs_inside(config: "AdapterConfig") -> bool:
    """Whether the number of an adapter's parameters depends on what layers have inside."""
    return config.bias_scale or config.prompt_gate == "head"


def num_params_beside(config: "AdapterConfig", sites: Collection[int], inside: Inside | None) -> int:
    """Number of parameters at the layers ``sites`` that no size decides: bias and scale, and gates but the first.

    Raises:
        ValueError: ``inside`` is None, and has to be known.
    """
    if not needs_inside(config):
        return 0
    if inside is None:
        what = "bias_scale=True" if config.bias_scale else "prompt_gate='head'"
        raise ValueError(f"max_params: expected a backbone whose layers are known, with {what}, got its size alone")
    gates = (inside.heads - 1) * len(sites) if config.prompt_gate == "head" else 0
    return gates + (2 * sum(inside.outputs[site] for site in sites) if config.bias_scale else 0)


def query_heads(decoder: Any) -> int:
    """The number of heads of queries in each layer, by a decoder's configuration; 0 if it names no one number."""
    heads = getattr(decoder.config, "num_attention_heads", 0)
    return heads if isinstance(heads, int) else 0


def number_of_gates(config: "AdapterConfig", decoder: Any) -> int:
    """Of each gated prompt. Raises ``ValueError`` if it is the number of heads, and the decoder names no one number."""
    if config.prompt_gate == "layer":
        return 1
    if (heads := query_heads(decoder)) < 1:
        raise ValueError(
            f"prompt_gate: expected 'layer' for {type(decoder).__name__}, whose configuration names no number of "
            "heads, got 'head'"
        )
    return heads
