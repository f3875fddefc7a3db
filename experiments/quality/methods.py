"""What is trained: each method changes a suffix of the backbone in place and says which parameters it trains.

``METHODS`` names them. Those with a size take the one whose number of parameters is nearest to a budget; where a size
may differ between layers (LoRA's ranks) the last layers take what is left, so that budgets are met to 2 %. The others
have the size that they have. LoRA, IA³ and LLaMA-Adapter's prompts are PEFT's own implementations.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import adapterkern as ak
from adapterkern.recipes.ablation.kinds import KINDS
from adapterkern.recipes.routing.router import Router, RoutingConfig, balance_loss

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = PROJECTIONS[:4]
ADAPTERS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "adapter-attention": KINDS["attention"],
    "adapter-parallel": KINDS["parallel"],
    "adapter-low-rank": {"activation": "identity"},
}
INITS: dict[str, dict[str, Any]] = {f"adapter-{init}": {"init": init} for init in ("xavier", "svd")}
OWN_SIZE = ("head", "norms-biases", "last-layer", "full", "ia3")
METHODS = (*OWN_SIZE, "lora", "lora-attention", "prompts", *ADAPTERS, "routed")
EXPERTS = 4


class Applied(NamedTuple):
    """A method on a suffix."""

    parameters: dict[str, nn.Parameter]  # that it trains, by name
    suffix: Any  # the model, changed in place
    around: Callable[[Tensor, Tensor], contextlib.AbstractContextManager[Any]]  # a forward on (stream, lengths)
    extra: Callable[[], Tensor | float]  # what the last forward adds to the loss
    train: Callable[[bool], object]  # whether choices are drawn

    def hidden(self, stream: Tensor, lengths: Tensor) -> Tensor:
        """The states (B, L, d) after the final norm, of a stream (B, L, d) below the suffix."""
        with self.around(stream, lengths):
            found: Tensor = self.suffix.model(inputs_embeds=stream, use_cache=False).last_hidden_state
        return found

    @property
    def size(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.parameters.values())


def apply(method: str, suffix: Any, budget: int) -> Applied:
    """Change ``suffix`` in place. Weights are drawn from torch's generator.

    Args:
        method: one of ``METHODS`` or ``INITS``; the latter do not start from the untouched model.
        suffix: of ``stream.suffix``; frozen.
        budget: the number of parameters to train, of methods that have a size.
    """
    if method == "routed":
        return _routed(suffix, budget)
    if (fields := (ADAPTERS | INITS).get(method)) is not None:
        parameters = dict(_adapted(suffix, fields, budget).adapters.named_parameters())
        return _applied(suffix, parameters)
    if method in ("lora", "lora-attention"):
        _lora(suffix, PROJECTIONS if method == "lora" else ATTENTION, budget)
    elif method == "prompts":
        _prompts(suffix, budget)
    else:
        _own_size(method, suffix)
    return _applied(suffix, {name: p for name, p in suffix.named_parameters() if p.requires_grad})


def _applied(suffix: Any, parameters: dict[str, nn.Parameter]) -> Applied:
    return Applied(parameters, suffix, lambda *_: contextlib.nullcontext(), lambda: 0.0, lambda _: None)


def _own_size(method: str, suffix: Any) -> None:
    layers = suffix.model.layers
    if method == "full":
        suffix.requires_grad_(True)
    elif method == "last-layer":
        layers[-1].requires_grad_(True)
    elif method == "norms-biases":
        for name, module in suffix.model.named_modules():
            if isinstance(module, nn.Linear):
                module.bias = nn.Parameter(torch.zeros(module.out_features))
            elif name.endswith("norm"):
                module.requires_grad_(True)
    elif method == "ia3":
        import peft

        targets = ["k_proj", "v_proj", "down_proj"]
        config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(suffix, config)


def _lora(suffix: Any, targets: tuple[str, ...], budget: int) -> None:
    import peft

    layers = suffix.model.layers
    linears = [m for name, m in layers[0].named_modules() if name.rpartition(".")[2] in targets]
    per_rank = sum(m.in_features + m.out_features for m in linears)
    rank, more = divmod(round(budget / per_rank), len(layers))
    last = range(len(layers) - more, len(layers))
    pattern = {rf"layers\.{i}\..*": rank + 1 for i in last}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        rank_pattern=pattern,
        alpha_pattern={key: 2 * value for key, value in pattern.items()},
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(suffix, config)


def _prompts(suffix: Any, budget: int) -> None:
    import peft

    count = len(suffix.model.layers)
    length = round((budget / count - 1) / suffix.config.hidden_size)
    config = peft.AdaptionPromptConfig(adapter_len=length, adapter_layers=count, task_type="CAUSAL_LM")
    peft.get_peft_model(suffix, config)


def _adapted(suffix: Any, fields: dict[str, Any], budget: int) -> ak.LlamaAdapter:
    return ak.LlamaAdapter(suffix, ak.AdapterConfig(adapter_dim=_dim(suffix, fields, budget), **fields))


def _dim(suffix: Any, fields: dict[str, Any], budget: int) -> int:
    """The adapter_dim whose number of parameters is nearest to the budget."""
    d, count = suffix.config.hidden_size, len(suffix.model.layers)
    fixed = d + (2 * d if fields.get("layer_norm", True) else 0)
    return round((budget / count - fixed) / (2 * d + 1))


def _routed(suffix: Any, budget: int) -> Applied:
    """``EXPERTS`` adapters, of which a router runs one for each text, as ``adapterkern route train --no-skip``."""
    d, count = suffix.config.hidden_size, len(suffix.model.layers)
    router = Router(d, RoutingConfig(experts=EXPERTS, skip=False))
    dims, more = divmod(round(((budget - EXPERTS * (d + 1)) / count - EXPERTS * 3 * d) / (2 * d + 1)), EXPERTS)
    names = ["default", *map(str, range(1, EXPERTS))]
    model = ak.LlamaAdapter(suffix, ak.AdapterConfig(adapter_dim=dims + (more > 0)))
    for i, name in enumerate(names[1:], start=1):
        model.add_adapter(name, ak.AdapterConfig(adapter_dim=dims + (i < more)))
    model.adapters.requires_grad_(True)
    last: list[Any] = []
    training = [True]

    @contextlib.contextmanager
    def around(stream: Tensor, lengths: Tensor) -> Iterator[None]:
        mask = torch.arange(stream.shape[1]) < lengths[:, None]
        route = router(stream, mask, router.draw(len(stream)) if training[0] else None)
        last[:] = [route]
        with model.mixing(names, route.chosen, route.weight):
            yield

    parameters = dict(model.adapters.named_parameters())
    parameters |= {f"router.{name}": p for name, p in router.named_parameters()}
    return Applied(
        parameters,
        suffix,
        around,
        lambda: 0.01 * balance_loss(last[0], EXPERTS),
        lambda on: training.__setitem__(0, on),
    )
