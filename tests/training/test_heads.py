"""Pooling, the losses of both tasks against their definitions, and the saved head."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adapterkern.training import ClassificationHead
from adapterkern.training.data.batches import collate
from adapterkern.training.data.examples import Example, load_examples
from adapterkern.training.heads import HEAD_CONFIG, HEAD_WEIGHTS, pool
from adapterkern.training.task import Task
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_sees_real_tokens_only(side: str) -> None:
    rows = [torch.randn(n, 8) for n in (1, 3, 5)]
    hidden = torch.full((3, 5, 8), 1e30)
    mask = torch.zeros(3, 5, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(5 - len(row), None) if side == "left" else slice(len(row))
        hidden[i, where], mask[i, where] = row, 1
    torch.testing.assert_close(pool(hidden, mask, "mean"), torch.stack([row.mean(0) for row in rows]))
    assert torch.equal(pool(hidden, mask, "last"), torch.stack([row[-1] for row in rows]))


def test_the_head_computes_in_fp32_under_autocast() -> None:
    head = ClassificationHead(32, ["a", "b"])
    hidden, mask = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(hidden, mask)
    assert torch.equal(scores, head(hidden, mask))


@pytest.mark.parametrize("side", ["left", "right"])
def test_lm_loss_is_transformers_own(side: str) -> None:
    config = tiny_run.quiet(task="causal-lm", padding_side=side)
    rows = [{"prompt": "w1 w2", "completion": "w3 w4 w5"}, {"prompt": "w6", "completion": "w7"}]
    examples, _ = load_examples(rows, config, TOKENIZER)
    batch = collate(examples, config)
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["positions"] + 1] = batch["targets"]
    model = tiny_run.model()
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    loss, _ = Task(model, None)(batch)
    torch.testing.assert_close(loss / len(batch["targets"]), expected, rtol=1e-5, atol=1e-6)


def test_classification_counts_what_is_right() -> None:
    config = tiny_run.quiet()
    examples, labels = load_examples(tiny_run.rows(9), config, TOKENIZER)
    batch = collate(examples, config)
    model = tiny_run.model()
    head = ClassificationHead(32, labels)
    task: Task[Example] = Task(model, head).eval()
    loss, correct = task(batch)
    hidden = model.decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    scores = head(hidden, batch["attention_mask"])
    right = scores.argmax(1) == batch["targets"]
    assert correct.tolist() == [right.sum()]
    predicted = [labels.index(p.label) for p in task.predict(batch)]
    assert predicted == scores.argmax(1).tolist()
    assert [p.probability for p in task.predict(batch)] == pytest.approx(scores.softmax(1).amax(1).tolist())
    torch.testing.assert_close(loss, F.cross_entropy(scores, batch["targets"], reduction="sum"))


def test_saved_head(tmp_path: Path) -> None:
    head = ClassificationHead(8, ["ja", "nein", "次"], "last")
    head.save_pretrained(tmp_path)
    again = ClassificationHead.from_pretrained(tmp_path)
    assert (again.labels, again.pooling) == (head.labels, "last")
    assert tiny_run.same_bits(list(again.parameters()), list(head.parameters()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", ["a"]),
        ("labels", [1, 2]),
        ("pooling", "max"),
        ("hidden_size", 0),
        ("hidden_size", "8"),
        ("weights_sha256", 1),
    ],
)
def test_a_damaged_head_config(tmp_path: Path, name: str, value: object) -> None:
    ClassificationHead(8, ["a", "b"]).save_pretrained(tmp_path)
    path = tmp_path / HEAD_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"{HEAD_CONFIG}: (field ')?{name}'?: expected .*, got "):
        ClassificationHead.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "span", "labels": None}, "expected a classification head of format_version 1, got span"),
        ({"head": 1}, "field 'head': expected str, got 1"),
        ({"format_version": 2}, "expected format_version 1, got 2"),
    ],
)
def test_a_head_of_another_kind_or_version(tmp_path: Path, change: dict[str, object], message: str) -> None:
    ClassificationHead(8, ["a", "b"]).save_pretrained(tmp_path)
    path = tmp_path / HEAD_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{HEAD_CONFIG}: {message}"):
        ClassificationHead.from_pretrained(tmp_path)


def test_damaged_head_weights(tmp_path: Path) -> None:
    ClassificationHead(8, ["a", "b"]).save_pretrained(tmp_path)
    path = tmp_path / HEAD_WEIGHTS
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{HEAD_WEIGHTS}: SHA-256"):
        ClassificationHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("labels", [["a"], ["a", "a"]])
def test_labels_must_differ(labels: list[str]) -> None:
    with pytest.raises(ValueError, match="labels"):
        ClassificationHead(8, labels)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="pooling: expected one of mean, last, got 'max'"):
        ClassificationHead(8, ["a", "b"], "max")
    with pytest.raises(ValueError, match="hidden_size: expected an integer >= 1, got 0"):
        ClassificationHead(0, ["a", "b"])
    with pytest.raises(TypeError, match=r"labels: expected strings, got \[0, 1\]"):
        ClassificationHead(8, [0, 1])  # type: ignore[list-item]
