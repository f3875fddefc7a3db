"""Stacks: adapters one after the other, in forward, backward and generate, alone and mixed in a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkern as ak
from tests.support.tiny_llama import IDS, LEFT_PADDED, draw, grads, logits, tiny

CONFIGS: dict[str, dict[str, Any]] = {
    "domain": {"layers": [1, 3]},
    "between": {"layers": [1, 2], "adapter_dim": 6, "position": "attention"},
    "beside": {"layers": [1], "position": "parallel-mlp"},
    "task": {"layers": [1, 3], "depth": 2},
    "other": {"layers": [2, 3]},
}


def stacked(*names: str, llama: Any = None) -> ak.LlamaAdapter:
    model = ak.LlamaAdapter(tiny() if llama is None else llama, None)
    for name, config in CONFIGS.items():
        model.add_adapter(name, ak.AdapterConfig(**{"adapter_dim": 4} | config))
        draw(model, name)
    if names:
        model.set_adapter(list(names))
    return model.eval()


@pytest.mark.parametrize("names", [("domain", "between", "beside", "task"), ("task", "beside", "between", "domain")])
def test_a_stack_against_the_layers_by_hand(names: tuple[str, ...]) -> None:
    model = stacked(*names)
    streams: list[dict[str, Any]] = [{} for _ in model.layers]
    for layer, stream in zip(model.layers, streams, strict=True):
        layer.register_forward_hook(lambda _m, args, out, s=stream: s.update(x=args[0], y=out))
        layer.self_attn.register_forward_hook(lambda _m, _args, out, s=stream: s.update(attended=out[0]))
    logits(model)
    for index, (layer, stream) in enumerate(zip(model.layers, streams, strict=True)):
        adapters: dict[str, Any] = {name: model.adapters[name] for name in names}
        sites = {name: of[str(index)] for name, of in adapters.items() if str(index) in of}
        h = stream["x"] + stream["attended"]
        if "between" in sites:
            h = sites["between"](h)
        y = h + layer.mlp(layer.post_attention_layernorm(h))  # type: ignore[operator]
        for name in sites:
            if name != "between":
                y = sites[name](y, h) if name == "beside" else sites[name](y)
        torch.testing.assert_close(stream["y"], y, rtol=0, atol=0)
    assert model.active_adapter == names[-1]
    assert model.active_adapters() == list(names)
    assert model.prefix_length == 1  # below the stream of layer 1 that the second reads
    model.set_adapter(["domain", "other"])
    assert model.prefix_length == 2
    ids, mask = IDS, LEFT_PADDED
    with torch.no_grad():
        whole = model.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        prefix = model.run_prefix(ids, mask)
        torch.testing.assert_close(model.run_suffix(prefix, mask), whole)


def test_gated_prompts_below_and_above_a_bottleneck() -> None:
    """They are inside attention, so that the order of the two does not matter."""
    model = stacked()
    model.add_adapter("prompts", ak.AdapterConfig(kind="prompt", prompt_length=3, layers=[1, 2]))
    for prompt in model.adapters["prompts"].children():
        prompt.gate.data.fill_(0.7)  # type: ignore[operator]
    model.set_adapter(["prompts", "domain"])
    both = logits(model)
    model.set_adapter(["domain", "prompts"])
    assert torch.equal(logits(model), both)
    assert model.prefix_length == 1
    model.set_adapter("domain")
    alone = logits(model)
    names: list[Any] = [["prompts", "domain"], *["domain"] * (len(IDS) - 1)]
    with torch.no_grad():
        mixed = model(IDS, attention_mask=LEFT_PADDED, adapter_names=names).logits
    torch.testing.assert_close(mixed, torch.cat([both[:1], alone[1:]]))
    model.set_adapter("prompts")
    sites: Any = model.adapters["domain"]
    hooks = [model.layers[n].register_forward_hook(lambda _m, _args, out, n=n: sites[str(n)](out)) for n in (1, 3)]
    assert torch.equal(logits(model), both)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(logits(model), both)
    model.add_adapter("more", ak.AdapterConfig(kind="prompt", layers=[3]))
    with pytest.raises(
        ValueError, match="kind: expected at most one adapter of gated prompts in a stack, got prompts, more"
    ):
        model.set_adapter(["prompts", "domain", "more"])


def test_the_order_and_each_adapter_count() -> None:
    model = stacked("domain", "task")
    both = logits(model)
    model.set_adapter(["task", "domain"])
    assert not torch.allclose(logits(model), both)
    model.set_adapter(["task"])
    alone = logits(model)
    model.set_adapter("task")
    assert torch.equal(logits(model), alone)
    assert not torch.allclose(alone, both)
    model.set_adapter(["domain", "task"])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny()))
    model.fused = False
    torch.testing.assert_close(logits(model), both)
    reference = model.reference("task")
    model.delete_adapter("domain")
    assert model.active_adapters() == []
    torch.testing.assert_close(logits(reference), both)
    model.set_adapter("task")
    torch.testing.assert_close(logits(model), alone)


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
def test_a_recomputed_layer_runs_the_stack_of_its_forward() -> None:
    model = stacked("domain", "between", "task").train()
    expected = grads(model)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    loss = model(IDS, attention_mask=LEFT_PADDED, labels=IDS).loss
    model.set_adapter("other")
    loss.backward()
    for p, gradient in zip(model.adapter_parameters("task"), expected, strict=True):
        assert torch.equal(p.grad, gradient)
    assert all(p.grad is not None for name in ("domain", "between") for p in model.adapter_parameters(name))


STACKS: list[Any] = [
    ["domain", "between", "task"],
    "other",
    "__base__",
    ["domain", "beside", "other"],
    ["task", "domain"],
]


@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_that_mixes_stacks(fused: bool) -> None:
    """Each sequence gets what its stack alone gives, and so do the gradients and ``generate``."""
    model = stacked()
    model.fused = fused
    ids = torch.cat([IDS, IDS.flip(0)])[: len(STACKS)]
    direction = torch.randn(len(STACKS), 10, 128, generator=torch.Generator().manual_seed(5))

    def run(rows: slice, **how: Any) -> Tensor:
        return model(ids[rows], **how).logits

    def gradients(got: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (got * direction).sum().backward()
        return {name: p.grad.clone() for name, p in model.adapters.named_parameters()}

    each, texts = [], []
    for row, stack in enumerate(STACKS):
        if stack == "__base__":
            with model.disable_adapter():
                each.append(run(slice(row, row + 1)))
                texts.append(model.generate(ids[row : row + 1], max_new_tokens=5, do_sample=False, eos_token_id=-1))
            continue
        model.set_adapter(stack)
        each.append(run(slice(row, row + 1)))
        texts.append(model.generate(ids[row : row + 1], max_new_tokens=5, do_sample=False, eos_token_id=-1))
    expected = torch.cat(each)
    wanted = gradients(expected)
    got = run(slice(None), adapter_names=STACKS)
    torch.testing.assert_close(got, expected)
    for name, gradient in gradients(got).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    together = model.generate(ids, adapter_names=STACKS, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    assert torch.equal(together, torch.cat(texts))
    stacks = [stack for stack in STACKS if stack != "__base__"]
    with torch.no_grad(), model.mixing(stacks, torch.tensor([0, 1, -1, 2, 3])):
        assert model.prefix_length == 1
        torch.testing.assert_close(run(slice(None)), got)
    with torch.no_grad(), model.mixing(stacks, lambda _: (torch.tensor([0, 1, -1, 2, 3]), None)):
        torch.testing.assert_close(run(slice(None)), got)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ValueError, r"name: expected at least one name in a stack and none twice, got \[\]"),
        (["task", "task"], ValueError, r"none twice, got \['task', 'task'\]"),
        (["task", "nobody"], ValueError, "name: expected some of domain, between, .*, got 'nobody'"),
        (["task", None], TypeError, "name: expected the names of a stack, the lowest first, got"),
        (["task", ["domain"]], TypeError, "name: expected the names of a stack"),
    ],
)
def test_no_stack(names: Any, error: type[Exception], message: str) -> None:
    model = stacked("domain", "task")
    with pytest.raises(error, match=message):
        model.set_adapter(names)
    assert model.active_adapters() == ["domain", "task"]
    with pytest.raises(error, match=message.replace("name: ", "adapter_names: ")):
        model(IDS, adapter_names=["task", names, "other"])


def test_copies_of_modules_in_a_stack() -> None:
    """Of two adapters of a stack both have their own modules; one module has a copy in one of them alone."""
    model = stacked("domain", "task")
    for name, modules in (("tokens", ["embed_tokens"]), ("norm", ["norm"]), ("all", ["embed_tokens", "mlp"])):
        model.add_adapter(name, ak.AdapterConfig(adapter_dim=4, layers=[2], modules_to_save=modules))
    both = logits(model)
    model.set_adapter(["tokens", "domain", "norm", "task"])
    torch.testing.assert_close(logits(model), both)  # the copies are the backbone's so far, and the adapters identity
    assert model.trains_below()
    assert model.prefix_length == 0
    with torch.no_grad():
        for name in ("tokens", "norm"):
            model.adapters[name]["modules_to_save"].get_parameter(
                {"tokens": "model.embed_tokens.weight", "norm": "model.norm.weight"}[name]
            ).mul_(0.5)
        changed = logits(model)
        llama = tiny()
        llama.model.embed_tokens.weight.mul_(0.5)
        llama.model.norm.weight.mul_(0.5)
    by_hand = ak.LlamaAdapter(llama, None)
    for name in ("domain", "task"):
        by_hand.add_adapter(name, model.adapter_config(name))
        by_hand.adapters[name].load_state_dict(model.adapters[name].state_dict())
    by_hand.set_adapter(["domain", "task"])
    torch.testing.assert_close(logits(by_hand), changed)
    with pytest.raises(ValueError, match=r"modules_to_save: .* of 'all' and model.embed_tokens of 'tokens'"):
        model.set_adapter(["tokens", "all"])
