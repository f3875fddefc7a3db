"""Padding changes no row's states, or it is refused or named."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import adapterkern as ak
from adapterkern.training.data import padding
from tests.support import families, tiny_run

pytestmark = families.LISTED
ROWS = [{"input_ids": list(range(3, 3 + n)), "label": "ab"[n % 2]} for n in (20, 13, 5)]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
COUNTED = ROPE | {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8}
DYNAMIC = ROPE | {"rope_type": "dynamic", "factor": 8.0}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "dynamic NTK": ("LlamaForCausalLM", {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
    # their queries grow with the position, from the eighth or the fourth on
    "Ministral 3": ("Ministral3ForCausalLM", {"rope_parameters": COUNTED}),
    "Llama 4": ("Llama4ForCausalLM", {"floor_scale": 4, "attn_scale": 0.5}),
}


def adapted(kind: str) -> ak.LlamaAdapter:
    name, fields = BACKBONES[kind]
    model = ak.LlamaAdapter(families.tiny(name, **fields), ak.AdapterConfig(adapter_dim=4, layers=[1, 3]))
    families.draw(model)
    return model


def config(**values: Any) -> ak.TrainConfig:
    return tiny_run.quiet(**({"max_length": 32, "max_steps": 1, "lr": 1e-12, "log_every": 1} | values))


def loss(kind: str, rows: Any = ROWS, **values: Any) -> float:
    return ak.train(adapted(kind), rows, config(**values)).history[0]["loss"]


@pytest.mark.parametrize("values", [{}, {"padding": "max_length"}, {"task": "causal-lm"}], ids=str)
def test_the_side_changes_nothing(values: dict[str, Any]) -> None:
    assert loss("Llama", padding_side="left", **values) == pytest.approx(loss("Llama", **values), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Ministral 3", torch.float32), ("Ministral 3", torch.bfloat16), ("Llama 4", torch.float32)],
)
def test_positions_that_count(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(kind)
    model.base.to(dtype)
    left = config(padding_side="left", output_dir=tmp_path / "run")
    refused = pytest.raises(ValueError, match=r"padding_side: expected 'right' for M?\w+, in which .*; got 'left'")
    with refused:
        ak.train(model, ROWS, left)
    assert not list(tmp_path.glob("run/*"))
    result = ak.train(model, ROWS, config())
    with refused:
        ak.evaluate(model, ROWS, left, head=result.head)


def test_positions_that_do_not_count_yet() -> None:
    short = [{**row, "input_ids": row["input_ids"][:n]} for row, n in zip(ROWS, (7, 5, 3), strict=True)]
    right, left = (loss("Ministral 3", short, padding_side=side) for side in ("right", "left"))
    assert left == pytest.approx(right, rel=1e-5)


def test_states_that_depend_on_the_batch_s_length_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loss("Llama")
        loss("dynamic NTK", padding="max_length")
        loss("dynamic NTK", [ROWS[0], ROWS[0] | {"label": "b"}])
        assert not caplog.text
        loss("dynamic NTK")
    assert caplog.text.count("the states of a row depend on how far it is padded") == 1


def test_texts_that_are_too_long_for_the_backbone(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted("Llama")
    model.config.max_position_embeddings = 10
    ak.train(model, ROWS, config())
    longer = sum(len(row["input_ids"]) > 10 for row in ROWS)
    assert 0 < longer < len(ROWS)
    assert caplog.messages == [
        f"max_length: {longer} texts, the longest of 20 tokens, are longer than what LlamaForCausalLM was made for "
        "(max_position_embeddings=10); a smaller max_length cuts them"
    ]
    caplog.clear()
    ak.train(model, ROWS, config(max_length=10))
    assert "max_position_embeddings" not in caplog.text


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 16),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2}, 16),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"factor": None}}, 32),
        ({"rope_type": "dynamic", "factor": 2.0}, math.inf),
        (None, 16),
    ],
    ids=str,
)
def test_positions_of_scaled_rope(rope: Any, positions: float) -> None:
    assert padding.context_length(SimpleNamespace(max_position_embeddings=16, rope_parameters=rope)) == positions
    assert padding.context_length(SimpleNamespace(rope_parameters=rope)) == math.inf


def test_nothing_is_asked_where_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkern.training.data.padding._states", None)
    loss("Llama", padding="max_length")
    loss("Llama", batch_size=1, padding_side="left")
    with pytest.raises(TypeError):
        loss("Llama", padding_side="left")


def test_a_backbone_that_does_not_run_is_refused(tmp_path: Path) -> None:
    name = "Qwen4ExpForCausalLM"  # its layers pass on four streams as one
    model = ak.LlamaAdapter(families.tiny(name), ak.AdapterConfig(adapter_dim=4, layers=[1]))
    with pytest.raises(ValueError, match=rf"model: expected a backbone that runs on .*, got {name} \(.* 32 channels"):
        ak.train(model, ROWS, config(output_dir=tmp_path / "run"))
    assert not list(tmp_path.glob("run/*"))
