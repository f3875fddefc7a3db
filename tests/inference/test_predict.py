"""``ak.predict`` for every kind of run: what ``evaluate`` counts, row by row, in bounded memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adapterkern as ak
from adapterkern.inference.api import iter_predictions
from adapterkern.training import prediction
from adapterkern.training.data.rows import DataError
from tests.support import tiny_run

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def golden_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("name", ["classification", "routing", "keeping", "multitask/tasks/small"])
def test_as_many_are_right_as_an_evaluation_counts(name: str) -> None:
    rows = golden_rows("colors.jsonl")
    found = ak.predict(name, "colors.jsonl")
    right = [p.label == row["label"] for p, row in zip(found, rows, strict=True)]
    run, _, key = name.partition("/tasks/")
    expected = EXPECTED[run]["small/accuracy" if key else "accuracy"]
    assert sum(right) / len(rows) == pytest.approx(expected)
    for one in found:
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert one.probability == max(one.probabilities.values()) == one.probabilities[one.label]


@pytest.mark.usefixtures("there")
def test_tasks_by_their_names() -> None:
    texts = [row["text"] for row in golden_rows("colors.jsonl")]
    mixed = ak.predict("multitask", [{"text": t, "task": n} for t in texts for n in ("small", "default")])
    for number, name in enumerate(("small", "default")):
        alone = ak.predict(f"multitask/tasks/{name}", [{"text": t} for t in texts])
        assert [p.task for p in mixed[number::2]] == [name] * len(texts)
        assert [p.label for p in mixed[number::2]] == [p.label for p in alone]
        assert [p.probability for p in mixed[number::2]] == pytest.approx([p.probability for p in alone], rel=1e-5)
    with pytest.raises(DataError, match="row 0: column 'task': expected a task among 'default', 'small', got 'none'"):
        ak.predict("multitask", [{"text": "red", "task": "none"}])


@pytest.mark.usefixtures("there")
def test_questions() -> None:
    task, tokenizer = ak.load("qa")
    config = task.from_pretrained(ak.load("qa")[0].model.unload(), "qa")[1]
    by_id = task.answer("questions.jsonl", config, tokenizer)
    # Answers are not read, ids may be missing or the same
    rows = [{"question": "Second?", "context": "red black"}] * 2
    expected = [*by_id.values(), *[by_id["q0"]] * 2]
    for one, other in zip([*ak.predict("qa", "questions.jsonl"), *ak.predict(task, rows)], expected, strict=True):
        assert one.text == other.text
        assert [candidate[:3] for candidate in one.candidates] == [candidate[:3] for candidate in other.candidates]
        scores = [candidate.score for candidate in other.candidates]
        assert [candidate.score for candidate in one.candidates] == pytest.approx(scores, abs=1e-4)


def trained(**values: Any) -> tuple[ak.LlamaAdapter, Any, ak.TrainConfig]:
    model, config = tiny_run.model(), tiny_run.quiet(max_steps=2, **values)
    result = ak.train(model, tiny_run.rows(16), config, tokenizer=tiny_run.tokenizer())
    return model, result.head, config


def test_a_model_that_was_just_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "CHUNK", 8)  # three of them
    model, head, config = trained()
    rows = tiny_run.rows(20, seed=1)
    tokenizer = tiny_run.tokenizer()
    found = ak.predict(model, rows, config, tokenizer=tokenizer, head=head)
    metrics = ak.evaluate(model, rows, config, tokenizer=tokenizer, head=head)
    right = sum(p.label == row["label"] for p, row in zip(found, rows, strict=True))
    assert right / 20 == pytest.approx(metrics["accuracy"])
    assert all(module.training for module in head.modules())  # left as it was


def test_other_labels_are_not_read() -> None:
    model, head, config = trained()
    arguments: Any = {"config": config, "tokenizer": tiny_run.tokenizer(), "head": head}
    rows = tiny_run.rows(4)
    odd = [row | {"label": None} for row in rows[:2]] + [row | {"label": "new"} for row in rows[2:]]
    assert ak.predict(model, odd, **arguments) == ak.predict(model, rows, **arguments)


def test_rows_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "CHUNK", 8)
    model, head, config = trained()
    read = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal read
        for row in tiny_run.rows(64):
            read += 1
            yield row

    found = iter_predictions(model, rows(), config, tokenizer=tiny_run.tokenizer(), head=head)
    assert read == 0
    values, first = next(found)
    assert read == 8
    assert values["text"] == tiny_run.rows(1)[0]["text"]
    assert first.label in ("no", "yes")
    assert len(list(found)) == 63


def test_bad_rows() -> None:
    model, head, config = trained()
    rows = [{"text": "w1"}, {"text": ""}, {"text": None}, {"text": "w2"}]
    arguments: Any = {"tokenizer": tiny_run.tokenizer(), "head": head}
    with pytest.raises(DataError, match=r"(?s)2 bad rows.*row 1: column 'text'.*row 2: column 'text'"):
        ak.predict(model, rows, config, **arguments)
    skipping = tiny_run.quiet(skip_bad_rows=True)
    found = ak.predict(model, rows, skipping, **arguments)
    assert [p is None for p in found] == [False, True, True, False]
    with pytest.raises(DataError, match="column 'text' is missing; there are 'body'"):
        ak.predict(model, [{"body": "w1"}], config, **arguments)
    with pytest.raises(DataError, match="no rows"):
        ak.predict(model, [], config, **arguments)


def test_cut_texts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model, head, config = trained()
    with caplog.at_level("WARNING"):
        ak.predict(model, [{"text": "w1 " * 40}, {"text": "w1"}], config, tokenizer=tiny_run.tokenizer(), head=head)
    assert "data: 1 of 2 texts are cut to the maximum length of 16 tokens" in caplog.text


def test_refused() -> None:
    model, head, config = trained()
    rows, tokenizer = [{"text": "w1"}], tiny_run.tokenizer()
    with pytest.raises(NotImplementedError, match=r"expected a task with a head, got causal-lm; use model\.generate"):
        ak.predict(model, rows, config, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="config: expected that of the training, got None"):
        ak.predict(model, rows, tokenizer=tokenizer, head=head)
    with pytest.raises(TypeError, match="tokenizer: expected a transformers tokenizer for rows of text, got None"):
        ak.predict(model, rows, config, head=head)
    with pytest.raises(TypeError, match=r"model: expected a saved run, .* got LlamaForCausalLM"):
        ak.predict(model.unload(), rows, config, head=head)
    with pytest.raises(TypeError, match=r"data.*rows"):
        ak.predict(model, **{"data": rows})
