"""Attention in 16 bits on a CPU: written out where that is clearly faster, and only there."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from adapterkern.training import attention, train
from adapterkern.training.attention import fast_attention
from tests.support import tiny_run


def flash(model: Any, shape: tuple[int, int], precision: str) -> bool:
    with fast_attention(model, shape, precision):
        return torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(("faster", "expected"), [(True, False), (False, True)])
def test_short_batches_in_16_bits_take_what_was_measured(
    faster: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(attention, "written_out_is_faster", lambda *shape: asked.append(shape) or faster)
    model = tiny_run.model()
    assert flash(model, (4, 48), "bf16") is expected
    assert asked == [(4, 8, torch.bfloat16, torch.get_num_threads())]
    assert flash(model, (4, 48), "fp16") is expected
    assert flash(model, (4, 129), "bf16")  # long
    assert flash(model, (4, 48), "fp32")
    model.base.to(torch.bfloat16)
    assert flash(model, (4, 48), "fp32") is expected
    model.base.set_attn_implementation("eager")
    assert flash(model, (4, 48), "fp32")
    assert torch.backends.cuda.flash_sdp_enabled()  # and nothing stays


def test_the_measurement_is_made_once_and_compares_both(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    kernel = attention.sdpa_kernel
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: entered.append(backend) or kernel(backend))
    attention.written_out_is_faster.cache_clear()
    first = attention.written_out_is_faster(2, 8, torch.bfloat16, 1)
    assert set(entered) == {SDPBackend.FLASH_ATTENTION, SDPBackend.MATH}
    count = len(entered)
    assert attention.written_out_is_faster(2, 8, torch.bfloat16, 1) is first
    assert len(entered) == count


def test_a_training_learns_the_same_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for faster in (True, False):
        monkeypatch.setattr(attention, "written_out_is_faster", lambda *shape, faster=faster: faster)
        model = tiny_run.model(init="xavier")
        result = train(
            model,
            tiny_run.rows(16),
            tiny_run.quiet(precision="bf16", epochs=1, lr=1e-3),
            tokenizer=tiny_run.tokenizer(),
        )
        found[faster] = [entry["loss"] for entry in result.history if "loss" in entry]
    assert found[True]
    assert found[True] == pytest.approx(found[False], rel=2e-2)
    assert found[True] != found[False]  # another kernel ran


def test_checkpointed_layers_recompute_with_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "written_out_is_faster", lambda *shape: True)
    model = tiny_run.model(init="xavier")
    model.gradient_checkpointing_enable()
    config = tiny_run.quiet(precision="bf16", epochs=1)
    assert train(model, tiny_run.rows(8), config, tokenizer=tiny_run.tokenizer()).steps == 2
