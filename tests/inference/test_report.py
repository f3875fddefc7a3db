"""What a classification gets wrong, against values computed by hand."""

import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

import adapterkern as ak
from adapterkern.inference.report import (
    SHOWN,
    LabelScores,
    Report,
    WrongRow,
    check_directory,
    draw,
    make_report,
    show,
    text_of,
    write_report,
)
from adapterkern.training.prediction import Answer
from tests.support import tiny_run

LABELS = ["a", "b", "c", "d"]
TRUE, PREDICTED = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]  # c is never predicted, d is nowhere
PROBABILITIES = [0.9, 0.8, 0.6, 0.7, 0.99, 0.6]


def of(true: list[int], predicted: list[int], labels: list[str] = LABELS, **more: Any) -> Report:
    rows = range(len(true))
    probabilities = more.pop("probabilities", [0.5] * len(true))
    return make_report(
        labels, true, predicted, probabilities, [f"f.csv:{i}" for i in rows], [f"t{i}" for i in rows], **more
    )


def printed(report: Report, **options: Any) -> str:
    text = io.StringIO()
    show(report, Console(file=text, width=80), **options)
    return text.getvalue()


def many(count: int) -> Report:
    """Label i has i + 1 rows; the last row of each of the first 30 labels is predicted as the next label."""
    labels = [f"label {i}" for i in range(count)]
    true = [i for i in range(count) for _ in range(i + 1)]
    predicted = [i + 1 if i < 30 and row == i else i for i in range(count) for row in range(i + 1)]
    return of(true, predicted, labels)


def test_scores_by_label_and_their_averages(recwarn: pytest.WarningsRecorder) -> None:
    report = of(TRUE, PREDICTED, probabilities=PROBABILITIES)
    assert (report.rows, report.accuracy, report.errors, report.absent) == (6, 0.5, 3, 1)
    a, b, c = report.labels
    assert a == LabelScores("a", 2 / 4, 2 / 3, pytest.approx(4 / 7), 3, 4)
    assert b == LabelScores("b", 1 / 2, 1 / 2, 1 / 2, 2, 2)
    assert c == LabelScores("c", 0.0, 0.0, 0.0, 1, 0)
    assert report.averages["macro"] == pytest.approx([1 / 3, (2 / 3 + 1 / 2) / 3, (4 / 7 + 1 / 2) / 3])
    assert report.averages["weighted"] == pytest.approx([(1.5 + 1) / 6, 3 / 6, (12 / 7 + 1) / 6])
    assert report.confusion == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert not recwarn.list


def test_a_label_that_no_row_has_is_scored_if_it_is_predicted() -> None:
    report = of([0, 0], [0, 3])
    assert report.labels == [
        LabelScores("a", 1.0, 0.5, pytest.approx(2 / 3), 2, 1),
        LabelScores("d", 0.0, 0.0, 0.0, 0, 1),
    ]
    assert "in no row, so that recall counts as 0: 'd'\n" in printed(report)


def test_one_label_alone_makes_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    report = of([1, 1], [1, 1])
    assert (report.confusion, report.accuracy, report.wrong, report.absent) == ([[2]], 1.0, [], 3)
    assert not recwarn.list


def test_the_most_confidently_wrong_come_first() -> None:
    report = of(TRUE, PREDICTED, probabilities=PROBABILITIES)
    assert report.wrong == [
        WrongRow("f.csv:4", "t4", "b", "a", 0.99),
        WrongRow("f.csv:2", "t2", "a", "b", 0.6),  # of two that are as confident the first
        WrongRow("f.csv:5", "t5", "c", "a", 0.6),
    ]
    two = of(TRUE, PREDICTED, probabilities=PROBABILITIES, worst=2)
    assert two.wrong == report.wrong[:2]
    assert two.errors == 3
    assert of(TRUE, PREDICTED, worst=0).wrong == []


def test_scores_that_are_no_numbers_come_last(tmp_path: Path) -> None:
    report = of([0, 0, 0], [1, 1, 0], probabilities=[math.nan, 0.5, 0.5])
    assert [row.place for row in report.wrong] == ["f.csv:1", "f.csv:0"]
    write_report(report, tmp_path)
    assert [json.loads(line)["probability"] for line in (tmp_path / "wrong.jsonl").open()] == [0.5, None]


def test_the_table_names_what_counts_as_zero() -> None:
    text = printed(of(TRUE, PREDICTED, probabilities=PROBABILITIES))
    assert [line.split() for line in text.splitlines() if line.startswith(" '")] == [
        ["'c'", "0.000", "0.000", "0.000", "1", "0"],
        ["'b'", "0.500", "0.500", "0.500", "2", "2"],
        ["'a'", "0.500", "0.667", "0.571", "3", "4"],
    ]
    assert "never predicted, so that precision counts as 0: 'c'\n" in text
    assert "1 of 4 labels are in no row and never predicted" in text
    assert [line.split() for line in text.splitlines() if line.startswith((" 1", " 2", " 3"))] == [
        ["1", "'a'", "2", "1", "·"],
        ["2", "'b'", "1", "1", "·"],
        ["3", "'c'", "1", "·", "·"],
    ]
    assert "0.99 'a', expected 'b'  f.csv:4  't4'\n" in text


def test_labels_are_no_markup() -> None:
    assert " '[red]x' " in printed(of([0, 1], [1, 0], ["[red]x", "y"]))


def test_of_many_labels_the_worst_are_shown() -> None:
    report = many(52)
    text = printed(report)
    lines = [line for line in text.splitlines() if line.startswith(" 'label")]
    assert lines[0].split()[:5] == ["'label", "0'", "0.000", "0.000", "0.000"]
    assert f"the {SHOWN} of 52 labels with the lowest F1\n" in text
    assert lines[SHOWN:][0].split() == [
        "'label",
        "0'",
        "1",
        "1",
        "'label",
        "1'",
    ]  # the pairs: label, rows, of, predicted
    assert "the 10 most frequent of 30 confusions; the others have 20 rows\n" in text
    whole = "\n".join(text_of(report))
    assert "'label 51'" in whole
    assert "lowest F1" not in whole


def test_pairs_are_sorted_by_their_rows() -> None:
    assert of([0, 0, 0, 1], [1, 2, 2, 0]).pairs == [("a", "c", 2), ("a", "b", 1), ("b", "a", 1)]


@pytest.mark.parametrize("count", [2, 52, 1000])
def test_a_picture_stays_readable(count: int, tmp_path: Path) -> None:
    pairs = [(i, i) for i in range(count)] + [(1, 0)]
    true, predicted = map(list, zip(*pairs, strict=True))
    draw(of(true, predicted, [f"label ${i}" for i in range(count)]), tmp_path / "picture.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "picture.png").shape
    assert 150 < height < 2000
    assert 150 < width < 2000


def test_a_label_beyond_the_font_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(of([0, 1], [0, 1], ["水", "b"]), tmp_path / "picture.png")
    assert "the font lacks characters of the labels; report.txt has them" in caplog.text


def test_files(tmp_path: Path) -> None:
    report = of(TRUE, PREDICTED, probabilities=PROBABILITIES)
    write_report(report, tmp_path / "new")
    write_report(report, tmp_path / "new")  # over its own files
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "confusion.png", "report.json", "report.txt", "wrong.jsonl"
    ]  # fmt: skip
    saved = json.loads((tmp_path / "new/report.json").read_text())
    assert saved == report.to_dict()
    assert saved["confusion"] == {"a": {"a": 2, "b": 1}, "b": {"a": 1, "b": 1}, "c": {"a": 1}}
    assert saved["averages"]["weighted"]["recall"] == 0.5
    first = json.loads((tmp_path / "new/wrong.jsonl").read_text().splitlines()[0])
    assert first == {"place": "f.csv:4", "text": "t4", "label": "b", "predicted": "a", "probability": 0.99}
    assert (tmp_path / "new/report.txt").read_text().startswith("6 rows, 50.00 % right\n")


@pytest.mark.parametrize(("name", "content"), [("report.json", '{"other": 1}'), ("wrong.jsonl", "mine")])
def test_another_s_files_are_kept(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        write_report(of(TRUE, PREDICTED), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="report: expected a folder, got the file"):
        check_directory(tmp_path / "file")


def test_an_evaluation_keeps_what_it_counts() -> None:
    model, config, tokenizer = tiny_run.model(), tiny_run.quiet(max_steps=2), tiny_run.tokenizer()
    head = ak.train(model, tiny_run.rows(16), config, tokenizer=tokenizer).head
    rows = tiny_run.rows(20, seed=1)
    answers: list[Answer] = []
    metrics = ak.evaluate(model, rows, config, tokenizer=tokenizer, head=head, answers=answers)
    assert sorted(one.example.row for one in answers) == list(range(20))
    for one in answers:
        assert head.labels[one.example.targets[0]] == rows[one.example.row]["label"]
    assert sum(one.label == one.example.targets[0] for one in answers) / 20 == metrics["accuracy"]
    ak.evaluate(model, rows, config, tokenizer=tokenizer, head=head)  # which keeps nothing
    assert len(answers) == 20
    assert not head._forward_hooks


def test_a_language_model_keeps_nothing() -> None:
    config, answers = tiny_run.quiet(task="causal-lm"), list[Answer]()
    rows = [{"text": row["text"]} for row in tiny_run.rows(4)]
    ak.evaluate(tiny_run.model(), rows, config, tokenizer=tiny_run.tokenizer(), answers=answers)
    assert answers == []
