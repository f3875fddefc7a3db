"""``liger=True`` in Triton's interpreter: same numbers as the backbone's own modules. Run by test_kernels.py."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime import interpreter

import adapterkern as ak
from adapterkern.model import liger
from bench.measure import kept_for_backward
from tests.support import tiny_run, trainers

functional = pytest.importorskip("liger_kernel.transformers.functional", reason="liger-kernel is not installed")

IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
LABELS = torch.where(torch.arange(9) < 3, -100, IDS)
KERNELS = ("liger_rms_norm", "liger_rope", "liger_swiglu", "liger_fused_linear_cross_entropy")


@pytest.fixture(autouse=True, scope="module")
def _interpretable() -> Any:
    """Add two things that the interpreter lacks: floats as fp32 scalars, and libdevice's rsqrt."""
    from liger_kernel.ops import rms_norm

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", with_floats)
        patch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of Liger's functions is called."""
    counted: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        return call

    for name in KERNELS:
        monkeypatch.setattr(functional, name, counting(name, getattr(functional, name)))
    liger._fused_class.cache_clear()  # an attention's class keeps its rotation function
    return counted


def adapted(kind: str = "llama", **adapter: Any) -> ak.LlamaAdapter:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = ak.LlamaAdapter(
        AutoModelForCausalLM.from_config(config), ak.AdapterConfig(adapter_dim=4, init="xavier", **adapter)
    )
    with torch.no_grad():
        for p in model.base.parameters():  # norms of other weights than 1
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def learn(model: ak.LlamaAdapter, **inputs: Any) -> tuple[Any, list[Tensor]]:
    model.zero_grad()
    outputs = model(**({"input_ids": IDS, "labels": LABELS} | inputs))
    outputs.loss.backward()
    return outputs, [p.grad.clone() for p in model.adapter_parameters()]


def same(model: ak.LlamaAdapter, **inputs: Any) -> None:
    """Loss and gradients with and without Liger's kernels agree to fp32 rounding."""
    model.liger = False
    expected, expected_gradients = learn(model, **inputs)
    model.liger = True
    got, gradients = learn(model, **inputs)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("position", ["layer", "attention"])
@pytest.mark.parametrize("kind", liger.MODEL_TYPES)
def test_learns_as_without(kind: str, position: str, calls: Counter[str]) -> None:
    model = adapted(kind, position=position).train()
    same(model)
    norms = 2 * (4 if kind == "qwen3" else 2) + 1
    rotations = sum(getattr(layer.self_attn, "use_rope", True) for layer in model.layers)
    assert [calls[name] for name in KERNELS] == [norms, rotations, 2, 1]


def test_no_logits_in_training_and_the_same_ones_else() -> None:
    model = adapted()
    model.liger = True
    outputs, _ = learn(model.train())
    assert outputs.logits is None
    with torch.no_grad():
        model.eval()
        got = model(IDS, labels=LABELS)
        torch.testing.assert_close(got.loss, outputs.loss)
        generated = model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False)
        model.liger = False
        torch.testing.assert_close(got.logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(generated, model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize(
    "inputs",
    [
        {"num_items_in_batch": torch.tensor(5)},
        {"attention_mask": (torch.arange(9) > 1).expand(2, 9).long()},
        {"shift_labels": LABELS.roll(-1, 1)},
        {"inputs_embeds": torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2)), "input_ids": None},
    ],
    ids=lambda inputs: next(iter(inputs)),
)
def test_takes_what_a_causal_lm_s_loss_takes(inputs: dict[str, Any]) -> None:
    same(adapted().train(), **inputs)


def test_states_and_tuples_come_with_the_loss() -> None:
    model = adapted().train()
    model.liger = True
    outputs = model(IDS, labels=LABELS, output_hidden_states=True, use_cache=False)
    assert len(outputs.hidden_states) == 3
    loss, states = model(IDS, labels=LABELS, output_hidden_states=True, use_cache=False, return_dict=False)
    torch.testing.assert_close(loss, outputs.loss)
    assert len(states) == 3
    for keep in (2, torch.tensor([7, 8])):  # then no fused loss
        assert model(IDS, labels=LABELS[:, -2:], logits_to_keep=keep).logits.shape == (2, 2, 64)


@pytest.mark.parametrize("return_dict", [True, None])
def test_return_dict(return_dict: bool | None) -> None:
    model = adapted().train()
    model.liger = True
    assert model(IDS, labels=LABELS, return_dict=return_dict).loss > 0


def test_a_loss_of_last_and_earlier_states() -> None:
    """Both get the same gradient tensor from the sum, and a norm's backward must not overwrite it."""
    model, gradients = adapted(), []
    for kernels in (False, True):
        model.liger = kernels
        model.zero_grad()
        states = model(IDS, output_hidden_states=True).hidden_states
        (states[-1] + states[-2]).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.adapter_parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_another_loss_function_is_asked_and_a_label_beyond_the_vocabulary_refused() -> None:
    model = adapted().train()
    model.liger = True
    with pytest.raises(ValueError, match=r"labels: expected token ids from 0 to 63, or -100, got .* to 64"):
        model(IDS, labels=LABELS.clamp(min=64))
    model.loss_function = lambda **kwargs: torch.tensor(7.0)
    assert model(IDS, labels=LABELS).loss == 7


def test_without_an_adapter() -> None:
    """The loss is still the fused one, although nothing requires a gradient."""
    model = ak.LlamaAdapter(adapted().unload(), None, liger=True).train()
    outputs = model(IDS, labels=LABELS)
    assert outputs.logits is None
    model.liger = False
    torch.testing.assert_close(outputs.loss, model(IDS, labels=LABELS).loss, rtol=1e-6, atol=0)


def test_gradient_checkpointing() -> None:
    model = adapted().train()
    model.gradient_checkpointing_enable()
    same(model)


def test_offloaded_weights_come_to_the_kernels_and_the_loss_has_its_logits() -> None:
    model = adapted().train()
    expected, expected_gradients = learn(model)
    accelerate.cpu_offload(model.base, execution_device=torch.device("cpu"))
    model.liger = True
    got, gradients = learn(model)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    model.liger = False
    assert torch.equal(learn(model)[0].logits, expected.logits)


def test_keeps_less_for_the_backward() -> None:
    model = adapted().train()
    kept = []
    for kernels in (False, True):
        model.liger = kernels
        kept.append(kept_for_backward(lambda: model(IDS, labels=LABELS).loss, list(model.parameters()))["kept_bytes"])
    assert kept[1] < 0.9 * kept[0]


def test_a_mixed_batch() -> None:
    model = adapted().train()
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=4, layers=[1], init="xavier"))
    same(model, adapter_names=["default", "other"])


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_a_training_run(task: str) -> None:
    """Two steps and an evaluation: same losses and accuracies as without Liger."""
    runs = []
    for kernels in (False, True):
        model = tiny_run.model()
        model.liger = kernels
        config = tiny_run.quiet(task=task, max_steps=2, log_every=1)
        rows = tiny_run.rows(2, seed=1, low=1, high=1)
        result = ak.train(model, rows, config, tokenizer=tiny_run.tokenizer(), eval_data=rows)
        assert result.metrics is not None
        losses = [record["loss"] for record in result.history if record["kind"] == "train"]
        runs.append((losses, result.metrics["loss"], result.metrics["accuracy"]))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    assert runs[1][1:] == pytest.approx(runs[0][1:], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_in_trainer(tmp_path: Path, smoothing: float) -> None:
    """Smoothed labels need logits, which a forward without labels gives."""
    model = trainers.adapted()
    model.liger = True
    trainers.check_trainer(tmp_path, model, smoothing, steps=2)


def test_in_sft_trainer(tmp_path: Path) -> None:
    model = trainers.adapted()
    model.liger = True
    trainers.check_sft_trainer(tmp_path, model, steps=2)
