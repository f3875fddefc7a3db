"""Packed rows and steps of alike lengths: the losses of the padded run, and less padding."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adapterkern as ak
from adapterkern.recipes.distillation import Distillation, KeepBehaviour
from adapterkern.recipes.multitask import MultiTask
from adapterkern.recipes.qa import QuestionAnswering
from adapterkern.recipes.routing import RoutedTask
from adapterkern.training.data import packing
from adapterkern.training.data.batches import Batch, by_length, collate
from adapterkern.training.data.examples import Example, load_examples
from adapterkern.training.padding import padding_share
from adapterkern.training.task import Task
from tests.support import families, tiny_run
from tests.support.runs import cut, same
from tests.support.tiny_recipes import many_adapters

LENGTHS = (20, 3, 5, 14, 9, 2, 30, 11, 8, 4, 17, 6)
DRAW = torch.Generator().manual_seed(1)
ROWS = [{"input_ids": torch.randint(3, 128, (n,), generator=DRAW).tolist()} for n in LENGTHS]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "eager": ("LlamaForCausalLM", {"attn_implementation": "eager"}),
    "Llama 3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "Mistral": ("MistralForCausalLM", {}),  # a window of 8 tokens
    "Gemma 3": ("Gemma3ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"] * 2}),  # and two RoPEs
    "Qwen 3 MoE": ("Qwen3MoeForCausalLM", {}),
}


def config(**values: Any) -> ak.TrainConfig:
    defaults = {"task": "causal-lm", "max_length": 32, "batch_size": 5, "max_steps": 4, "log_every": 1, "eval_every": 2}
    return tiny_run.quiet(**(defaults | values))


def adapted(kind: str = "Llama") -> ak.LlamaAdapter:
    name, fields = BACKBONES[kind]
    model = ak.LlamaAdapter(families.tiny(name, **fields), ak.AdapterConfig(adapter_dim=4, layers=[2, 3]))
    families.draw(model)
    return model


def learn(
    model: ak.LlamaAdapter, rows: Any = ROWS, task: Any = None, **values: Any
) -> tuple[list[float], list[Tensor]]:
    """Every loss and gradient norm of a run, and what it has learned."""
    eval_rows = rows if task is not None else rows[:7]
    result = ak.train(model, rows, config(**values), tokenizer=tiny_run.tokenizer(), eval_data=eval_rows, task=task)
    numbers = [record[key] for record in result.history for key in ("loss", "grad_norm") if key in record]
    assert len(numbers) == 2 * 4 + 2
    return numbers, [p.detach().clone() for name in model.adapters for p in model.adapter_parameters(name)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Texts and rows of every batch that is packed."""
    shapes: list[tuple[int, int]] = []

    pack = packing.pack

    def watched(examples: Any, *args: Any, **kwargs: Any) -> Batch:
        batch = pack(examples, *args, **kwargs)
        shapes.append((len(examples), len(batch["input_ids"])))
        return batch

    monkeypatch.setattr(packing, "pack", watched)
    monkeypatch.setattr("adapterkern.recipes.multitask.task.pack", watched)
    return shapes


def assert_equal(got: Any, expected: Any) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-6)
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("Llama", {"prefix_cache": False}),
        ("Llama", {"prefix_cache": True, "padding_side": "left"}),
        ("Llama", {"padding": "max_length", "accumulation": 2}),
        ("eager", {"padding_side": "left"}),
        ("Llama 3", {"prefix_cache": False}),
        ("Mistral", {"prefix_cache": True}),
        ("Mistral", {"prefix_cache": False, "padding_side": "left"}),
        ("Gemma 3", {"prefix_cache": True}),
        ("Qwen 3 MoE", {"prefix_cache": False, "group_by_length": True}),
    ],
    ids=str,
)
@families.LISTED
def test_a_packed_run_learns_the_same(kind: str, values: dict[str, Any], seen: list[tuple[int, int]]) -> None:
    expected = learn(adapted(kind), **values)
    assert not seen
    assert_equal(learn(adapted(kind), packing=True, **values), expected)
    texts, rows = np.array(seen).sum(0)
    assert rows < 0.85 * texts


@families.LISTED
def test_an_evaluation_is_that_of_each_text_alone() -> None:
    """Against transformers' logits of one text at a time, without padding, in fp64."""
    model = adapted("Mistral")
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids).logits[0, :-1].double()
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    for side in ("left", "right"):
        found = ak.evaluate(model, ROWS, config(packing=True, padding_side=side))
        assert found["targets"] == count
        assert found["loss"] == pytest.approx(total / count, rel=1e-6)


def test_a_batch_by_hand() -> None:
    """Rows of 10, 6 + 4 and 2 + 2 tokens: the longest first, each into the fullest row with room."""
    lengths = [6, 4, 10, 2, 2]
    assert packing.best_fit(lengths, 10) == [[2], [0, 1], [3, 4]]
    assert packing.best_fit(lengths, 12) == [[2, 3], [0, 1, 4]]
    assert packing.best_fit(lengths, 12, kinds=[0, 1, 0, 1, 0]) == [[2, 4], [0], [1, 3]]
    texts = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths, start=1)]
    gap = [0] * 6, list(range(6))
    for side in ("left", "right"):
        settings = config(packing=True, padding_side=side)
        batch = packing.pack(load_examples([{"input_ids": ids} for ids in texts], settings)[0], settings)
        last, places = [*texts[3], *texts[4]], [0, 1, 0, 1]
        ids = [texts[2], texts[0] + texts[1], gap[0] + last if side == "left" else last + gap[0]]
        counts = [*range(6), *range(4)], gap[1] + places if side == "left" else places + gap[1]
        assert batch["input_ids"].tolist() == ids
        assert batch["position_ids"].tolist() == [list(range(10)), *counts]
        assert batch["starts"].tolist() == [10, 16, 0, *((26, 28) if side == "left" else (20, 22))]
        assert batch["targets"].tolist() == [token for ids in texts for token in ids[1:]]
        assert batch["input_ids"].flatten()[batch["positions"] + 1].tolist() == batch["targets"].tolist()


@families.LISTED
def test_recipes_learn_the_same(seen: list[tuple[int, int]]) -> None:
    """Soft labels of the model itself and of another teacher; and tasks, whose texts share no row."""
    for teacher in (None, families.tiny("MistralForCausalLM", hidden_size=16)):

        def distilled(teacher: Any = teacher, **values: Any) -> Any:
            model = adapted()
            return learn(model, task=Distillation(model, teacher), prefix_cache=False, **values)

        assert_equal(distilled(packing=True), distilled())

    def together(**values: Any) -> Any:
        model = many_adapters(["a", "c"])
        data = {"a": ROWS[:6], "c": ROWS[6:]}
        return learn(model, data, MultiTask(model, ["a", "c"]), prefix_cache=True, eps=1e-4, **values)

    before = len(seen)
    assert_equal(together(packing=True), together())
    assert any(rows < texts for texts, rows in seen[before:])
    assert before


# Refused


class OwnBatches(Task[Example]):
    def collate(self, examples: Any, config: Any) -> Batch:
        return collate(examples, config)


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"packing: expected False with task='classification', .*, got True"):
        ak.TrainConfig(packing=True)
    packed = config(packing=True, output_dir=tmp_path / "run")
    for kind in (RoutedTask, KeepBehaviour, QuestionAnswering):
        model = tiny_run.model()
        with pytest.raises(ValueError, match=f"packing: expected False for {kind.__name__}, .*, got True"):
            ak.train(model, ROWS, packed, task=kind(model))
    model = tiny_run.model()
    with pytest.raises(ValueError, match="packing: expected False for OwnBatches, which makes batches in its own way"):
        ak.train(model, ROWS, packed, task=OwnBatches(model))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("BambaForCausalLM", {}, "gives a text other states in a row with others"),  # a state space
        ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"] * 2}, "gives a text other states"),
        ("GptOssForCausalLM", {}, "gives a text other states"),  # its masks do not follow the positions
        ("Llama4ForCausalLM", {}, "gives a text other states"),  # chunks of 8 tokens, counted in the row
    ],
)
@families.LISTED
def test_a_backbone_that_mixes_texts_is_refused(name: str, fields: dict[str, Any], why: str) -> None:
    model = ak.LlamaAdapter(families.tiny(name, **fields), ak.AdapterConfig(adapter_dim=4, layers=[2]))
    with pytest.raises(ValueError, match=rf"packing: expected False, because {name} {why}.*; got True"):
        ak.train(model, ROWS, config(packing=True))


def test_a_backbone_that_leaks_a_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By less than what counts as other numbers: only the text before it tells."""
    model = adapted()
    forward = model.decoder.forward

    def leaking(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.last_hidden_state = output.last_hidden_state * (1 + 1e-6 * inputs["input_ids"].cumsum(1)[..., None])
        return output

    monkeypatch.setattr(model.decoder, "forward", leaking)
    examples = load_examples(ROWS, config())[0]
    assert "lets a text see those before it" in packing.packing_obstacle(model.base, config(), examples)
    monkeypatch.undo()
    assert not packing.packing_obstacle(model.base, config(), examples)
    assert not packing.packing_obstacle(model.base.bfloat16(), config(), examples)


# Steps of alike lengths


def test_an_order_by_length() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(3, 1, 4003).astype(int)
    order = draw.permutation(4003).tolist()
    found = by_length(order, lengths, 4, seed=1, epoch=2)
    assert sorted(found) == list(range(4003))
    assert found == by_length(order, lengths, 4, seed=1, epoch=2) != by_length(order, lengths, 4, seed=1, epoch=3)
    assert found[-3:] == order[-3:]  # the smaller last step
    steps = [lengths[found[at : at + 4]] for at in range(0, 4000, 4)]
    spread = np.mean([step.max() - step.min() for step in steps])
    assert spread < 0.2 * np.mean([np.ptp(lengths[order[at : at + 4]]) for at in range(0, 4000, 4)])
    means = [step.mean() for step in steps]
    assert abs(np.corrcoef(means, np.arange(1000))[0, 1]) < 0.1  # short and long ones are spread over the epoch
    assert by_length([1, 0], lengths, 4, seed=0, epoch=0) == [1, 0]


def test_grouped_rows_are_each_seen_once_and_a_resumed_run_has_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny_run.rows(13)
    steps: list[list[int]] = []
    begin_step = Task.begin_step

    def noted(self: Any, examples: Any, *args: Any) -> None:
        steps.append([example.row for example in examples])
        begin_step(self, examples, *args)

    monkeypatch.setattr(Task, "begin_step", noted)
    settings = tiny_run.quiet(
        group_by_length=True, log_every=1, checkpoint_every=3, max_steps=6, keep_checkpoints=9, batch_size=4
    )

    def run(folder: Path, **values: Any) -> None:
        here = dataclasses.replace(settings, output_dir=folder, **values)
        with caplog.at_level(logging.INFO, "adapterkern"):
            ak.train(tiny_run.model(), rows, here, tokenizer=tiny_run.tokenizer())

    run(tmp_path / "one")
    assert sorted(row for step in steps[:4] for row in step) == list(range(13))
    lengths = [len(row["text"].split()) for row in rows]
    assert [len(step) for step in steps] == [4, 4, 4, 1, 4, 4]
    assert all(np.ptp([lengths[i] for i in step]) <= 4 for step in steps[:3])
    assert any(m.startswith("padding: ") and "; without group_by_length" in m for m in caplog.messages)
    cut(tmp_path / "one", tmp_path / "two")
    run(tmp_path / "two", resume=True)
    same(tmp_path / "two", tmp_path / "one", 0)
    with pytest.raises(ValueError, match="the run was begun with group_by_length=True, not False"):
        run(tmp_path / "two", resume=True, group_by_length=False)


# What a run says


def test_the_share_of_padding_by_hand() -> None:
    none = np.empty(0, dtype=np.int64)
    examples = [Example(np.arange(n), none, none) for n in (6, 2, 4, 1, 3, 2)]
    order = [0, 1, 2, 3, 4, 5]
    # Rows of 6 and 4 tokens: 3 · 6 + 3 · 3 for 18 tokens
    settings = config(batch_size=3)
    assert padding_share(examples, order, settings) == pytest.approx(1 - 18 / 27)
    # 6 | 4 + 2, then 3 | 2 + 1
    assert padding_share(examples, order, config(batch_size=3, packing=True)) == 0
    assert padding_share(examples, order, config(batch_size=3, padding="max_length")) == 1 - 18 / (6 * 32)
    # 1, 2, 2 and 3, 4, 6
    assert padding_share(examples, order, config(batch_size=3, group_by_length=True)) == 1 - 18 / 24


def test_padding_is_named_where_it_can_be_saved(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input_ids": [3] * n} for n in (30, 2, 2, 2) * 4]

    def said(**values: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "adapterkern"):
            ak.train(tiny_run.model(), rows, config(lr=1e-9, eval_every=None, **values))
        return [m for m in caplog.messages if m.startswith("padding: ")]

    # 144 tokens in 16 rows of 30, or in 5
    usual = {"batch_size": 16, "log_every": 100}
    assert said(**usual, max_steps=100) == ["padding: 70 % of the tokens in a batch; with packing 4 %"]
    assert not said(**usual, max_steps=99)
    assert said(**usual, max_steps=1, packing=True) == ["padding: 4 % of the tokens in a batch; without packing 70 %"]


def test_settings_without_effect_are_named(caplog: pytest.LogCaptureFixture) -> None:
    ak.train(tiny_run.model(), ROWS, config(group_by_length=True, padding="max_length", max_steps=1, eval_every=None))
    ak.train(tiny_run.model(), ROWS, config(packing=True, batch_size=1, max_steps=1, eval_every=None))
    named = [message for message in caplog.messages if message.startswith("config: ")]
    assert named == [
        "config: group_by_length=True has no effect with padding='max_length'",
        "config: packing=True has no effect with one row per forward",
    ]
