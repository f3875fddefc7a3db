"""SQuAD's files, and exact match and F1 against what the official script gives, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapterkern.recipes.qa.squad import Question, exact_match, f1, normalize_answer, read_questions, score
from adapterkern.training import DataError
from adapterkern.training.data.rows import BadRows
from tests.support.tiny_qa import EXAMPLES


def read(data: Any) -> list[Question]:
    bad = BadRows("data")
    questions = read_questions(data, bad)
    bad.settle(skip=False)
    return questions


def problems(data: Any) -> list[str]:
    bad = BadRows("data")
    read_questions(data, bad)
    return bad.found


ROW = {"id": "q1", "question": "Who?", "context": "Ann met Bo.", "answers": [{"text": "Bo", "answer_start": 8}]}


# Scores


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, sat.", "cat sat"),
        ("a an the", ""),
        ("Theatre of an Ant", "theatre of ant"),  # whole words alone
        ("U.S.", "us"),
        ("rock-'n'-roll", "rocknroll"),  # punctuation goes and leaves no space
        ("the-end", "theend"),  # punctuation goes first, so this is no article
        ("a—b", "—b"),  # a dash beyond ASCII stays, and ends a word
        ("„Ja“", "„ja“"),
        ("ÄRA a é", "ära é"),
        ("one\ttwo\u00a0three", "one two three"),
        ("$5.00", "500"),
    ],
)
def test_normalize(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("gold", "prediction", "em", "f"),
    [
        ("the cat", "Cat!", 1, 1),
        ("cat sat", "cat", 0, 2 / 3),  # precision 1, recall 1/2
        ("in the old town", "old town hall", 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("a b b c", "b b b", 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # bags: two of the three b's; "a" is an article
        ("x", "y", 0, 0),
        ("", "", 1, 1),
        ("", "x", 0, 0),
        ("x", "", 0, 0),
        ("the", "a", 1, 1),  # both normalize to nothing
        ("x", "the", 0, 0),
    ],
)
def test_one_pair(gold: str, prediction: str, em: float, f: float) -> None:
    assert exact_match(gold, prediction) == em
    assert f1(gold, prediction) == pytest.approx(f)


def test_the_best_gold_counts_for_each_measure_by_itself() -> None:
    answers = [{"text": "Bo", "answer_start": 8}, {"text": "met Bo", "answer_start": 4}]
    questions = read([ROW | {"answers": answers}])
    assert score(questions, {"q1": "bo"}) == {"exact": 100, "f1": 100, "total": 1}
    assert score(questions, {"q1": "Ann met"})["f1"] == pytest.approx(50)  # against "met Bo"
    assert score(questions, {"q1": ""}) == {"exact": 0, "f1": 0, "total": 1}


def test_questions_with_and_without_answer() -> None:
    questions = read([ROW, *(ROW | {"id": id_, "answers": []} for id_ in ("none-1", "none-2", "none-3"))])
    got = score(questions, {"q1": "Ann Bo", "none-1": "", "none-2": "Bo", "none-3": "The"})
    f = 100 * 2 / 3
    assert got == pytest.approx(
        {"exact": 50, "f1": (f + 200) / 4, "total": 4}  # "The" is nothing once it is normalized
        | {"HasAns_exact": 0, "HasAns_f1": f, "HasAns_total": 1}
        | {"NoAns_exact": 200 / 3, "NoAns_f1": 200 / 3, "NoAns_total": 3}
    )


def test_gold_answers_that_normalize_to_nothing_are_left_out() -> None:
    context = "Give me the A."
    golds = [{"text": "the", "answer_start": 8}, {"text": "me", "answer_start": 5}]
    assert score(read([ROW | {"context": context, "answers": golds}]), {"q1": ""})["exact"] == 0
    assert score(read([ROW | {"context": context, "answers": golds[:1]}]), {"q1": ""})["exact"] == 100


def test_score_errors() -> None:
    with pytest.raises(ValueError, match="predictions: expected one for question 'q1', got none"):
        score(read([ROW]), {"q2": "Bo"})
    with pytest.raises(ValueError, match="questions: expected at least one"):
        score([], {})
    with pytest.raises(ValueError, match=r"row 0.*: field 'answers': expected answers to score against"):
        score(read([{key: value for key, value in ROW.items() if key != "answers"}]), {"q1": ""})


# Files


def test_the_three_forms_read_alike(tmp_path: Path) -> None:
    nested = read(EXAMPLES)
    rows = [
        {"id": q.id, "question": q.question, "context": q.context}
        | {"answers": {"text": [a.text for a in q.answers or ()], "answer_start": [a.start for a in q.answers or ()]}}
        for q in nested
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(nested) == 26
    assert [q[:4] for q in read(path)] == [q[:4] for q in read(rows)] == [q[:4] for q in nested]
    assert all(q.context[a.start : a.end] == a.text for q in nested for a in q.answers or ())


def test_parquet_and_the_hub_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    answers = {"text": ["Bo"], "answer_start": [8]}
    data = datasets.Dataset.from_list([ROW | {"answers": answers}, ROW | {"id": "q2", "answers": answers}])
    data.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    of_file, of_hub = read(str(tmp_path / "rows.parquet")), read("user/squad:validation")
    assert [q[:4] for q in of_file] == [q[:4] for q in of_hub] == [q[:4] for q in read([ROW, ROW | {"id": "q2"}])]
    assert [q.place for q in of_hub] == [f"user/squad:validation: question '{name}'" for name in ("q1", "q2")]


def test_rows_without_id_or_answers() -> None:
    questions = read([{"question": "Who?", "context": "Ann."}, {"question": "Who?", "context": "Bo.", "id": 7}])
    assert [(q.id, q.answers) for q in questions] == [("row-0", None), ("7", None)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "field 'question': expected a string, got NoneType"),
        ({"context": "  "}, "field 'context': expected a string, got an empty one"),
        ({"id": True}, "field 'id': expected a string, got bool"),
        ({"answers": "Bo"}, "field 'answers': expected a list of objects with text and answer_start, got 'Bo'"),
        (
            {"answers": {"text": ["Bo"], "answer_start": []}},
            "field 'answers': expected a list of texts, and one answer_start per text",
        ),
        ({"answers": [{"text": "", "answer_start": 0}]}, "field 'answers[0].text': expected a string, got ''"),
        ({"answers": [{"text": "Bo"}]}, "field 'answers[0].answer_start': expected an integer, got None"),
        ({"answers": [{"text": "Bo", "answer_start": 7}]}, "expected 'Bo' at 7 of the context, but it is at 8"),
        ({"answers": [{"text": "Bo", "answer_start": -3}]}, "expected 'Bo' at -3 of the context, but it is at 8"),
        (
            {"answers": [{"text": "Cy", "answer_start": 8}]},
            "expected 'Cy' at 8 of the context, which does not contain it",
        ),
        ({"is_impossible": True}, "field 'is_impossible': expected False with 1 answers, got True"),
        ({"is_impossible": False, "answers": []}, "field 'is_impossible': expected True with 0 answers, got False"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], message: str) -> None:
    (problem,) = problems([ROW | change])
    assert problem.startswith(f"row 0 (id {(ROW | change)['id']!r}): ")
    assert problem.endswith(message)


def test_an_id_that_is_there_twice() -> None:
    assert problems([ROW, ROW]) == ["row 1: question 'q1': field 'id': is there twice, first at row 0: question 'q1'"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "dev.json: field 'data': expected a list of articles, got NoneType"),
        ([], "dev.json: expected a JSON object, got list"),
    ],
)
def test_a_file_that_is_not_squad(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read(path)


def test_parts_of_a_file_that_are_not_squad(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    paragraphs = [{"context": "c"}, {"context": "Ann.", "qas": [3, {"id": "x", "question": "Who?", "answers": None}]}]
    path.write_text(json.dumps({"data": [7, {"paragraphs": paragraphs}]}))
    assert problems(path) == [
        f"{path}: data[0]: field 'paragraphs': expected an object with a list of that name",
        f"{path}: data[1].paragraphs[0]: field 'qas': expected an object with a list of that name",
        f"{path}: data[1].paragraphs[1].qas[0]: expected an object, got int",
        f"{path}: data[1].paragraphs[1].qas[1] (id 'x'): field 'answers': expected a list of objects with text and "
        "answer_start, got None",
    ]


def test_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dev.csv: expected a name that ends in .json \(SQuAD's form\) or .jsonl"):
        read(tmp_path / "dev.csv")
