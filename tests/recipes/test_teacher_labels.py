"""A teacher's likeliest tokens, from files: the loss is a running teacher's, and the teacher runs once per text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapterkern.recipes.distillation import Distillation
from adapterkern.recipes.distillation.labels import NAME, StoredLabels
from adapterkern.recipes.distillation.soft_labels import Labels
from adapterkern.training import TrainConfig, evaluate, train
from adapterkern.training.data.batches import Batch
from adapterkern.training.data.examples import Example
from adapterkern.training.feed import Feed, sums_over
from tests.support import tiny_run
from tests.support.soft_label_reference import plain

TOKENIZER = tiny_run.tokenizer()
QA = [{"prompt": f"w{i} w{i + 1}", "completion": row["text"]} for i, row in enumerate(tiny_run.rows(10, seed=3))]
LM: dict[str, Any] = {"task": "causal-lm"}


def another(seed: int = 5) -> Any:
    return tiny_run.model(seed).unload()


def prepared(task: Distillation, config: TrainConfig, batches: int = 100) -> list[Example]:
    """The examples, of which so many batches get labels."""
    examples = task.load(QA, config, TOKENIZER)
    task.prepare(examples, Feed(task, config, None), Bar(batches))
    return examples


class Bar:
    """Lets a number of batches through."""

    def __init__(self, batches: int = 100) -> None:
        self.left = batches

    def __call__(self, *_: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self._on_batch

    def __exit__(self, *_: Any) -> None:
        pass

    def _on_batch(self, count: int) -> bool:
        self.left -= 1
        return self.left > 0


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"divergence": "kl"}, {"padding_side": "left"}),
        ({"divergence": "reverse-kl", "temperature": 2.0}, {"packing": True}),
        ({"divergence": "jsd", "beta": 0.3, "teacher_context": "w10 w11"}, {}),
        ({"divergence": "js", "itself": True}, {}),
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_the_loss_is_that_of_a_teacher_that_runs(settings: Any, values: dict[str, Any], tmp_path: Path) -> None:
    """And the one of the definition, over whole logits of each text alone."""
    settings = {"top_k": 7, "weight": 0.7, "chunk_tokens": 5} | settings
    model, teacher = tiny_run.model(init="xavier"), None if settings.pop("itself", False) else another()
    config = tiny_run.quiet(**LM, **values)
    task = Distillation(model, teacher, teacher_labels=tmp_path, **settings)
    examples = prepared(task, config)
    live = Distillation(model, teacher, **settings)
    live.load(QA, config, TOKENIZER)
    found, expected = (Feed(t, config, None)(examples) for t in (task, live))
    assert ("label_tokens" in found, "label_tokens" in expected) == (True, False)
    assert "teacher_input_ids" not in found
    losses = [t(batch)[0] for t, batch in ((task, found), (live, expected))]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    parameters = model.adapter_parameters()
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        sums = [sums_over(t.eval(), examples, Feed(t, config, None), config) for t in (task, live)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)

    total = 0.0
    context = [13, 14] if "teacher_context" in settings else []
    for e in examples:
        with torch.no_grad():
            z = model(torch.tensor([e.input_ids.tolist()])).logits[0, e.positions].double()
            with model.disable_adapter():
                read = torch.tensor([[*context, *e.input_ids.tolist()]])
                t = (teacher or model)(read).logits[0, e.positions + len(context)].double()
        T, beta = settings.get("temperature", 1.0), settings.get("beta")
        total += plain(z, t, T, settings["divergence"], beta, top_k=7).sum().item()
    assert sums[0][2] == pytest.approx(total, rel=1e-5)


def test_a_teacher_runs_once_per_text_and_not_again(tmp_path: Path) -> None:
    def run(**values: Any) -> tuple[Any, int]:
        """The metrics of a run and an evaluation, and on how many rows the teacher ran from ``prepare`` on."""
        teacher, model = another(), tiny_run.model()
        settings: dict[str, Any] = {"weight": 1.0, "top_k": 7, "teacher_labels": tmp_path} | values
        task = Distillation(model, teacher, **settings)
        rows: list[int] = []
        hooks: list[Any] = []
        prepare = task.prepare

        def spy(*args: Any) -> str:
            hooks.append(teacher.model.register_forward_hook(lambda module, args, out: rows.append(len(out[0]))))
            said.append(prepare(*args))
            return said[-1]

        vars(task)["prepare"] = spy
        config = tiny_run.quiet(**LM, epochs=3)
        result = train(model, QA[:8], config, tokenizer=TOKENIZER, eval_data=QA[6:], task=task)
        hooks.pop().remove()  # before the checks of another call
        evaluate(model, QA[5:], config, tokenizer=TOKENIZER, task=task)
        return result.metrics, sum(rows)

    said: list[str] = []
    first, rows = run()
    assert rows == 10  # two of them are in both sets
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert said[0] == f"teacher's labels: 0 of 10 texts known in {tmp_path}, 50 bytes per token"
    again, rows = run()
    assert rows == 0
    assert said[1].startswith("teacher's labels: 5 of 5 texts known in ")
    assert said[2] == f"teacher's labels: 10 of 10 texts known in {tmp_path}, 50 bytes per token"
    live, rows = run(teacher_labels=None)
    assert rows == 3 * (8 + 4) + 5  # of the evaluation, too
    for name, value in live.items():
        if "second" not in name:
            assert again[name] == first[name]
            assert first[name] == pytest.approx(value, rel=1e-5)


def test_what_was_finished_is_there_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = tiny_run.quiet(**LM), tiny_run.model()

    def known(task: Distillation) -> int:
        assert task.labels is not None
        return len(task.labels)

    stopped = Distillation(model, another(), top_k=3, teacher_labels=tmp_path)
    examples = prepared(stopped, config, batches=1)
    assert known(stopped) == 4
    assert "label_tokens" not in stopped.collate(examples, config)  # a teacher that runs, for the whole batch
    calls: list[Tensor] = []
    original = Distillation.taught

    def fails(self: Distillation, batch: Batch) -> Tensor:
        if calls:
            raise RuntimeError("out of memory")
        calls.append(original(self, batch))
        return calls[0]

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "taught", fails)
        failed = Distillation(model, another(), top_k=3, teacher_labels=tmp_path)
        with pytest.raises(RuntimeError, match="out of memory"):
            prepared(failed, config)
    assert known(failed) == 8
    assert not list(tmp_path.glob(".*"))
    task = Distillation(model, another(), top_k=3, teacher_labels=tmp_path)
    batch = task.collate(prepared(task, config), config)
    assert (known(task), len(list(tmp_path.glob("*.safetensors")))) == (10, 3)
    assert batch["label_tokens"].shape == (len(batch["targets"]), 3)


def test_labels_of_something_else_are_refused(tmp_path: Path) -> None:
    config, model = tiny_run.quiet(**LM), tiny_run.model()
    prepared(Distillation(model, another(), top_k=3, teacher_labels=tmp_path), config)
    other = "expected those of LlamaForCausalLM, 4 layers, got those of LlamaForCausalLM, 4 layers with other weights, "
    for teacher, settings, message in (
        (another(), {"top_k": 4}, r"expected top_k=4, got top_k=3; name another folder"),
        (another(), {"temperature": 2.0}, r"expected temperature=2\.0, got temperature=1\.0"),
        (another(), {"teacher_context": "w1"}, other),
        (another(6), {}, other),
        (None, {}, other),
    ):
        task = Distillation(model, teacher, **{"top_k": 3, "teacher_labels": tmp_path, **settings})
        with pytest.raises(ValueError, match=f"teacher_labels: {tmp_path / NAME}: {message}"):
            task.load(QA, config, TOKENIZER)
    task = Distillation(model, another(), top_k=3, teacher_labels=tmp_path)
    with pytest.raises(ValueError, match="expected precision=bf16, got precision=fp32"):
        task.load(QA, tiny_run.quiet(**LM, precision="bf16"), TOKENIZER)
    path = next(tmp_path.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"teacher_labels: {path}: SHA-256 differs from the one in its name: damaged"):
        task.load(QA, config, TOKENIZER)


def test_what_has_no_stored_labels_is_refused(tmp_path: Path) -> None:
    model = tiny_run.model()
    for settings, values, message in (
        ({"top_k": None}, {}, "top_k: expected an integer beside teacher_labels"),
        ({"weight": 0.0}, {}, "weight: expected more than 0 beside teacher_labels, got 0"),
        ({"on_policy": 1.0}, {}, "teacher_labels: expected None with on_policy=1, where no step reads its rows"),
        ({}, {"shard": True}, "shard: expected False beside teacher_labels"),
        ({"teacher_labels": ""}, {}, "teacher_labels: expected a folder, got ''"),
    ):
        task = Distillation(model, **{"top_k": 3, "teacher_labels": tmp_path / "labels", **settings})
        with pytest.raises((ValueError, TypeError), match=message):
            train(model, QA, tiny_run.quiet(**LM, **values), tokenizer=TOKENIZER, task=task)
    task = Distillation(model, top_k=3, teacher_labels=tmp_path / "labels")
    train(model, QA, tiny_run.quiet(**LM), tokenizer=TOKENIZER, task=task, dry_run=True)
    assert not list(tmp_path.iterdir())  # a dry run neither


@pytest.mark.parametrize(("vocabulary", "size"), [(65_536, 20), (65_537, 24)])
def test_tokens_of_any_vocabulary_come_back(vocabulary: int, size: int, tmp_path: Path) -> None:
    example = Example(np.arange(4), np.array([5, 6, 7]), np.arange(3))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[0, 32_767], [32_768, vocabulary - 1], [1, 65_535]])
    labels = Labels(tokens, torch.randn(3, 3, generator=draw), torch.randn(3, generator=draw))
    written = StoredLabels(tmp_path, {"teacher": "0", "top_k": 2}, "one", vocabulary)
    written.add([example], labels)
    assert written.of([example]) is None
    written.flush()
    read = StoredLabels(tmp_path, {"teacher": "0", "top_k": 2}, "one", vocabulary)
    for store in (written, read):
        found = store.of([example, example])
        assert found is not None
        for a, b in zip(found, labels, strict=True):
            assert torch.equal(a, torch.cat([b, b]))
    assert store.token_bytes == size
