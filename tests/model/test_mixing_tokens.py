"""Mixtures whose tokens choose: against a loop over tokens and adapters; generation, checkpoints, prompts."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkern as ak
from adapterkern.model import mixing
from tests.support.tiny_llama import IDS, LEFT_PADDED, draw, mixed

CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"adapter_dim": 4, "layers": [1, 3], "x_free": True},
    "b": {"adapter_dim": 4, "layers": [2, 3], "scale": 0.5},
    "c": {"adapter_dim": 6, "layers": [1, 2], "position": "attention"},
    "e": {"adapter_dim": 4, "layers": [1], "position": "parallel-mlp"},
    "f": {"adapter_dim": 4, "layers": [2, 3], "position": "parallel-attention"},
}
DEEP = CONFIGS | {"d": {"adapter_dim": 4, "layers": [1, 3], "depth": 2, "activation": "gelu"}}
PLACES = {"layer": "layer", "parallel-mlp": "layer", "attention": "attention", "parallel-attention": "attention"}


def some(*shape: int, low: int = -1, high: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(3))


def gradients(model: ak.LlamaAdapter, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss with another weight for every logit."""
    model.zero_grad()
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(5))
    (logits * direction * LEFT_PADDED[..., None]).sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.adapters.named_parameters()
    }


def by_hand(model: ak.LlamaAdapter, choices: list[Any], index: Tensor, weight: Tensor | None) -> Tensor:
    """The logits, LLaMA's layers written out, with one adapter on one token at a time."""

    def site(layer: int, place: str, hidden: Tensor, beside: Tensor) -> Tensor:
        rows = []
        for b, t in torch.cartesian_prod(*map(torch.arange, hidden.shape[:2])).tolist():
            row, reads = hidden[b, t], beside[b, t]
            total = row
            for k, number in enumerate(index[b, t].tolist()):
                y = row
                names = [] if number < 0 else choices[number]
                for name in [names] if isinstance(names, str) else names:
                    position = DEEP[name].get("position", "layer")
                    if PLACES[position] == place and layer in DEEP[name]["layers"]:
                        one: Any = model.adapters[name][str(layer)]
                        y = one(y, reads) if position.startswith("parallel") else one(y)
                total = total + (1 if weight is None else weight[b, t, k]) * (y - row)
            rows.append(total)
        return torch.stack(rows).view_as(hidden)

    def run(number: int, layer: Any, args: Any, kwargs: Any, _: Tensor) -> Tensor:
        x = args[0] if args else kwargs.pop("hidden_states")
        attended = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
        h = site(number, "attention", attended, x)
        return site(number, "layer", h + layer.mlp(layer.post_attention_layernorm(h)), h)

    hooks = [
        layer.register_forward_hook(lambda *given, n=n: run(n, *given), with_kwargs=True)
        for n, layer in enumerate(model.layers)
    ]
    with model.disable_adapter():
        logits = model(IDS, attention_mask=LEFT_PADDED, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("choices", "count", "weighted"),
    [
        (["a", "b", "c", "e", "f"], 2, True),
        (["a", "b"], 1, True),
        (["c", "a", "e", "b"], 1, False),
        (["a", "d", "c"], 2, False),  # one adapter is two in sequence
        (["b", ["a", "b"], ["f", "d", "e"]], 2, True),  # stacks
    ],
)
def test_each_token_as_a_loop_over_tokens_and_adapters(
    choices: list[Any], count: int, weighted: bool, fused: bool
) -> None:
    model = mixed(configs=DEEP, fused=fused)
    index = some(*IDS.shape, count, high=len(choices))
    weight = torch.randn(index.shape, dtype=torch.float64).requires_grad_() if weighted else None
    with model.mixing(choices, index, weight):
        logits = model(IDS, attention_mask=LEFT_PADDED).logits
    got = gradients(model, logits) | ({} if weight is None else {"weight": weight.grad.clone()})
    if weight is not None:
        weight.grad = None
    expected = by_hand(model, choices, index, weight)
    torch.testing.assert_close(logits[LEFT_PADDED > 0], expected[LEFT_PADDED > 0])
    wanted = gradients(model, expected) | ({} if weight is None else {"weight": weight.grad})
    assert sum(bool(g.abs().max() > 0) for g in wanted.values()) > 8
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-7, atol=1e-9, msg=name)


@torch.no_grad()
def test_prompts_of_tokens() -> None:
    """In the last layer a token's state depends on its own choices alone, so that of a whole sequence says it."""
    prompts = {name: {"kind": "prompt", "prompt_length": 3 + (name == "r"), "layers": [3]} for name in "pqr"}
    model = mixed(configs=prompts | {"b": {"adapter_dim": 4, "layers": [3]}})
    names = [*prompts, "b"]
    pairs = some(20, 2, high=4)
    weights = torch.randn(20, 2, dtype=torch.float64)
    choice = some(*IDS.shape, low=0, high=20)
    expected = torch.empty(*IDS.shape, 128, dtype=torch.float64)
    for number, (pair, weight) in enumerate(zip(pairs, weights, strict=True)):
        with model.mixing(names, pair.expand(3, -1), weight.expand(3, -1)):
            expected[choice == number] = model(IDS).logits[choice == number]
    with model.mixing(names, pairs[choice], weights[choice]):
        torch.testing.assert_close(model(IDS).logits, expected)


class Chooser(nn.Module):
    """Two adapters of three, or none, for each token, by its state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        self.seen: list[torch.Size] = []

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(hidden.shape)
        values, index = (hidden.detach() @ self.scores.T).topk(2)
        return torch.where(index == 3, -1, index), values.tanh()


NAMES = ["a", "c", "f"]  # the first is amid layer 1


def test_recomputed_layers_choose_as_their_forwards_did() -> None:
    """Two forwards of other tokens in one block: each decides once, and is recomputed with its own choices."""
    found = []
    for checkpointing in (False, True):
        model, chooser = mixed(configs=CONFIGS).train(), Chooser()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with model.mixing(NAMES, chooser):
            losses = [model(ids, labels=ids, use_cache=False).loss for ids in (IDS, IDS.flip(1)[:2])]
        sum(losses).backward()
        assert [shape[0] for shape in chooser.seen] == [3, 2]
        assert chooser.scores.grad.abs().max() > 0
        found.append([chooser.scores.grad, *(p.grad for name in NAMES for p in model.adapter_parameters(name))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_a_new_token_chooses_when_it_comes() -> None:
    """Step by step what one forward over the whole text computes, of prompts with padding, and of beams."""
    model, chooser = mixed(configs=CONFIGS), Chooser()
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": LEFT_PADDED}
    with model.mixing(NAMES, chooser):
        out = model.generate(IDS, **how, output_logits=True, return_dict_in_generate=True)
        assert [shape[:2] for shape in chooser.seen] == [(3, 10), *[(3, 1)] * 5]
        mask = torch.cat([LEFT_PADDED, torch.ones(3, 6, dtype=torch.int64)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(out.sequences, attention_mask=mask, position_ids=places).logits[:, 9:-1]
        torch.testing.assert_close(torch.stack(out.logits, 1), whole.float(), rtol=1e-5, atol=1e-6)
        for more in ({"use_cache": False}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}):
            tokens = model.generate(IDS, **how, **more)
            if "num_beams" not in more:
                assert torch.equal(tokens, out.sequences)
            elif "use_cache" not in more:
                beams = tokens
            else:
                assert torch.equal(tokens, beams)
        cut = model.run_suffix(model.run_prefix(IDS, LEFT_PADDED), LEFT_PADDED)
        assert torch.equal(cut, model.decoder(IDS, attention_mask=LEFT_PADDED).last_hidden_state)
    assert not torch.equal(out.sequences, model.generate(IDS, **how))


@torch.no_grad()
def test_parameters_are_stacked_once_in_a_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew in the next one."""
    model, chooser, stacked = mixed(configs=CONFIGS), Chooser(), []
    made = mixing._stacked
    monkeypatch.setattr(mixing, "_stacked", lambda adapters: (stacked.append(adapters), made(adapters))[1])
    with model.mixing(NAMES, chooser):
        first = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert len(stacked) == 6  # at the layers of each, none of which are alike at one place
        for name in NAMES:
            draw(model, name)
        assert not torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), first)


@pytest.mark.parametrize(
    ("index", "weight", "message"),
    [
        (torch.zeros(3, 9, 1).long(), None, "index: expected one entry for each token of the batch, (3, 10), got (3,"),
        (torch.zeros(2, 10, 1).long(), None, "index: expected one entry for each token of the batch, (3, 10), got (2,"),
        (torch.zeros(3, 10, 0).long(), None, "index: expected shape (B,) or (B, K) with K >= 1, or (B, L, K), got"),
        (torch.zeros(3, 10, 1).long(), torch.ones(3, 10), "weight: expected shape (3, 10, 1) on cpu like index"),
        (torch.full((3, 10, 1), 2), None, "index: expected values from -1 to 1, got 2 to 2"),
    ],
)
def test_refuses_what_does_not_fit(index: Tensor, weight: Tensor | None, message: str) -> None:
    model = mixed(configs=CONFIGS)
    for given in (index, lambda hidden: (index, weight)):
        with (
            pytest.raises(ValueError, match=re.escape(message)),
            model.mixing(["a", "b"], given, weight if given is index else None),
        ):
            model(IDS)


def test_choices_of_a_prompt_s_tokens_do_not_generate() -> None:
    model = mixed(configs=CONFIGS)
    message = r"index: expected shape \(B,\) or \(B, K\) in generate, whose new tokens have no entry, got \(3, 10, 2\)"
    with pytest.raises(ValueError, match=message), model.mixing(["a", "b"], torch.zeros(*IDS.shape, 2).long()):
        model.generate(IDS, max_new_tokens=2)
