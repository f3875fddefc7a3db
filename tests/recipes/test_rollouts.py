"""On-policy steps: what a student generates, the loss of it, and that a run with them repeats and resumes."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapterkern.recipes.distillation import Distillation
from adapterkern.recipes.distillation.rollouts import Rollout, _Drawn, prompt_length
from adapterkern.recipes.distillation.settings import RolloutSettings
from adapterkern.recipes.distillation.teacher import DISTILLATION_CONFIG
from adapterkern.training import CheckpointError, TrainConfig, train
from adapterkern.training.data.prefix import PrefixCache
from adapterkern.training.data.rows import DataError
from adapterkern.training.feed import Feed
from tests.support import tiny_chat, tiny_run
from tests.support.soft_label_reference import Allocations, plain

TOKENIZER = tiny_run.tokenizer()
EOS = 2
QA = [{"prompt": " ".join(f"w{i + k}" for k in range(2 + i % 4)), "completion": f"w{i + 40}"} for i in range(12)]
LM: dict[str, Any] = {"task": "causal-lm"}


def rolled(task: Distillation, config: TrainConfig, count: int = 5, epoch: int = 0, index: int = 0) -> list[Any]:
    examples = task.load(QA[:count], config, TOKENIZER)
    return task.step_examples(examples, config, epoch, index, contextlib.nullcontext)


def tokens(rollouts: list[Any]) -> list[list[int]]:
    return [one.targets.tolist() for one in rollouts]


def likeliest(model: Any, prompt: list[int], most: int) -> list[int]:
    """The student's completion, by whole forwards of one row."""
    found: list[int] = []
    while len(found) < most and (not found or found[-1] != EOS):
        with torch.no_grad():
            found.append(int(model(torch.tensor([prompt + found])).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", ["layer", "attention", "parallel-mlp"])
@pytest.mark.parametrize("cached", [None, False])
def test_a_step_has_the_soft_labels_of_the_students_own_tokens(side: str, position: str, cached: bool | None) -> None:
    """Against completions and logits of each row alone, in loss and in every parameter's gradient."""
    model = tiny_run.model(init="xavier", position=position)
    settings: Any = {"temperature": 2.0, "weight": 0.7, "divergence": "reverse-kl", "chunk_tokens": 5}
    task = Distillation(model, on_policy=1.0, max_new_tokens=7, rollout_temperature=0.0, **settings)
    config = tiny_run.quiet(**LM, padding_side=side, prefix_cache=cached, batch_size=3)
    rollouts = rolled(task, config)
    batch = Feed(task, config, None)(rollouts)
    assert ("prefix" in batch) == (cached is None)
    loss, _ = task(batch)
    expected = torch.zeros((), dtype=torch.float64)
    for example, rollout in zip(task.load(QA[:5], config, TOKENIZER), rollouts, strict=True):
        prompt = example.input_ids[: prompt_length(example)].tolist()
        assert rollout.targets.tolist() == likeliest(model, prompt, 7)
        ids = torch.tensor([prompt + rollout.targets.tolist()[:-1]])
        z = model(input_ids=ids).logits[0, len(prompt) - 1 :].double()
        with torch.no_grad(), model.disable_adapter():
            t = model(input_ids=ids).logits[0, len(prompt) - 1 :].double()
        expected = expected + 0.7 * 2.0**2 * plain(z, t, 2.0, "reverse-kl").sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = model.adapter_parameters()
    gradients = torch.autograd.grad(loss, parameters)
    for a, b in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_layers_below_the_first_adapter_run_once_for_all_three() -> None:
    """Of a whole step, generation included; and no tensor has a batch's tokens × the vocabulary."""
    model = tiny_run.model(init="xavier")
    task = Distillation(model, on_policy=1.0, max_new_tokens=40, chunk_tokens=2)
    config = tiny_run.quiet(**LM, max_length=48)
    task(Feed(task, config, None)(rolled(task, config, 4)))  # after which the model is asked no more what it can do
    task.rollouts.ends = [127]  # so that all have 40 new tokens
    seen = dict.fromkeys(range(4), 0)
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(
            lambda m, args, out, number=number: seen.update({number: seen[number] + out.shape[0] * out.shape[1]})
        )
    examples = task.load(QA[:4], config, TOKENIZER)  # which asks, too
    seen.update(dict.fromkeys(seen, 0))
    with Allocations() as made:
        rollouts = task.step_examples(examples, config, 0, 0, contextlib.nullcontext)
        read = 4 * max(len(one.input_ids) for one in rollouts)
        task(Feed(task, config, None)(rollouts))[0].backward()
    assert [seen[number] for number in range(3)] == [read] * 3
    assert seen[3] == 3 * read  # while generating, and of the student and the teacher
    assert made.largest < read * 128  # the LM head, expanded over the batch, is 4 * 32 * 128


def test_draws_are_of_the_row_and_its_step_alone() -> None:
    task = Distillation(tiny_run.model(init="xavier"), on_policy=1.0, max_new_tokens=8)
    config = tiny_run.quiet(**LM, batch_size=5)
    first = tokens(rolled(task, config))
    torch.manual_seed(77)
    before = torch.get_rng_state()
    # In other batches, as with accumulation
    assert tokens(rolled(task, dataclasses.replace(config, batch_size=2, accumulation=3))) == first
    assert torch.equal(torch.get_rng_state(), before)
    others = [rolled(task, config, index=1), rolled(task, config, epoch=1)]
    others.append(rolled(task, dataclasses.replace(config, seed=1)))
    assert len({str(tokens(other)) for other in others} | {str(first)}) == 4
    assert tokens(rolled(task, config, count=3)) == first[:3]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_tokens_are_drawn_from_the_softmax(temperature: float) -> None:
    scores = torch.tensor([2.0, 0.0, -1.0, -30.0])
    count = 4000
    drawn = _Drawn([[0, number] for number in range(count)], temperature, torch.device("cpu"))
    found = drawn(None, scores.expand(count, 4)).argmax(-1).bincount(minlength=4)
    p = (scores.double() / temperature).softmax(-1)
    assert ((found - count * p).abs() <= 4 * (count * p * (1 - p)).sqrt() + 1e-6).all()


def test_a_completion_ends_with_its_end_and_within_the_room() -> None:
    model = tiny_run.model(init="xavier")
    config = tiny_run.quiet(**LM, max_length=8)
    task = Distillation(model, on_policy=1.0, max_new_tokens=50)
    assert {len(one.input_ids) for one in rolled(task, config)} == {7}  # and the last token, which is not read
    everything = tokens(rolled(task, config))
    task.rollouts.ends = [everything[0][1]]
    cut = tokens(rolled(task, config))
    for before, after in zip(everything, cut, strict=True):
        stop = before.index(everything[0][1]) + 1 if everything[0][1] in before else len(before)
        assert after == before[:stop]


def test_of_a_conversation_the_last_answer_is_generated_and_ends_with_its_turn() -> None:
    tokenizer = tiny_chat.tokenizer(tiny_chat.CHATML)
    said = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in said]}]
    model = tiny_run.model()
    task = Distillation(model, on_policy=1.0)
    (example,) = task.load(rows, tiny_run.quiet(**LM, max_length=64), tokenizer)
    whole = tokenizer.decode(example.input_ids[: prompt_length(example)])
    assert "w4" in whole
    assert "w5" not in whole
    assert task.rollouts.ends == [EOS, tokenizer.convert_tokens_to_ids("<|im_end|>")]


# Runs


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    def run(folder: Path, resume: bool = False, **changes: Any) -> tuple[list[Tensor], dict[str, float]]:
        model = tiny_run.model()
        teacher = tiny_run.model(init="xavier", layers=(3,)).eval()
        values = {"epochs": 5, "checkpoint_every": 1, "keep_checkpoints": 100, "batch_size": 3, "accumulation": 2}
        config = tiny_run.quiet(**LM, **values, output_dir=folder, resume=resume, lr=3e-2)
        settings = {"on_policy": 0.5, "max_new_tokens": 5, "divergence": "jsd", "beta": 0.3, "weight": 1.0} | changes
        task = Distillation(model, teacher, **settings)
        begun: list[bool] = []
        original = task.step_examples

        def spy(*args: Any) -> Any:
            found = original(*args)
            begun.append(isinstance(found[0], Rollout))
            return found

        vars(task)["step_examples"] = spy
        result = train(model, QA, config, tokenizer=TOKENIZER, eval_data=QA, task=task)
        seen.append(begun)
        assert result.metrics is not None
        return tiny_run.weights(model), result.metrics

    threads, seen = torch.get_num_threads(), list[list[bool]]()
    torch.set_num_threads(1)
    try:
        expected, metrics = run(tmp_path / "run")
        assert 2 < sum(seen[0]) < 8  # of 10 steps
        for checkpoint in sorted((tmp_path / "run" / "checkpoints").iterdir())[6:]:
            checkpoint.rename(tmp_path / checkpoint.name)
        with pytest.raises(CheckpointError, match=r"the run was begun with on_policy=0\.5, not 0\.4"):
            run(tmp_path / "run", resume=True, on_policy=0.4)
        again, resumed = run(tmp_path / "run", resume=True)
        assert tiny_run.same_bits(again, expected)
        assert seen[1] == seen[0][6:]
    finally:
        torch.set_num_threads(threads)
    assert metrics["divergence"] == resumed["divergence"]
    saved = json.loads((tmp_path / "run" / DISTILLATION_CONFIG).read_text())
    assert {"on_policy": 0.5, "max_new_tokens": 5, "beta": 0.3}.items() <= saved.items()
    assert "rollout_temperature" not in saved
    model, teacher = tiny_run.model(), tiny_run.model(init="xavier", layers=(3,))
    loaded, _ = Distillation.from_pretrained(model.unload(), tmp_path / "run", teacher=teacher)
    assert loaded.rollouts.settings == RolloutSettings(on_policy=0.5, max_new_tokens=5)


def test_no_prefix_is_computed_of_rows_that_no_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    fill = PrefixCache.fill
    monkeypatch.setattr(
        PrefixCache, "fill", lambda self, m, rows, *a: (filled.append(len(rows)), fill(self, m, rows, *a))[1]
    )
    for share, eval_data, expected in ((1.0, None, []), (1.0, QA[:5], [5]), (0.5, QA[:5], [17])):
        model = tiny_run.model()
        task = Distillation(model, on_policy=share, max_new_tokens=2)
        config = tiny_run.quiet(**LM, batch_size=12)
        train(model, QA, config, tokenizer=TOKENIZER, eval_data=eval_data, task=task)
        assert filled == expected
        filled.clear()


def test_a_student_learns_from_its_own_completions_alone() -> None:
    model, teacher = tiny_run.model(), tiny_run.model(init="xavier", layers=(3,))

    def drift() -> float:
        ids = torch.tensor(np.random.default_rng(0).integers(3, 100, (8, 10)))
        with torch.no_grad():
            z, t = (m(ids).logits.double() for m in (model, teacher))
            return plain(z, t, 1.0, "reverse-kl").mean().item()

    before = drift()
    task = Distillation(model, teacher, weight=1.0, divergence="reverse-kl", on_policy=1.0, max_new_tokens=10)
    train(model, QA, tiny_run.quiet(**LM, epochs=6, lr=3e-2), tokenizer=TOKENIZER, task=task)
    assert drift() < 0.7 * before


# What cannot be


def test_what_cannot_roll_out_is_refused() -> None:
    model = tiny_run.model()
    for settings, message in (
        ({"on_policy": 1.5}, r"on_policy: expected a number in \[0, 1\], got 1\.5"),
        ({"on_policy": 0.5, "max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"max_new_tokens": 5}, "max_new_tokens: expected None where on_policy is 0, got 5"),
        ({"rollout_temperature": 0.0}, r"rollout_temperature: expected None where on_policy is 0, got 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Distillation(model, **settings)
    for weight, values, message in (
        (0.0, {}, "weight: expected more than 0 beside on_policy"),
        (0.5, {"packing": True}, "packing: expected False beside on_policy"),
        (0.5, {"shard": True}, "shard: expected False beside on_policy"),
        (0.5, {"task": "classification"}, "task: expected causal-lm for Distillation"),
    ):
        config = tiny_run.quiet(**(LM | values))
        with pytest.raises(ValueError, match=message):
            train(model, QA, config, tokenizer=TOKENIZER, task=Distillation(model, on_policy=0.5, weight=weight))
    with pytest.raises(TypeError, match="lmbda: expected on_policy in Distillation, got lmbda=0"):
        Distillation(model, lmbda=0.5)
    task = Distillation(model, on_policy=0.5)
    with pytest.raises(DataError, match=r"row 0: expected rows with a prompt .* got one that is learned from its sec"):
        train(model, [{"text": "w1 w2 w3"}], tiny_run.quiet(**LM), tokenizer=TOKENIZER, task=task)
