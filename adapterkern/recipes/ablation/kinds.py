"""``KINDS``: the kinds of adapter that ``kind`` compares, each a few fields of ``AdapterConfig`` over the base point.

With b(x) = W_up · act(W_down · LayerNorm(x) + b_down) + b_up, x the residual stream after the layer, u the one between
attention and feed-forward network, and h the one before the layer:

    bottleneck          x + b(x)                  Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021
    attention           u + b(u)                  Houlsby et al. 2019
    parallel            x + b(u)                  He et al. 2022, arXiv:2110.04366
    parallel-attention  u + b(h)                  He et al. 2022
    scaled-parallel     x + 4 · b(u), without LayerNorm, act = ReLU          He et al. 2022
    no-norm             x + b(x), without LayerNorm                          Pfeiffer et al. 2021, arXiv:2005.00247
    learned-scale       x + s · b(x), s learned, 1 at first                  He et al. 2022
    prompt              gated prompts inside attention, see ``Prompt``       Zhang et al. 2023, arXiv:2303.16199
    llama-adapter-v2    the same with a gate per head, and W·x → s ⊙ (W·x + b) in each linear layer
                                                                             Gao et al. 2023, arXiv:2304.15010
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from adapterkern import checks
from adapterkern.model.config import PROMPT, AdapterConfig

KINDS: dict[str, dict[str, Any]] = {
    "bottleneck": {},
    "attention": {"position": "attention"},
    "parallel": {"position": "parallel-mlp"},
    "parallel-attention": {"position": "parallel-attention"},
    "scaled-parallel": {"position": "parallel-mlp", "scale": 4.0, "layer_norm": False, "activation": "relu"},
    "no-norm": {"layer_norm": False},
    "learned-scale": {"learned_scale": True},
    "prompt": {"kind": PROMPT},
    "llama-adapter-v2": {"kind": PROMPT, "prompt_gate": "head", "bias_scale": True},
}


def kind_fields(kind: Any) -> dict[str, Any]:
    """The fields of ``AdapterConfig`` that an adapter of this kind has. Raises ``ValueError`` for an unknown one."""
    return {"kind": AdapterConfig.kind} | KINDS[checks.choice("kind", kind, tuple(KINDS))]


def check_apart(argument: str, kinds: Iterable[Any], given: Mapping[str, Any], varied: Collection[str] = ()) -> None:
    """Raise ``ValueError`` if a field that one of these kinds decides is ``varied``, or ``given`` another value."""
    for kind in kinds:
        for name, value in kind_fields(kind).items():
            if name != "kind" and (name in varied or given.get(name, value) != value):
                raise ValueError(
                    f"{argument}: expected kind={kind} or {name}, not both: this kind is {name}={value}"
                    + (f"; got {name}={given[name]}" if name in given else "")
                )
