"""What a label may be, which labels are suspicious, and the summary that a run begins with."""

import json
import logging
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adapterkern as ak
from adapterkern.recipes.distillation import KeepBehaviour, WithKept
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.recipes.qa import QuestionAnswering, SpanSettings
from adapterkern.training import api
from adapterkern.training.data.examples import load_examples
from adapterkern.training.data.labels import label_name, suspicious_labels
from adapterkern.training.data.rows import shown
from adapterkern.training.heads import ClassificationHead
from tests.support import tiny_qa, tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(8)
ALIKE = "labels that differ only in case, spaces or form are different labels"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("a ", "a "),
        (np.str_("a"), "a"),
        (3, "3"),
        (np.int64(-3), "-3"),
        (np.array(3), "3"),
        (torch.tensor(3), "3"),
        (True, "true"),
        (np.bool_(False), "false"),
        (torch.tensor(True), "true"),
        (1.5, None),
        (1.0, None),
        (np.float32(1), None),
        (torch.tensor([3]), None),
        (" ", None),
        (None, None),
        ([1], None),
    ],
)
def test_names(value: Any, name: str | None) -> None:
    assert label_name(value) == name
    assert type(label_name(value)) in (str, type(None))


def test_a_number_that_python_cannot_print_is_no_label() -> None:
    assert label_name(10**5000) is None
    assert shown([10**5000]) == "a value of type list"


def test_a_head_of_0_1_0_names_booleans_as_python_does() -> None:
    rows = [{"input_ids": [3], "label": True}, {"input_ids": [3], "label": np.bool_(False)}]
    examples, _ = load_examples(rows, tiny_run.quiet(), labels=["False", "True"])
    assert [e.targets.tolist() for e in examples] == [[1], [0]]


def test_a_skipped_row_makes_no_label() -> None:
    rows = [{"text": "w1", "label": "a"}, {"text": "w1", "label": "b"}, {"text": " ", "label": "c"}]
    assert load_examples(rows, tiny_run.quiet(skip_bad_rows=True), TOKENIZER)[1] == ["a", "b"]


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ({"a": 6, "a ": 2, "A": 1, "b": 9}, f"{ALIKE}: 'a' (6), 'a ' (2), 'A' (1)"),
        ({"é": 9, "e\u0301": 9}, f"{ALIKE}: '\\xe9' (9), 'e\\u0301' (9)"),
        ({"1": 9, "1.0": 9, "01": 9}, f"{ALIKE}: '1' (9), '1.0' (9), '01' (9)"),
        ({"0.5": 9, "1.5": 9}, "2 labels are numbers with a fraction, each a class of its own: '0.5', '1.5'"),
        ({"a": 9, "b": 1, "c": 1}, "2 of 3 labels have one row: 'b', 'c'"),
        ({str(i): 1 for i in range(300)}, "300 labels for 300 rows: most have one row, and nothing to generalize from"),
    ],
)
def test_suspicious(counts: dict[str, int], found: str) -> None:
    assert suspicious_labels(counts)[0] == found


def test_a_label_in_two_ways(caplog: pytest.LogCaptureFixture) -> None:
    labels = (1, "1", np.int64(1), 2, IntEnum("Two", {"two": 2}).two, True, "true", "x")  # type: ignore[attr-defined]
    rows = [{"text": "w1", "label": label} for label in labels]
    assert load_examples(rows, tiny_run.quiet(), TOKENIZER)[1] == ["1", "2", "true", "x"]
    said = "column 'label': the same label as a string and as another value: 1 and '1', True and 'true'"
    assert caplog.messages == [f"data: {said}"]


def test_texts_in_both_sets(caplog: pytest.LogCaptureFixture) -> None:
    other = {"text": "w1 w2", "label": "yes"}
    data = [ROWS[3], other, ROWS[5]]
    ak.train(tiny_run.model(), ROWS, tiny_run.quiet(max_steps=1), tokenizer=TOKENIZER, eval_data=data)

    def said() -> list[str]:  # by us: other packages may speak when they are imported
        return [record.getMessage() for record in caplog.records if record.name.startswith("adapterkern")]

    assert said() == ["eval: 2 of 3 texts are training texts, too (row 0)"]
    for again in ([other], data):  # the second has been said
        ak.train(tiny_run.model(), ROWS, tiny_run.quiet(max_steps=1), tokenizer=TOKENIZER, eval_data=again)
    assert len(said()) == 1


@pytest.mark.parametrize(("task", "others"), [("classification", 1), ("causal-lm", 2)])  # a message is said once
def test_texts_in_both_sets_that_are_cut(task: Any, others: int, caplog: pytest.LogCaptureFixture) -> None:
    long, longer = ({"text": "w1 " * count, "label": "yes"} for count in (90, 91))  # the same after the cut
    rows, config = [*ROWS, long], tiny_run.quiet(max_steps=1, max_length=8, task=task)
    if task == "causal-lm":
        rows, long, longer = [{"text": row["text"]} for row in rows], {"text": long["text"]}, {"text": longer["text"]}
    ak.train(tiny_run.model(), rows, config, tokenizer=TOKENIZER, eval_data=[longer] * others + [long], dry_run=True)
    assert f"eval: 1 of {others + 1} texts are training texts, too (row {others})" in caplog.messages


def test_what_is_not_in_both_sets(caplog: pytest.LogCaptureFixture) -> None:
    """Another task's texts, and texts that begin alike and are cut."""
    model = tiny_run.model()
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=4, layers=(3,)))
    both = {"default": ROWS, "other": tiny_run.rows(8, seed=1)}
    swapped = dict(zip(both, reversed(both.values()), strict=True))
    task = MultiTask(model, list(both))
    ak.train(model, both, tiny_run.quiet(max_steps=1), tokenizer=TOKENIZER, eval_data=swapped, task=task)
    long = [{"input_ids": [5] * 20 + [i], "label": "ab"[i % 2]} for i in range(4)]
    ak.train(tiny_run.model(), long[:2], tiny_run.quiet(max_steps=1), eval_data=long[2:])
    assert "training texts" not in caplog.text


def test_nothing_suspicious() -> None:
    assert suspicious_labels({"a": 1, "b": 1}) == suspicious_labels({str(i): 9 for i in range(-3, 300)}) == []


def said(config: ak.TrainConfig, capsys: pytest.CaptureFixture[str], data: Any = ROWS, **values: Any) -> list[str]:
    """What a run says before its first step."""
    model = values.pop("model", None) or tiny_run.model()
    ak.train(model, data, config, **({"tokenizer": TOKENIZER} | values))
    lines = capsys.readouterr().err.splitlines()
    return lines[: next(i for i, line in enumerate(lines) if line.startswith("prefix cache"))]


def test_a_run_begins_with_its_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"input_ids": [5] * (4 + i), "label": "aab"[i % 3]} for i in range(12)]
    config = tiny_run.quiet(progress=True, max_steps=1, max_length=12, output_dir=tmp_path)
    assert said(config, capsys, rows, eval_data=rows[:9]) == [
        "train  12 texts; 108 tokens; a text has 9.5 (median), 12 (longest)",
        "       2 labels: 'a' 8, 'b' 4",
        "       warning: 3 of 12 texts are cut to the maximum length of 12 tokens, the longest of 15 tokens (row 11)",
        "eval   9 texts; 72 tokens; a text has 8 (median), 12 (longest)",
        "       2 labels: 'a' 6, 'b' 3",
    ]
    kept = json.loads((tmp_path / "data_summary.json").read_text())
    assert kept["train"]["labels"] == {"a": 8, "b": 4}
    assert (kept["train"]["cut"], kept["eval"]["cut"], kept["eval"]["counts"]) == (3, 0, {"texts": 9})
    assert str(tmp_path) not in (tmp_path / "data_summary.json").read_text()


def test_without_progress_it_is_logged(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"input_ids": [5] * 20, "label": label} for label in ("a", "a ", "b")]
    with caplog.at_level(logging.INFO):
        ak.train(tiny_run.model(), rows, tiny_run.quiet(max_steps=1))
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "adapterkern.training.run.report"]
    assert lines == [
        ("INFO", "train  3 texts; 48 tokens; a text has 16 (median), 16 (longest)"),
        ("INFO", "3 labels: 'a' 1, 'a ' 1, 'b' 1"),
        ("WARNING", "train: 3 of 3 texts are cut to the maximum length of 16 tokens, the longest of 20 tokens (row 0)"),
        ("WARNING", "train: labels that differ only in case, spaces or form are different labels: 'a' (1), 'a ' (1)"),
        ("INFO", "3 training rows are fewer than a step's 4: every step learns from all of them"),
        ("INFO", "prefix cache: off, since every text is needed only once"),
    ]
    assert capsys.readouterr().err == ""


def test_an_evaluation_names_what_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    ak.evaluate(tiny_run.model(), [{"input_ids": [5] * 20}], tiny_run.quiet(task="causal-lm"))
    assert (
        "data: 1 of 1 texts are cut to the maximum length of 16 tokens, the longest of 20 tokens (row 0)" in caplog.text
    )


def test_the_processes_are_joined_before_one_of_them_shows_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, each takes itself for the only one, and all show it."""
    called = []
    make, show = api.make_accelerator, api.show_data
    monkeypatch.setattr(api, "make_accelerator", lambda *args: called.append("joined") or make(*args))
    monkeypatch.setattr(api, "show_data", lambda *args: called.append("shown") or show(*args))
    ak.evaluate(tiny_run.model(), [{"input_ids": [5] * 9}], tiny_run.quiet(task="causal-lm"))
    assert called == ["joined", "shown"]


def test_an_evaluation_begins_with_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"input_ids": [5] * (4 + i), "label": "aab"[i % 3], "other": 1} for i in range(9)]
    head = ClassificationHead(32, ["a", "b"])
    ak.evaluate(tiny_run.model(), rows, tiny_run.quiet(progress=True, max_length=11), head=head)
    assert capsys.readouterr().err.splitlines() == [
        "data  9 texts; 71 tokens; a text has 8 (median), 11 (longest)",
        "      2 labels: 'a' 6, 'b' 3",
        "      warning: 1 of 9 texts are cut to the maximum length of 11 tokens, the longest of 12 tokens (row 8)",
    ]


def test_causal_lm_says_how_much_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "w1 w2", "completion": " w3"}, {"prompt": "w1", "completion": " w2 w3"}]
    (line,) = said(tiny_run.quiet(progress=True, task="causal-lm", max_steps=1, batch_size=2), capsys, rows)
    assert line == "train  2 texts; 8 tokens, 5 learned; a text has 4 (median), 4 (longest)"


def test_recipes_begin_with_their_data(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run.quiet(progress=True, max_steps=1)
    model = tiny_run.model()
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=4, layers=(3,)))
    data = {"default": ROWS, "other": tiny_run.rows(12, seed=1)}
    lines = said(config, capsys, data, model=model, task=MultiTask(model, list(data)))
    assert [line.split(";")[0] for line in lines[::2]] == ["train default  8 texts", "train other    12 texts"]
    model = tiny_run.model()
    lines = said(config, capsys, WithKept(ROWS, ROWS[:3]), model=model, task=KeepBehaviour(model))
    assert [line.split(";")[0] for line in (lines[-3], lines[-1])] == ["train       8 texts", "train kept  3 texts"]
    model = tiny_qa.model()
    task = QuestionAnswering(model, SpanSettings(pointer_dim=8))
    lines = said(
        tiny_qa.quiet(progress=True, max_steps=1), capsys, tiny_qa.EXAMPLES, model=model, task=task,
        tokenizer=tiny_qa.TOKENIZER,
    )  # fmt: skip
    assert lines[-1].startswith("train  26 questions, 4 without an answer, 26 windows; ")
    assert "a window has" in lines[-1]
