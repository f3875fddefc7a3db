"""LlamaAdapter on tiny random backbones of each accepted family: transparency, switches, checkpointing, files."""

import copy
import json
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor

import adapterkern as ak
from adapterkern.model.decoder import first_layers, keep_layers
from adapterkern.model.files.card import CARD_NAME
from adapterkern.model.files.folder import CONFIG_NAME, WEIGHTS_NAME
from tests.support.tiny_llama import IDS, LEFT_PADDED, adapted, draw, grads, logits, tiny

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")


@pytest.mark.parametrize("position", ["layer", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_position(family: str, position: str) -> None:
    llama = tiny(family)
    expected = logits(llama)
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=4, position=position, every=2, depth=2))
    assert torch.equal(logits(model), expected)  # identity init
    draw(model)
    changed = logits(model)
    assert not torch.allclose(changed, expected)
    model.fused = False
    torch.testing.assert_close(logits(model), changed)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), changed)
    assert torch.equal(logits(model.unload()), expected)


@pytest.mark.parametrize("position", ["layer", "attention"])
def test_positions_are_where_they_say(position: str) -> None:
    """Each position against the layer written out by hand."""
    model = adapted(layers=[0], position=position)
    layer: Any  # a module of modules
    layer, adapter = model.layers[0], model.adapters["default"]["0"]
    stream: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _m, args, out: stream.update(x=args[0], y=out)),
        layer.self_attn.register_forward_hook(lambda _m, _args, out: stream.update(attended=out[0])),
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    h = stream["x"] + stream["attended"]
    if position == "attention":
        h = adapter(h)
    y = h + layer.mlp(layer.post_attention_layernorm(h))
    if position == "layer":
        y = adapter(y)
    assert torch.equal(y, stream["y"])


def test_backbone_is_frozen_and_its_state_dict_untouched() -> None:
    llama = tiny()
    keys = set(llama.state_dict())
    model = adapted(llama)
    assert set(llama.state_dict()) == keys
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("adapters.")
    }
    before = copy.deepcopy(llama.state_dict())
    optimizer = torch.optim.SGD(model.adapter_parameters(), lr=0.1)
    grads(model)
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_backbone_keeps_its_dtype_and_adapters_theirs(dtype: torch.dtype) -> None:
    model = adapted(tiny().to(dtype))
    assert {p.dtype for p in model.base.parameters()} == {dtype}
    assert {p.dtype for p in model.adapter_parameters()} == {torch.float32}
    assert logits(model).dtype == dtype
    assert {g.dtype for g in grads(model)} == {torch.float32}


def test_generate_with_cache_equals_without() -> None:
    model = adapted()
    kwargs = {"attention_mask": LEFT_PADDED, "max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    cached = model.generate(IDS, use_cache=True, **kwargs)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **kwargs))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(IDS, **kwargs))


def test_padding_does_not_change_a_row() -> None:
    model = adapted()
    short = IDS[1:2, 3:]
    with torch.no_grad():
        positions = (LEFT_PADDED.cumsum(1) - 1).clamp(min=0)
        padded = model(IDS, attention_mask=LEFT_PADDED, position_ids=positions).logits[1, 3:]
        torch.testing.assert_close(padded, model(short).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["layer", "attention"])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(position: str) -> None:
    def kept(model: ak.LlamaAdapter) -> int:
        held: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            model(IDS, labels=IDS)
        return sum(t.untyped_storage().nbytes() for t in held.values())

    model = adapted(position=position).train()
    plain, plain_kept = grads(model), kept(model)
    model.gradient_checkpointing_enable()
    for a, b in zip(plain, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert kept(model) < plain_kept / 2
    model.gradient_checkpointing_disable()
    assert kept(model) == plain_kept


def test_checkpointing_recomputes_what_was_active_in_the_forward() -> None:
    model = adapted().train()
    expected = grads(model)
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=3, every=2))
    model.gradient_checkpointing_enable()
    model.zero_grad()
    loss = model(IDS, attention_mask=LEFT_PADDED, labels=IDS).loss
    model.set_adapter("other")
    with model.disable_adapter():
        loss.backward()
    for p, e in zip(model.adapter_parameters("default"), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=0, atol=0)
    assert all(p.grad is None for p in model.adapter_parameters("other"))
    assert model.active_adapter == "other"
    with pytest.raises(ValueError, match="use_reentrant=False, got True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_stops_at_the_first_adapter(checkpointing: bool) -> None:
    model = adapted(layers=[2]).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    reached = []
    for index, layer in enumerate(model.layers):
        layer.mlp.act_fn.register_full_backward_hook(lambda *_, index=index: reached.append(index))
    grads(model)
    assert set(reached) == {3}


def test_named_adapters(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    first = logits(model)
    model.add_adapter("second", ak.AdapterConfig(adapter_dim=2, position="attention"))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    draw(model)
    second = logits(model)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="name: expected a new name, got 'second'"):
        model.add_adapter("second", ak.AdapterConfig())
    model.delete_adapter("default")
    assert model.active_adapter is None
    assert "delete_adapter: no adapter is active now; set_adapter chooses second" in caplog.messages
    with model.disable_adapter():
        bare = logits(model)
    assert torch.equal(logits(model), bare)
    with pytest.raises(ValueError, match="name: expected one of second, got 'default'"):
        model.set_adapter("default")
    for name in ("", "a.b", "keys"):
        with pytest.raises(ValueError, match="name: expected"):
            model.add_adapter(name, ak.AdapterConfig())


def test_deepcopy_is_independent() -> None:
    model = adapted()
    before = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    draw(other)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(other), before)


def test_a_budget_chooses_the_dimension(capsys: pytest.CaptureFixture[str]) -> None:
    model = ak.LlamaAdapter(tiny(), ak.AdapterConfig(every=2, max_params=3000))
    trainable, total = model.get_nb_trainable_parameters()
    assert model.adapter_config().adapter_dim == (1500 - 96) // 65
    assert trainable == sum(p.numel() for p in model.adapter_parameters()) <= 3000
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,} || all params: {total:,} ||")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("position", "layers", "length"), [("layer", [2, 3], 3), ("attention", [2, 3], 2), ("attention", [0], 0)]
)
def test_prefix_and_suffix_are_the_decoder_bit_for_bit(
    family: str, position: str, layers: list[int], length: int
) -> None:
    model = adapted(tiny(family), position=position, layers=layers)
    assert model.prefix_length == length
    with torch.no_grad():
        expected = model.decoder(IDS, attention_mask=LEFT_PADDED).last_hidden_state
        hidden = model.run_prefix(IDS, LEFT_PADDED)
        assert torch.equal(model.run_suffix(hidden, LEFT_PADDED), expected)
        with model.disable_adapter():
            assert model.prefix_length == 4
            bare = model.run_suffix(model.run_prefix(IDS, LEFT_PADDED), LEFT_PADDED)
            assert torch.equal(bare, model.decoder(IDS, attention_mask=LEFT_PADDED).last_hidden_state)
    assert len(model.layers) == model.config.num_hidden_layers == 4


def test_sliding_window_layers_keep_their_kind_when_cut() -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = adapted(
        tiny("Qwen2", use_sliding_window=True, sliding_window=3, layer_types=types, max_window_layers=0), layers=[2]
    )
    with torch.no_grad():
        expected = model.decoder(IDS).last_hidden_state
        assert torch.equal(model.run_suffix(model.run_prefix(IDS)), expected)


def test_every_way_to_cut_keeps_the_layers_and_their_kinds() -> None:
    """In place, and as a student; both against a model that was built with two layers."""
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    fields = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
    small = tiny("Qwen2", num_hidden_layers=2, layer_types=types[:2], **fields)
    llama = tiny("Qwen2", layer_types=types, **fields)
    small.load_state_dict(llama.state_dict(), strict=False)
    before = logits(llama)
    student = first_layers(llama, 2)
    assert torch.equal(logits(student), logits(small))
    assert torch.equal(logits(llama), before)
    keep_layers(llama.model, 0, 2)
    assert torch.equal(logits(llama), logits(small))
    for cut in (student, llama):
        assert len(cut.model.layers) == cut.config.num_hidden_layers == cut.model.config.num_hidden_layers == 2
        assert cut.config.layer_types == types[:2]


def test_save_and_load(tmp_path: Path) -> None:
    model = adapted(depth=2, position="attention", activation="gelu")
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS_NAME, CONFIG_NAME, CARD_NAME}
    loaded = ak.LlamaAdapter.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), logits(model))
    draw(model)
    model.save_pretrained(tmp_path)  # over the first
    assert torch.equal(logits(ak.LlamaAdapter.from_pretrained(tiny(), tmp_path).eval()), logits(model))


def test_load_refuses_another_backbone_with_both_shapes(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hidden_size=32 and 4 layers, got one of hidden_size=16 and 4 layers"):
        ak.LlamaAdapter.from_pretrained(tiny(hidden_size=16), tmp_path)
    other = tiny(num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"hidden_size=32 and 4 layers, got one of hidden_size=32 and 5 layers"):
        ak.LlamaAdapter.from_pretrained(other, tmp_path)
    ak.LlamaAdapter(other)  # and leaves it as it was


def _edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / CONFIG_NAME).read_text())
    (path / CONFIG_NAME).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: (p / CONFIG_NAME).unlink(), FileNotFoundError, CONFIG_NAME),
        (lambda p: (p / WEIGHTS_NAME).unlink(), FileNotFoundError, WEIGHTS_NAME),
        (lambda p: (p / CONFIG_NAME).write_text("{"), ValueError, "adapterkern.json: not a JSON file"),
        (lambda p: (p / CONFIG_NAME).write_text("[]"), ValueError, "expected a JSON object, got list"),
        (lambda p: _edit_config(p, format_version=99), ValueError, "expected format_version 1, got 99"),
        (lambda p: _edit_config(p, adapter={"rank": 1}), ValueError, "adapterkern.json: rank: unknown field"),
        (lambda p: _edit_config(p, adapter={"every": "x"}), ValueError, "adapterkern.json: every: expected an int"),
        (lambda p: _edit_config(p, base={}), ValueError, "adapterkern.json: field 'hidden_size' is missing"),
        (lambda p: (p / WEIGHTS_NAME).write_bytes(b"x"), ValueError, "adapterkern.safetensors: SHA-256 differs"),
    ],
)
def test_load_names_the_damaged_file(tmp_path: Path, damage: Any, error: type[Exception], message: str) -> None:
    adapted().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        ak.LlamaAdapter.from_pretrained(tiny(), tmp_path)


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(tensors: object, path: Path, **kwargs: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapterkern.model.files.folder.save_file", fail)
    draw(model)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_refuses_what_is_not_a_llama() -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    with pytest.raises(TypeError, match=r"llama: expected a transformers decoder of LLaMA's .* GPT2LMHeadModel"):
        ak.LlamaAdapter(gpt2)
    llama = tiny()
    ak.LlamaAdapter(llama)
    with pytest.raises(ValueError, match="llama: expected a model without adapters"):
        ak.LlamaAdapter(llama)


@pytest.mark.parametrize("position", ["layer", "attention"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_accelerate_s_device_hooks(position: str, offloaded: bool) -> None:
    """Hooks replace a layer's forward on the instance; offloaded weights are on the meta device between calls."""
    plain = adapted(position=position)
    llama = tiny()
    if offloaded:
        accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    else:
        for layer in llama.model.layers:
            add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    model = ak.LlamaAdapter(llama, plain.adapter_config()).eval()
    model.adapters.load_state_dict(plain.adapters.state_dict())
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model.unload()), logits(tiny()))


def test_refuses_a_model_without_weights() -> None:
    with torch.device("meta"):
        llama = tiny()
    with pytest.raises(ValueError, match="llama: expected a model with its weights loaded"):
        ak.LlamaAdapter(llama)


def test_merge_says_why_not() -> None:
    with pytest.raises(NotImplementedError, match="not a linear map"):
        adapted().merge_and_unload()
