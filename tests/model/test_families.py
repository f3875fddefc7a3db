"""Every causal language model of transformers is right with adapters, or refused with a reason.

An accepted one computes exactly what the same adapters compute as forward hooks. It trains, resumes, saves and loads;
reusing the activations below the first adapter changes nothing; padding changes nothing. What it does not support is
refused, and stands in docs/families.md: ``python -m tests.support.families`` prints that page's tables.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import adapterkern as ak
from adapterkern.ops import native, normed
from adapterkern.training.data.examples import Example, load_examples
from adapterkern.training.data.prefix import choose_cache
from tests.support import families, tiny_run
from tests.support.families import IDS, LENGTHS, adapted, padded, short

pytestmark = families.LISTED
# One of each kind: plain, capped logits, experts, linear attention, two streams per token, positions that count, own
# order of arguments, and refused.
FAST = ("Llama", "Gemma2", "Mixtral", "Qwen3Next", "FalconH1", "Ministral3", "XGLM", "GPT2")
NAMES = [
    pytest.param(name, id=short(name), marks=() if short(name) in FAST else pytest.mark.slow)
    for name in families.families()
]
SUMS = (torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.add)
# What they add is not the layer's input itself (scaled, normed), or they add it last.
SUMS_OTHERWISE = ("Beam", "DeepseekV4", "Doge", "MiniMax", "Phi", "Zaya")  # see test_sites.py
ROWS = [{"input_ids": row[:n].tolist()} for row, n in zip(IDS, LENGTHS, strict=True)]


def config(**values: Any) -> Any:
    """Two steps over three rows, in batches of one shape, so that a cache changes no bit."""
    shape = {"batch_size": 3, "padding": "max_length", "max_length": IDS.shape[1], "max_steps": 2}
    return tiny_run.quiet(**({"task": "causal-lm", "prefix_cache": False} | shape | values))


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str, tmp_path: Path) -> None:
    found = families.find(name)
    assert families.documented()[name] == families.row(name, found)
    if isinstance(found, str):
        return
    computes_what_hooks_do(name)
    runs_amid_layers(name, found)
    pads(name, found)
    mixes(name, found)
    runs_prompts(name)
    fuses(name, found)
    trains(name, found, tmp_path)


def computes_what_hooks_do(name: str) -> None:
    model, bare = adapted(name), families.tiny(name).requires_grad_(False)
    sites: Any = model.adapters["default"]

    def hook(site: Any) -> Any:
        return lambda _, __, out: (site(out[0]), *out[1:]) if isinstance(out, tuple) else site(out)

    for index in sites:
        bare.model.layers[int(index)].register_forward_hook(hook(sites[index]))
    ids, mask = padded("right")
    outcomes = []
    for llama in (model, bare):
        model.zero_grad()
        logits = llama(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits.float().square().sum().backward()
        outcomes.append([logits.detach(), *(p.grad.clone() for p in model.adapter_parameters())])
    assert tiny_run.same_bits(*outcomes)
    assert all(gradient.any() for gradient in outcomes[0])


def runs_amid_layers(name: str, found: families.Found) -> None:
    """``position="attention"``: the first sum with a layer's own input has the adapter after it, and no other."""
    bare = families.tiny(name)
    layers = [len(bare.model.layers) - 1]
    if not found.attention:
        with pytest.raises(ValueError, match=r"position: expected 'layer' for .*, got 'attention', but "):
            ak.LlamaAdapter(bare, ak.AdapterConfig(4, "attention", layers=layers))
        return
    model = ak.LlamaAdapter(families.tiny(name), ak.AdapterConfig(4, "attention", layers=layers)).eval()
    families.draw(model)
    sites: Any = model.adapters["default"]
    layer, site = bare.model.layers[layers[0]], sites[str(layers[0])]
    own, stream, done = type(layer).forward, None, False

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal done
            result = function(*args, **(kwargs or {}))
            if done or function not in SUMS or all(term is not stream for term in args):
                return result
            done = True
            return site(result)

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal stream
        stream = args[0] if args else next(t for n, t in kwargs.items() if n in ("hidden_states", "activations"))
        with Watch():
            return own(layer, *args, **kwargs)

    layer.__dict__["forward"] = forward
    with torch.no_grad():
        got, expected = (llama(IDS, use_cache=False).logits for llama in (model, bare))
        for p in model.adapter_parameters():
            p.zero_()
        without = model(IDS, use_cache=False).logits
        bare.model.layers[layers[0]].__dict__.pop("forward")
        torch.testing.assert_close(without, bare(IDS, use_cache=False).logits)
    assert not torch.equal(got, without)
    if short(name) not in SUMS_OTHERWISE:
        assert done
        assert torch.equal(got, expected)


@torch.no_grad()
def fuses(name: str, found: families.Found) -> None:
    """With the norms that follow, adapters compute the same; each norm takes what it was left, or runs itself."""
    if found.fuse_norm is False:
        return
    model = adapted(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normed, "prefers_eager", lambda *_: False)  # which makes no norm
        expected = model(IDS, use_cache=False).logits
        model.fuse_norm = True
        torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    if native.instruction_set()[0] is None:  # then there is nothing to take
        return
    left = [vars(module)["_missed"] for module in model.base.modules() if "_missed" in vars(module)]
    assert 0 in left


def close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> bool:
    return all((a - b).norm() <= tolerance * b.norm() for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def states(model: ak.LlamaAdapter, ids: Tensor, mask: Tensor) -> list[Tensor]:
    hidden = model.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return [row[real.bool()] for row, real in zip(hidden, mask, strict=True)]


def pads(name: str, found: families.Found) -> None:
    model = adapted(name)
    alone = [
        states(model, row[None, :n], torch.ones(1, n, dtype=torch.int64))[0]
        for row, n in zip(IDS, LENGTHS, strict=True)
    ]
    assert close(states(model, *padded("right")), alone)
    if found.left_padding:
        assert close(states(model, *padded("left")), alone)
    else:
        with pytest.raises(ValueError, match=f"padding_side: expected 'right' for {name}, in which .*; got 'left'"):
            ak.train(model, ROWS, config(padding_side="left"))


@torch.no_grad()
def mixes(name: str, found: families.Found) -> None:
    model = adapted(name)
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=4, layers=[1]))
    families.draw(model, "other")
    names, ids = ["default", "other", "__base__", "default"], IDS[[0, 1, 2, 0]]
    if not found.adapter_names:
        with pytest.raises(ValueError, match=f"adapter_names: expected None for {name}, whose layers pass on several"):
            model(input_ids=ids, adapter_names=names, use_cache=False)
        return
    mixed = model(input_ids=ids, adapter_names=names, use_cache=False).logits
    for row, logits, adapter in zip(ids, mixed, names, strict=True):
        if adapter == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=row[None], use_cache=False).logits[0]
        else:
            model.set_adapter(adapter)
            alone = model(input_ids=row[None], use_cache=False).logits[0]
        assert close([logits], [alone])


def runs_prompts(name: str) -> None:
    """Or says why not. With closed gates it is the backbone, to the bit; then every gate and embedding has a say."""
    llama = families.tiny(name)
    with torch.no_grad():
        bare = llama(input_ids=IDS, use_cache=False).logits
    try:
        model = ak.LlamaAdapter(llama, ak.AdapterConfig(kind="prompt", prompt_length=3)).eval()
    except ValueError as error:
        assert str(error).startswith("kind: expected ")  # noqa: PT017 most run them
        return
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, bare)
        for p in model.adapter_parameters():
            torch.nn.init.normal_(p)
    model(input_ids=IDS, use_cache=False).logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.adapter_parameters())


def trains(name: str, found: families.Found, folder: Path) -> None:
    """A run, and the same one resumed after its first step, with the prefix cached if that is possible."""
    model, before = adapted(name), tiny_run.weights(adapted(name))
    result = ak.train(model, ROWS, config(output_dir=folder, checkpoint_every=1))
    trained = tiny_run.weights(model)
    assert all((p != q).any() for p, q in zip(trained, before, strict=True))
    assert result.checkpoint is not None

    loaded = ak.LlamaAdapter.from_pretrained(families.tiny(name), folder).eval()
    assert tiny_run.same_bits(tiny_run.weights(loaded), trained)
    with torch.no_grad():
        ids, mask = padded("right")
        one, two = (m.eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (model, loaded))
    assert torch.equal(one, two)

    shutil.rmtree(result.checkpoint)
    again = adapted(name)
    cache = True if found.prefix_cache else None
    resumed = ak.train(again, ROWS, config(output_dir=folder, checkpoint_every=1, resume=True, prefix_cache=cache))
    assert resumed.prefix_layers == (2 if found.prefix_cache else 0)
    if (
        found.prefix_cache
    ):  # equal up to rounding: experts sum their tokens in an order that the padding's states decide
        assert close(tiny_run.weights(again), trained, 1e-5)
        return
    assert tiny_run.same_bits(tiny_run.weights(again), trained)
    examples: list[Example] = load_examples(ROWS, config())[0]
    with pytest.raises(ValueError, match=r"prefix_cache: expected None or False, because .*; got True"):
        choose_cache(again, config(prefix_cache=True), examples, passes=2)


def test_the_page_lists_all_families_and_no_others() -> None:
    assert sorted(families.documented()) == sorted(families.families())
