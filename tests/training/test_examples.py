"""Tokenized examples and batches: labels, prompt masking, padding on either side, the order of rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapterkern.training.data.batches import collate, epoch_order, fingerprint
from adapterkern.training.data.examples import check_vocabulary, load_examples
from adapterkern.training.data.rows import DataError
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
LM = {"task": "causal-lm"}


def load(rows: Any, labels: list[str] | None = None, **values: Any):  # type: ignore[no-untyped-def]
    return load_examples(rows, tiny_run.quiet(**values), TOKENIZER, labels)


def test_labels_are_sorted_names() -> None:
    examples, names = load([{"text": "w1", "label": "b"}, {"text": "w2 w3", "label": "a"}])
    assert names == ["a", "b"]
    assert [e.targets.tolist() for e in examples] == [[1], [0]]
    assert [e.input_ids.tolist() for e in examples] == [[4], [5, 6]]


def test_numeric_labels_are_sorted_as_numbers() -> None:
    _, names = load([{"text": "w1", "label": label} for label in (10, 9, "2", -1)])
    assert names == ["-1", "2", "9", "10"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"label": "a"}, "row 2: column 'text' is missing"),
        ({"text": "w1"}, "row 2: column 'label' is missing"),
        ({"text": "  ", "label": "a"}, "row 2: column 'text': expected a non-empty string, got an empty one"),
        ({"text": 7, "label": "a"}, "row 2: column 'text': expected a non-empty string, got int"),
        (
            {"text": "w1", "label": 0.5},
            "row 2: column 'label': expected a non-empty string or an integer, got the number 0.5",
        ),
        (
            {"text": "w1", "label": ""},
            "row 2: column 'label': expected a non-empty string or an integer, got an empty one",
        ),
        ({"text": "w1", "label": "c"}, "row 2: column 'label': label 'c' is not one of the training's labels 'a', 'b'"),
        ({"input_ids": [], "label": "a"}, "row 2: column 'input_ids': expected a non-empty list of integers"),
        ({"input_ids": [3, -1], "label": "a"}, "row 2: column 'input_ids': expected a non-empty list of integers"),
    ],
)
def test_bad_rows(row: dict[str, Any], problem: str) -> None:
    rows = [{"text": "w1", "label": "a"}, {"text": "w2", "label": "b"}, row]
    with pytest.raises(DataError, match=problem):
        load(rows, labels=["a", "b"])
    assert len(load(rows, labels=["a", "b"], skip_bad_rows=True)[0]) == 2


def test_bad_rows_of_a_file_have_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("body,topic\nw1,a\nw2,b\n,a\n")
    with pytest.raises(DataError, match=r"a\.csv:4: column 'body': expected a non-empty string, got an empty one"):
        load(path, text_column="body", label_column="topic")


def test_one_label_is_no_task() -> None:
    with pytest.raises(DataError, match="data: column 'label': expected at least two different labels, got 'a'"):
        load([{"text": "w1", "label": "a"}])


def test_a_column_that_no_row_has_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,topic\nw1,a\nw2,b\n")
    expected = r"a\.csv: column 'label' is missing; there are 'text', 'topic'; label_column names"
    with pytest.raises(DataError, match=expected):
        load(path)


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        load([])


def test_text_needs_a_tokenizer_and_ids_do_not() -> None:
    rows = [{"input_ids": [1, 2], "label": "a"}, {"input_ids": [3], "label": "b"}]
    examples, _ = load_examples(rows, tiny_run.quiet())
    assert [e.input_ids.tolist() for e in examples] == [[1, 2], [3]]
    with pytest.raises(TypeError, match="tokenizer"):
        load_examples([{"text": "a", "label": "b"}, {"text": "a", "label": "c"}], tiny_run.quiet())


def test_prompts_are_masked() -> None:
    (example,), _ = load([{"prompt": "w1 w2 w3", "completion": "w4 w5"}], **LM)
    assert example.input_ids.tolist() == [4, 5, 6, 7, 8, TOKENIZER.eos_token_id]
    assert example.targets.tolist() == [7, 8, TOKENIZER.eos_token_id]
    assert example.positions.tolist() == [2, 3, 4]  # the state of a token predicts the next one


def test_plain_text_learns_all_but_the_first_token() -> None:
    (example,), _ = load([{"text": "w1 w2 w3"}], **LM)
    assert example.targets.tolist() == example.input_ids.tolist()[1:]
    assert example.positions.tolist() == [0, 1, 2]


def test_a_prompt_that_leaves_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="row 0: no token to learn: the prompt has 5 and max_length is 4"):
        load([{"prompt": "w1 w2 w3 w4 w5", "completion": "w4"}], max_length=4, **LM)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_batches(side: str, padding: str) -> None:
    config = tiny_run.quiet(padding_side=side, padding=padding, **LM)
    rows = [{"prompt": "w1", "completion": "w2 w3 w4"}, {"prompt": "w5 w6", "completion": "w7"}]
    examples, _ = load_examples(rows, config, TOKENIZER)
    batch = collate(examples, config)
    assert batch["input_ids"].shape[1] == (5 if padding == "longest" else 16)
    following = batch["input_ids"].flatten()[batch["positions"] + 1]
    assert torch.equal(following, batch["targets"])
    for ids, mask, example in zip(batch["input_ids"], batch["attention_mask"], examples, strict=True):
        assert ids[mask.bool()].tolist() == example.input_ids.tolist()
        edge = mask[-len(example.input_ids) :] if side == "left" else mask[: len(example.input_ids)]
        assert edge.all()


def test_order_depends_on_seed_and_epoch_alone() -> None:
    order = epoch_order(50, seed=1, epoch=2)
    assert sorted(order) == list(range(50))
    np.random.seed(3)
    torch.manual_seed(3)
    assert epoch_order(50, 1, 2) == order
    assert epoch_order(50, 1, 3) != order != epoch_order(50, 2, 2)


def test_fingerprint_tells_data_apart() -> None:
    rows = tiny_run.rows(6)
    first = fingerprint(load(rows)[0])
    assert fingerprint(load([dict(r) for r in rows])[0]) == first
    assert fingerprint(load(rows[::-1])[0]) != first
    rows[3] = rows[3] | {"label": "yes" if rows[3]["label"] == "no" else "no"}
    assert fingerprint(load(rows)[0]) != first


def test_a_foreign_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"tokenizer: .* below the model's 5, got 6"):
        check_vocabulary(load([{"text": "w1", "label": "a"}, {"text": "w2 w3", "label": "b"}])[0], 5)


BOTH = [{"text": "w1 w2 w3", "prompt": "w4", "completion": " w5 w6"}] * 2
TEXTS, PAIRS = ([{name: row[name] for name in names} for row in BOTH] for names in (["text"], ["prompt", "completion"]))
NONE = "data: there is no column {}; read are {}"
PAIR = "'prompt', 'completion'"


@pytest.mark.parametrize(
    ("rows", "columns", "learned", "said"),
    [
        (BOTH, {}, 2, "data: column not used: 'text'"),
        (PAIRS, {"text_column": "foo"}, 2, NONE.format("'foo' (text_column)", PAIR)),
        (TEXTS, {"prompt_column": "promt"}, 2, NONE.format("'promt' (prompt_column)", "'text'")),
        (
            [row | {"body": "w1 w2 w3 w4"} for row in PAIRS],
            {"text_column": "body"},
            3,
            f"data: columns not used: {PAIR}",
        ),
    ],
    ids=["both", "no such text", "no such prompt", "a text that was asked for"],
)
def test_a_column_that_was_asked_for(
    rows: list[dict[str, str]],
    columns: dict[str, Any],
    learned: int,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny_run.quiet(task="causal-lm", **columns)
    tokenizer = tiny_run.tokenizer()
    tokenizer.eos_token = None
    examples, _ = load_examples(rows, config, tokenizer, named=True)
    assert said in caplog.messages
    assert [len(example.targets) for example in examples] == [learned] * 2
    caplog.clear()
    load_examples(rows, config, tokenizer)
    assert "there is no column" not in caplog.text


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([row | {"body": ""} for row in PAIRS], {"text_column": "body"}),
        ([{"q": "w4", "completion": " w5 w6"}] * 2, {"text_column": "q", "prompt_column": "q"}),
    ],
    ids=["no texts", "one name for both"],
)
def test_pairs_go_before_a_text_column(
    rows: list[dict[str, str]], columns: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_run.quiet(task="causal-lm", **columns)
    examples, _ = load_examples(rows, config, TOKENIZER, named=True)
    assert [len(example.targets) for example in examples] == [3] * 2
    assert "there is no column" not in caplog.text
