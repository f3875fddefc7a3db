"""Rows that are tokenized already: what is learned, what is attended, packed texts; and the losses that follow."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adapterkern as ak
from adapterkern.recipes.distillation import KeepBehaviour, WithKept
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.training.data.batches import collate
from adapterkern.training.data.examples import Example, load_examples, numbered
from adapterkern.training.data.summary import summarize
from tests.support import tiny_run

LM = tiny_run.quiet(task="causal-lm")
IDS = [5, 6, 7, 8, 9]


def one(**row: Any) -> Example:
    ((example,), _) = load_examples([row], LM)
    return example


def texts(**row: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and targets of each text of a row."""
    return [(e.input_ids.tolist(), e.targets.tolist()) for e in numbered([one(**row)])]


@pytest.mark.parametrize(
    ("columns", "targets"),
    [
        ({}, [6, 7, 8, 9]),
        ({"labels": [-100, -100, 7, -100, 9]}, [7, 9]),
        ({"labels": [5, 6, 70, 8, 9]}, [6, 70, 8, 9]),
        ({"completion_mask": [0, 0, 0, 1, 1]}, [8, 9]),
        ({"assistant_masks": [1, 1, 0, 0, 1]}, [6, 9]),
        ({"labels": [5, 6, 7, -100, 9], "completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [1, 1, 1, 1, 0]}, [7]),
        ({"attention_mask": [1, 1, 1, 0, 0]}, [6, 7]),
        ({"attention_mask": [0, 0, 1, 1, 1], "position_ids": [1, 1, 0, 1, 2]}, [8, 9]),
        ({"attention_mask": [0, 1, 1, 1, 0], "labels": [5, 6, -100, 8, 9]}, [8]),
        ({"position_ids": [0, 1, 2, 3, 4]}, [6, 7, 8, 9]),
        ({"position_ids": [0, 1, 2, 0, 1]}, [6, 7, 9]),
        ({"seq_lengths": [2, 3]}, [6, 8, 9]),
        ({"seq_lengths": [2, 3], "position_ids": [0, 1, 0, 1, 2]}, [6, 8, 9]),
        ({"labels": None, "attention_mask": None}, [6, 7, 8, 9]),
        ({"completion_mask": [False, False, True, True, True]}, [7, 8, 9]),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_what_is_learned(columns: dict[str, Any], targets: list[int], kind: Any) -> None:
    row = {name: None if value is None else kind(value) for name, value in columns.items()}
    assert one(input_ids=kind(IDS), **row).targets.tolist() == targets


def test_packed_texts_become_examples() -> None:
    assert texts(input_ids=IDS, position_ids=[0, 1, 2, 0, 1]) == [([5, 6, 7], [6, 7]), ([8, 9], [9])]
    assert texts(input_ids=IDS, seq_lengths=[1, 4]) == [([6, 7, 8, 9], [7, 8, 9])]  # 5 alone has nothing to learn
    example = one(input_ids=IDS, position_ids=[0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match=r"examples: expected one text in each, see unpacked, got 2 that are packed"):
        collate([example], LM)


def test_each_packed_text_is_cut_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    row = {"input_ids": [*range(10, 40), 5, 6, *range(40, 57)], "seq_lengths": [30, 2, 17]}
    assert texts(**row) == [([*range(10, 26)], [*range(11, 26)]), ([5, 6], [6]), ([*range(40, 56)], [*range(41, 56)])]
    examples = numbered([one(**row)])
    assert [e.cuts for e in examples] == [(14,), (0,), (1,)]
    (warning,) = summarize(examples, 16).cut_warning()
    assert warning == "2 of 3 texts are cut to the maximum length of 16 tokens, the longest of 30 tokens (row 0)"
    labels = [-100] * 20 + [*range(30, 40), 5, 6] + [-100] * 17
    assert texts(**row, labels=labels) == [([5, 6], [6])]
    assert (
        "1 packed texts are left out: all that they learn is beyond the maximum length of 16 tokens (row 0)"
        in caplog.text
    )


def test_padding_is_not_pooled() -> None:
    rows = [{"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "label": "a"}, {"input_ids": [7], "label": "b"}]
    assert [e.input_ids.tolist() for e in load_examples(rows, tiny_run.quiet())[0]] == [[5, 6], [7]]


def shaken() -> ak.LlamaAdapter:
    model = tiny_run.model()
    with torch.no_grad():
        for p in model.adapter_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def test_masked_labels_give_the_models_own_loss() -> None:
    model = shaken()
    labels = [-100, -100, 7, 70, -100]
    own = model(torch.tensor([IDS]), labels=torch.tensor([labels])).loss.item()
    metrics = ak.evaluate(model, [{"input_ids": IDS, "labels": labels}], LM)
    assert metrics["loss"] == pytest.approx(own, rel=1e-5)
    assert metrics["targets"] == 2


def test_packed_texts_give_the_loss_of_the_texts_alone() -> None:
    model = shaken()
    packed = [{"input_ids": IDS, "position_ids": [0, 1, 2, 0, 1]}]
    alone = [{"input_ids": IDS[:3]}, {"input_ids": IDS[3:]}]
    expected = ak.evaluate(model, alone, LM)["loss"]
    assert ak.evaluate(model, packed, LM)["loss"] == pytest.approx(expected, rel=1e-6)
    task = MultiTask(model, ["default"])
    assert ak.evaluate(model, {"default": packed}, LM, task=task)["loss"] == pytest.approx(expected, rel=1e-6)


def test_packed_texts_to_keep_weigh_one_target_each() -> None:
    kept = [{"input_ids": IDS, "position_ids": [0, 1, 2, 0, 1]}]
    task = KeepBehaviour(tiny_run.model())
    examples = task.load(WithKept([{"input_ids": [3, 4]}], kept), LM, None)
    assert [e.input_ids.tolist() for e in examples] == [[3, 4], [5, 6, 7], [8, 9]]
    assert [e.targets.tolist() for e in examples[1:]] == [[-100], [-100]]


def test_columns_that_are_not_used_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input_ids": IDS, "labels": IDS, "token_type_ids": [0] * 5, "length": 5, "text": "w1"}] * 3
    load_examples(rows, LM)
    assert [r.getMessage() for r in caplog.records] == ["data: columns not used: 'token_type_ids', 'length', 'text'"]
    caplog.clear()
    load_examples([row | {"label": label} for row, label in zip(rows, "aba", strict=True)], tiny_run.quiet())
    names = "'labels', 'token_type_ids', 'length', 'text'"
    assert [r.getMessage() for r in caplog.records] == [f"data: columns not used: {names}"]


def test_columns_of_a_file_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A study reads it for every run."""
    (tmp_path / "a.csv").write_text("text,label,id\nw1,a,1\nw2,b,2\n")
    for _ in range(3):
        load_examples(tmp_path / "a.csv", tiny_run.quiet(), tiny_run.tokenizer())
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'a.csv'}: column not used: 'id'"]


def test_a_label_that_causal_lm_does_not_learn_is_named(caplog: pytest.LogCaptureFixture) -> None:
    load_examples([{"text": "w1 w2", "label": "a"}], LM, tiny_run.tokenizer())
    expected = "data: column not used by causal-lm, which learns texts and no labels: 'label'"
    assert [record.getMessage() for record in caplog.records] == [expected]
