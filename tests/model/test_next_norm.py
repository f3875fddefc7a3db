"""``fuse_norm``: an adapter makes the output of the RMSNorm that reads its y, where the norm would make the same."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import adapterkern as ak
from adapterkern.model import liger, next_norm
from adapterkern.model.next_norm import NextNorm, TakingNorm, ask
from adapterkern.ops import native, normed
from adapterkern.ops.normed import Made
from adapterkern.training.compiled import compiled_layers
from tests.support.tiny_llama import IDS, LEFT_PADDED, adapted, draw, grads, logits, tiny

EVERYWHERE = [0, 1, 2, 3]
pytestmark = pytest.mark.skipif(
    native.instruction_set()[0] is None, reason="no native kernels here: norms run by themselves"
)


@pytest.fixture(autouse=True)
def handed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The norms that were left an output, by class; the CPU kernels make it, where there are some."""
    found: list[str] = []
    hand = NextNorm.hand

    def noted(self: NextNorm, y: Tensor, made: Made) -> None:
        found.append(type(self.norm).__name__)
        hand(self, y, made)

    monkeypatch.setattr(NextNorm, "hand", noted)
    monkeypatch.setattr(normed, "prefers_eager", lambda *_: False)
    next_norm._say.cache_clear()
    return found


def all_taken(model: ak.LlamaAdapter) -> bool:
    return not any(vars(module).get("_missed", 0) for module in model.base.modules())


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.message.startswith("fuse_norm")]


def same_as_apart(model: ak.LlamaAdapter, run: Callable[[], Any], **tolerance: float) -> None:
    """What ``run`` returns with the norms fused and without."""
    model.fuse_norm = False
    expected = run()
    model.fuse_norm = True
    torch.testing.assert_close(run(), expected, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


@pytest.mark.parametrize("position", ["layer", "attention"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Granite", "Mixtral"])
def test_results_are_those_of_adapter_and_norm(family: str, position: str, handed: list[str]) -> None:
    model = adapted(tiny(family), layers=EVERYWHERE, position=position)
    for norm in (module for module in model.base.modules() if type(module).__name__.endswith("RMSNorm")):
        nn.init.normal_(norm.weight, mean=0.3, std=0.3)  # Gemma multiplies by one more
    same_as_apart(model, lambda: [logits(model), *grads(model)])
    assert len(handed) == 2 * len(EVERYWHERE)  # once without gradients, and once with them
    assert all_taken(model)


@pytest.mark.parametrize("depth", [1, 2])
def test_in_bf16(depth: int, handed: list[str]) -> None:
    model = adapted(tiny().to(torch.bfloat16), layers=EVERYWHERE, depth=depth, scale=0.5, learned_scale=True)
    same_as_apart(model, lambda: [logits(model), *grads(model)], rtol=0.1, atol=0.02)
    assert len(handed) == 8
    assert all_taken(model)


def test_under_autocast_with_dropout(handed: list[str]) -> None:
    model = adapted(layers=EVERYWHERE, dropout=0.3, learned_scale=True).train()

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            return grads(model)

    same_as_apart(model, run, rtol=0.1, atol=0.02)
    assert len(handed) == 4


def test_norms_in_another_dtype_than_the_stream_run_by_themselves(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(tiny().to(torch.bfloat16))
    for module in model.base.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.float()
    model.base.lm_head.float()  # what the last norm leaves is in fp32 then
    model.fuse_norm = True
    last = model.decoder.norm
    y = torch.randn(2, 32).to(torch.bfloat16)
    assert NextNorm(last, None).factor(y) is None
    assert said(caplog) == [
        "fuse_norm: a norm runs by itself: LlamaRMSNorm in torch.float32 is not an RMSNorm from torch.bfloat16 to "
        "torch.bfloat16"
    ]


@pytest.mark.parametrize("position", ["layer", "attention"])
def test_checkpointed_layers_run_their_norms(
    position: str, handed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What a layer saves when it runs again must be what it saved before, whatever has changed in between."""
    model = adapted(layers=EVERYWHERE, position=position).train()
    model.gradient_checkpointing_enable()
    same_as_apart(model, lambda: grads(model))
    assert handed == []
    assert said(caplog) == ["fuse_norm: a norm runs by itself: activations are checkpointed"]


def test_y_is_all_that_is_kept_for_both() -> None:
    """transformers' norm keeps a copy of y in fp32 besides its square's mean."""
    model = adapted(tiny().to(torch.bfloat16), layers=EVERYWHERE, position="attention")

    def kept() -> int:
        sizes: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        alive = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t), note(t))[1], lambda t: t):
            model(IDS, labels=IDS)
        return sum(sizes.values())

    apart = kept()
    model.fuse_norm = True
    assert kept() <= apart - len(EVERYWHERE) * IDS.numel() * 32 * 2  # of each norm fp32 and what is normed; y is kept


def test_generation_and_its_cache(handed: list[str]) -> None:
    model = adapted(layers=EVERYWHERE, position="attention")
    same_as_apart(model, lambda: model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert len(handed) == 4 * 5


def test_modes_in_which_nothing_is_left(handed: list[str]) -> None:
    model = adapted(layers=EVERYWHERE)
    model.fuse_norm = True
    with torch.inference_mode():
        model(IDS)
    torch.compile(model.base.model, backend="eager")(IDS, use_cache=False)
    with model.disable_adapter():
        model(IDS)
    assert handed == []


def test_compiled_layers_run_their_norms(handed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(layers=[0, 1, 2], position="attention").train()
    model.fuse_norm = True
    expected = grads(model)
    count = len(handed)
    with compiled_layers(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "adapterkern.training.compiled._compiled",
            lambda: lambda part, written, layer, *a, **k: part(layer, *a, **k),
        )
        torch.testing.assert_close(grads(model), expected, rtol=1e-4, atol=1e-5)
    assert len(handed) == count == 3
    assert said(caplog) == ["fuse_norm: a norm runs by itself: the layer that runs it is compiled"]


def test_what_runs_beside_others_runs_alone(handed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(layers=[1, 3])
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=4, layers=[3]))
    model.add_adapter("beside", ak.AdapterConfig(adapter_dim=4, position="parallel-mlp", layers=[2]))
    for name in ("other", "beside"):
        draw(model, name)
    model.fuse_norm = True
    assert said(caplog) == [
        "fuse_norm: the norm after adapter 'beside' runs by itself at layers [2]: parallel-mlp: it is not alone in "
        "what the norm reads"
    ]

    def run() -> list[Tensor]:
        with torch.no_grad():
            mixed = model(IDS, adapter_names=["default", "other", "__base__"]).logits
            model.set_adapter("beside")
            beside = model(IDS).logits
            model.set_adapter(["default", "other"])  # at layer 1 the first of them is alone
            return [mixed, beside, model(IDS).logits]

    same_as_apart(model, run)
    assert handed == ["LlamaRMSNorm"]
    assert all_taken(model)


def test_an_unfused_or_x_free_adapter(handed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(layers=EVERYWHERE, x_free=True)
    same_as_apart(model, lambda: grads(model))
    assert said(caplog) == [
        "fuse_norm: the norm after adapter 'default' runs by itself at layers [0, 1, 2, 3]: x_free: its adapters keep "
        "y themselves"
    ]
    model.fused = False
    logits(model)
    assert handed == []
    model.fuse_norm = False
    caplog.clear()
    model.fuse_norm = True
    assert said(caplog)[0] == "fuse_norm: has no effect while fused is False or ADAPTERKERN_FUSED=0"


def test_a_stream_that_changes_in_between() -> None:
    class Behind(nn.Module):
        """What a hook of somebody else may do to the stream."""

        def forward(self, module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
            if self.in_place:
                y.mul_(2)
                return None
            return y * 2

        in_place = False

    model, behind = adapted(layers=[1, 2]), Behind()
    for layer in (model.layers[1], model.layers[2]):
        layer.register_forward_hook(behind)
    for behind.in_place in (False, True):
        same_as_apart(model, lambda: logits(model))


def test_a_norm_that_reads_nothing_that_is_left_stops_it(handed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(layers=[1])
    model.layers[1].register_forward_hook(lambda module, args, y: y.clone())
    model.fuse_norm = True
    for _ in range(12):
        logits(model)
    assert len(handed) == 8
    assert said(caplog) == [
        "fuse_norm: a norm runs by itself: LlamaRMSNorm has not read what an adapter left it, 8 times"
    ]


def test_what_was_made_in_another_mode_is_not_taken() -> None:
    norm = adapted().decoder.norm
    norm.__class__ = next_norm._taking_class(type(norm))
    y, wrong = torch.randn(3, 32), torch.zeros(3, 32)
    one = NextNorm(norm, None)
    for grad, hooks in ((True, False), (False, True), (False, False)):
        with torch.no_grad():
            made = Made(norm.weight, 1e-6)
            made.n = wrong
            one.hand(y, made)
        with torch.set_grad_enabled(grad):
            if hooks:
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                    got = norm(y)
            else:
                got = norm(y)
        assert torch.equal(got, wrong) == (not grad and not hooks)
        assert not torch.equal(norm(y), wrong)  # taken once, or not at all


def test_a_norm_that_is_trained(handed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(layers=[3])
    model.fuse_norm = True
    model.decoder.norm.weight.requires_grad_()
    grads(model)
    assert handed == []
    assert said(caplog) == ["fuse_norm: a norm runs by itself: its weight is trained"]
    assert model.decoder.norm.weight.grad is not None


def test_a_norm_that_was_made_in_inference_mode(handed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode():
        base = tiny()
    model = adapted(base, layers=[3])
    model.fuse_norm = True
    with torch.no_grad():
        logits(model)
    assert handed == []
    assert said(caplog) == [
        "fuse_norm: a norm runs by itself: its weight, made in inference mode, does not tell whether it changes"
    ]


def test_a_weight_that_is_changed_without_a_trace_is_read_again(handed: list[str]) -> None:
    model = adapted(tiny("Gemma2"), layers=[3])
    model.fuse_norm = True
    logits(model)
    model.decoder.norm.weight.data.add_(1)
    handed.clear()
    same_as_apart(model, lambda: logits(model))
    assert len(handed) == 1


def test_a_copy_of_a_norm_is_trained_beside_it(handed: list[str]) -> None:
    model = adapted(layers=EVERYWHERE)
    model.fuse_norm = True
    model.add_adapter("more", ak.AdapterConfig(adapter_dim=4, layers=EVERYWHERE, modules_to_save=["norm"]))
    draw(model, "more")
    model.set_adapter("more")
    handed.clear()
    same_as_apart(model, lambda: grads(model))
    assert len(handed) == 3  # not the last one, which has a copy
    model.delete_adapter("more")
    model.set_adapter("default")
    assert model.fuse_norm
    handed.clear()
    logits(model)
    assert len(handed) == 4


def test_the_norms_get_their_class_back() -> None:
    base = tiny()
    before = [type(module) for module in base.modules()]
    keys = list(base.state_dict())
    model = ak.LlamaAdapter(base, ak.AdapterConfig(adapter_dim=4), fuse_norm=True)
    assert model.fuse_norm
    assert sum(isinstance(module, TakingNorm) for module in base.modules()) == 8  # all but the first layer's first
    assert list(base.state_dict()) == keys
    logits(model)
    model.fuse_norm = True  # once more changes nothing
    model.fuse_norm = False
    assert not any(isinstance(module, TakingNorm) or "_missed" in vars(module) for module in base.modules())
    model.fuse_norm = True
    assert [type(module) for module in model.unload().modules()] == before
    with pytest.raises(RuntimeError, match="unload"):
        model.fuse_norm = True


def test_copies_pickles_and_references(handed: list[str]) -> None:
    model = adapted(layers=EVERYWHERE)
    model.fuse_norm = True
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.reference("default")):
        assert other.fuse_norm
        handed.clear()
        torch.testing.assert_close(logits(other), expected)
        assert len(handed) == 4
        assert all_taken(other)
        other.fuse_norm = False
        assert not any(isinstance(module, TakingNorm) for module in other.base.modules())
    assert not any(isinstance(module, TakingNorm) for module in model.reference().modules())
    handed.clear()
    logits(model)
    assert len(handed) == 4


def test_with_liger(handed: list[str]) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    model = adapted(layers=EVERYWHERE)
    expected = logits(model)
    model.fuse_norm = True
    for on in (True, False):
        model.liger = on
        assert model.fuse_norm
        assert any(isinstance(module, liger.Fused) for module in model.base.modules()) is on
        handed.clear()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        assert len(handed) == 4
        assert all_taken(model)
    model.liger = True
    assert not any(isinstance(m, (TakingNorm, liger.Fused)) for m in model.unload().modules())


def test_hooks_of_norms_and_adapters_run(handed: list[str]) -> None:
    model = adapted(layers=[3])
    seen: list[str] = []
    model.decoder.norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.adapters["default"]["3"][0].register_forward_hook(lambda *_: seen.append("adapter"))
    same_as_apart(model, lambda: logits(model))
    assert seen == 2 * ["adapter", "norm"]
    assert len(handed) == 1


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.RMSNorm(16, eps=1e-5), (0, 1e-5)),
        (nn.RMSNorm(16), None),  # which adds what its input's dtype has
        (nn.LayerNorm(16, bias=False), None),
        (nn.LayerNorm(16), None),
        (nn.Linear(16, 16, bias=False), None),
        (nn.Embedding(16, 16), None),
        (nn.PReLU(16), None),
    ],
    ids=str,
)
def test_what_is_an_rms_norm(norm: nn.Module, expected: tuple[int, float] | None) -> None:
    assert ask(norm, torch.float32) == expected


def test_a_backbone_without_such_norms() -> None:
    model = adapted(tiny("Phi"))
    with pytest.raises(ValueError, match="fuse_norm: expected a backbone with an RMSNorm that reads what an adapter"):
        model.fuse_norm = True
    assert not model.fuse_norm
    with pytest.raises(TypeError, match="fuse_norm: expected True or False, got 1"):
        model.fuse_norm = 1  # type: ignore[assignment]


def test_places_without_a_norm_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """OLMo 2 norms what attention and MLP leave: nothing but the last norm reads the stream."""
    model = adapted(tiny("Olmo2"), layers=EVERYWHERE)
    model.fuse_norm = True
    why = "no RMSNorm of the backbone reads what it leaves there"
    assert said(caplog) == [f"fuse_norm: the norm after adapter 'default' runs by itself at layers [0, 1, 2]: {why}"]
    same_as_apart(model, lambda: logits(model))
    caplog.clear()
    model.add_adapter("more", ak.AdapterConfig(adapter_dim=4, layers=[3], position="attention"))
    assert said(caplog) == [f"fuse_norm: the norm after adapter 'more' runs by itself at layers [3]: {why}"]


def test_left_padding_and_hidden_states() -> None:
    model = adapted(layers=EVERYWHERE)

    def run() -> Any:
        with torch.no_grad():
            return model(IDS, attention_mask=LEFT_PADDED, output_hidden_states=True).hidden_states

    same_as_apart(model, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_at_the_states_between(dtype: torch.dtype, handed: list[str]) -> None:
    """All of them: n, which is made with y, is a function of y."""
    model = adapted(tiny().to(dtype), layers=EVERYWHERE)

    def run() -> list[Tensor]:
        out = model(IDS, labels=IDS, output_hidden_states=True)
        return list(torch.autograd.grad(out.loss.float(), out.hidden_states[1:4]))

    low = dtype == torch.bfloat16
    same_as_apart(model, run, **({"rtol": 0.1, "atol": 2e-3} if low else {}))
    assert len(handed) == 4


def test_a_hook_that_asks_for_gradients_or_stops_them() -> None:
    model = adapted(layers=EVERYWHERE)
    model.requires_grad_(False)
    states: list[Tensor] = []

    def ask_for(module: nn.Module, args: Any, y: Tensor) -> None:
        states.append(y.requires_grad_())

    def run() -> Tensor:
        states.clear()
        return torch.autograd.grad(model(IDS, labels=IDS).loss, states[0])[0]

    handle = model.layers[2].register_forward_hook(ask_for)
    same_as_apart(model, run)
    handle.remove()
    model.adapters.requires_grad_(True)
    model.layers[3].register_forward_hook(lambda module, args, y: y.detach_())
    for fuse_norm in (False, True):
        model.fuse_norm = fuse_norm
        assert not model(IDS, labels=IDS).loss.requires_grad


def test_a_norm_that_changes_is_asked_again(handed: list[str]) -> None:
    model = adapted(layers=EVERYWHERE)
    model.fuse_norm = True
    logits(model)
    model.decoder.norm.variance_epsilon = 0.5
    nn.init.normal_(model.layers[1].input_layernorm.weight)
    same_as_apart(model, lambda: logits(model))
    model.base.to(torch.bfloat16)
    model.decoder.norm.float()
    model.base.lm_head.float()
    handed.clear()
    same_as_apart(model, lambda: logits(model), rtol=0.1, atol=0.05)
    assert len(handed) == 3


@pytest.mark.parametrize("kind", ["parametrized", "pruned", "no parameter"])
def test_a_norm_whose_weight_is_no_parameter_of_its_own(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(layers=EVERYWHERE)
    norm = model.decoder.norm
    model.fuse_norm = True
    if kind == "parametrized":
        parametrize.register_parametrization(norm, "weight", nn.Identity())
    elif kind == "pruned":
        prune.random_unstructured(norm, "weight", 0.5)
    else:
        weight = norm.weight.detach()
        del norm.weight
        norm.weight = weight
    norm.requires_grad_(False)
    fused = logits(model)
    assert said(caplog) == ["fuse_norm: a norm runs by itself: its weight is not whole on cpu"]
    model.fuse_norm = False
    torch.testing.assert_close(logits(model), fused, rtol=1e-4, atol=1e-5)
    model.unload()(IDS)


def test_a_forward_that_somebody_has_kept() -> None:
    model = adapted(layers=EVERYWHERE)
    model.fuse_norm = True
    norm = model.decoder.norm
    kept = norm.forward
    norm.forward = lambda x: kept(x)
    expected = logits(model)
    model.fuse_norm = False
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_what_fails_leaves_the_backbone_alone() -> None:
    phi = tiny("Phi")
    for error, fuse_norm in ((ValueError, True), (TypeError, 1)):
        with pytest.raises(error, match="fuse_norm"):
            ak.LlamaAdapter(phi, ak.AdapterConfig(adapter_dim=4), fuse_norm=fuse_norm)
    ak.LlamaAdapter(phi, ak.AdapterConfig(adapter_dim=4))
    base = tiny()
    with pytest.raises(ValueError, match="layers"):
        ak.LlamaAdapter(base, ak.AdapterConfig(adapter_dim=4, layers=[9]), fuse_norm=True)
    assert not any(isinstance(module, TakingNorm) for module in base.modules())


def test_copies_of_all_norms(handed: list[str]) -> None:
    """OLMo 2's last norm is the only one that reads the stream: with a copy of it none is fused, which is no error."""
    model = adapted(tiny("Olmo2"), layers=EVERYWHERE)
    model.fuse_norm = True
    model.add_adapter("more", ak.AdapterConfig(adapter_dim=4, modules_to_save=["norm"]))
    model.set_adapter("more")
    handed.clear()
    grads(model)
    assert model.fuse_norm
    assert handed == []
    model.delete_adapter("more")
    model.set_adapter("default")
    logits(model)
    assert handed == ["Olmo2RMSNorm"]


def test_what_hooks_save_and_copy_is_a_tensor_alone(tmp_path: Path) -> None:
    model = adapted(layers=EVERYWHERE)
    model.fuse_norm = True
    path = tmp_path / "y.pt"
    model.layers[3].register_forward_hook(
        lambda module, args, y: (torch.save(y, path), copy.deepcopy(y.detach()))[:0] or None
    )
    out = model(IDS, output_hidden_states=True)
    assert torch.load(path).shape == out.hidden_states[-1].shape
    assert vars(torch.load(path)) == {}


def test_interrupted_forwards_do_not_stop_it(handed: list[str]) -> None:
    model = adapted(layers=[3])
    model.fuse_norm = True

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.layers[3].register_forward_hook(stop)
    for _ in range(12):
        with pytest.raises(KeyboardInterrupt):
            model(IDS)
    handle.remove()
    handed.clear()
    for _ in range(3):
        logits(model)
    assert len(handed) == 3


def test_nothing_is_kept_when_the_stream_is_gone() -> None:
    model = adapted(layers=EVERYWHERE)
    model.fuse_norm = True
    model.layers[3].register_forward_hook(lambda module, args, y: y.clone())
    logits(model)
    assert len(next_norm._handed) == 0


def test_a_saved_adapter_is_asked_again(tmp_path: Path, handed: list[str]) -> None:
    model = adapted(layers=[3])
    model.fuse_norm = True
    model.save_pretrained(tmp_path)
    expected = logits(model)
    handed.clear()
    again = ak.LlamaAdapter.from_pretrained(model.unload(), tmp_path, fuse_norm=True)
    assert torch.equal(logits(again), expected)
    assert len(handed) == 1
    with pytest.raises(TypeError, match=r"^fuse_norm: expected it in LlamaAdapter\(...\), not in AdapterConfig, got "):
        ak.AdapterConfig(**{"fuse_norm": True})


def test_a_model_of_before_has_it_off() -> None:
    model = adapted()
    for name in ("_next_norms", "_fuse_norm"):
        model.__dict__.pop(name, None)
    assert not model.fuse_norm
    logits(model)
    model.fuse_norm = True
    model.unload()
