"""Questions from SQuAD files, JSONL and other rows; and SQuAD's scores, exact match and F1.

A row has a question, a context, and answers that are spans of that context. SQuAD's own files (v1.1, v2.0) nest them,
``{"data": [{"paragraphs": [{"context": …, "qas": [{"id", "question", "answers": [{"text", "answer_start"}]}]}]}]}``;
JSONL and lists hold one question per row, ``answers`` either as there or as ``{"text": […], "answer_start": […]}``.
``answer_start`` counts characters (Python's, that is, Unicode code points). A question whose ``answers`` are empty has
no answer in its context; one without the field is not labeled, and can only be predicted.

Exact match and F1 are those of the official script of SQuAD 2.0, which on questions that have an answer is the script
of 1.1: normalizing makes a string lower case and removes ASCII punctuation, the words a, an and the, and superfluous
whitespace. F1 compares the two bags of words; each question counts with its best gold answer; where the gold answer or
the prediction is empty, F1 is 1 if both are, else 0. Gold answers that are empty once normalized are left out.
"""

import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adapterkern.files import read_json
from adapterkern.training.data.examples import Rows
from adapterkern.training.data.formats.names import TABLES, format_of
from adapterkern.training.data.rows import (
    HALF_A_PAIR,
    BadRows,
    DataError,
    Row,
    check_columns,
    columns,
    is_unicode,
    iter_rows,
    scalar,
    shown,
    source_name,
    warn_unused,
)

_NEEDED = ("question", "context")
_READ = {"id", *_NEEDED, "answers", "is_impossible"}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Answer(NamedTuple):
    """A span of a context."""

    text: str
    start: int  # characters before it

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Question(NamedTuple):
    """One row, checked."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None  # empty: the context has no answer; None: not labeled
    place: str  # for messages: file and id


def read_questions(data: Rows, bad: BadRows) -> list[Question]:
    """The questions of a ``.json`` file in SQuAD's form, or of rows that ``load_examples`` reads, except CSV and TSV.

    Bad rows (a field is missing or of a wrong type, an answer is not at its ``answer_start``, an id is there twice) go
    to ``bad``, by file and id.

    Raises:
        DataError: the file is of another kind, or its structure is not SQuAD's.
    """
    source = source_name(data) if isinstance(data, str | os.PathLike) else None
    rows = list(question_rows(data, bad))
    if rows:
        check_columns(rows, dict.fromkeys(_NEEDED, ""), bad.source)
        warn_unused(bad.source, [name for name in columns(rows) if name not in _READ])
    questions: dict[str, Question] = {}
    for values, place in rows:
        try:
            question = _question(values, place, source, f"row-{len(questions)}")
        except ValueError as error:
            bad.add(place if "id" not in values else f"{place} (id {shown(values['id'])})", str(error))
            continue
        if question.id in questions:
            bad.add(question.place, f"field 'id': is there twice, first at {questions[question.id].place}")
        else:
            questions[question.id] = question
    return list(questions.values())


def question_rows(data: Rows, bad: BadRows) -> Iterator[Row]:
    """One row per question, as ``read_questions`` reads them. Raises as it does."""
    source = source_name(data) if isinstance(data, str | os.PathLike) else None
    if source is not None and source.lower().endswith(".json"):
        return (Row(values, place) for values, place in _flatten(Path(source), bad))
    if source is not None and format_of(source) in TABLES:  # which hold no lists of answers
        raise DataError(f"{source}: expected a name that ends in .json (SQuAD's form) or .jsonl or .parquet")
    return iter_rows(data, bad)


def unlabeled_questions(rows: Sequence[Row], bad: BadRows) -> list[Question | None]:
    """The question of each row, whose answers are not read and whose id is its number; None for a bad row."""
    check_columns(list(rows), dict.fromkeys(_NEEDED, ""), bad.source)
    found: list[Question | None] = []
    for number, (values, place) in enumerate(rows):
        try:
            found.append(_question({name: values.get(name) for name in _NEEDED}, place, None, str(number)))
        except ValueError as error:
            bad.add(place, str(error))
            found.append(None)
    return found


def read_labeled(data: Rows, bad: BadRows) -> list[Question]:
    """The labeled ones of ``read_questions``; the others go to ``bad``. Raises ``DataError`` if none is labeled."""
    questions = read_questions(data, bad)
    found = [question for question in questions if question.answers is not None]
    if questions and not found:
        raise DataError(f"{bad.source}: field 'answers' is missing: no question is labeled")
    for question in questions:
        if question.answers is None:
            bad.add(question.place, "field 'answers' is missing")
    return found


def check_questions(data: Rows, skip_bad_rows: bool, labeled: bool = True) -> None:
    """Raise ``DataError`` if a task could not use the questions, as far as it can be known without a tokenizer."""
    bad = BadRows(source_name(data))
    questions = (read_labeled if labeled else read_questions)(data, bad)
    if not (skip_bad_rows and questions):
        bad.settle(skip_bad_rows)
    if not questions:
        raise DataError(f"{bad.source}: no questions")


def _flatten(path: Path, bad: BadRows) -> Iterable[tuple[Mapping[str, Any], str]]:
    try:
        articles = read_json(path).get("data")
    except ValueError as error:
        raise DataError(str(error)) from error
    if not isinstance(articles, list):
        raise DataError(f"{path}: field 'data': expected a list of articles, got {type(articles).__name__}")
    for a, article in enumerate(articles):
        for p, paragraph in _members(article, "paragraphs", f"{path}: data[{a}]", bad):
            place = f"{path}: data[{a}].paragraphs[{p}]"
            for q, row in _members(paragraph, "qas", place, bad):
                if isinstance(row, dict):
                    yield {**row, "context": paragraph.get("context")}, f"{place}.qas[{q}]"
                else:
                    bad.add(f"{place}.qas[{q}]", f"expected an object, got {type(row).__name__}")


def _members(owner: Any, field: str, place: str, bad: BadRows) -> Iterable[tuple[int, Any]]:
    if isinstance(owner, dict) and isinstance(owner.get(field), list):
        return enumerate(owner[field])
    bad.add(place, f"field {field!r}: expected an object with a list of that name")
    return ()


def _question(values: Mapping[str, Any], place: str, source: str | None, default_id: str) -> Question:
    id_ = scalar(values.get("id", default_id))
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)
    for name, value in (("id", id_), ("question", values.get("question")), ("context", values.get("context"))):
        if not isinstance(value, str) or not value.strip():
            got = "an empty one" if isinstance(value, str) else type(value).__name__
            raise ValueError(f"field {name!r}: expected a string, got {got}")
        if not is_unicode(value):
            raise ValueError(f"field {name!r}: {HALF_A_PAIR}")
    context = values["context"]
    answers = None if "answers" not in values else tuple(_answers(values["answers"], context))
    impossible = scalar(values.get("is_impossible"))
    if isinstance(impossible, bool) and answers is not None and impossible == bool(answers):
        expected = f"expected {not impossible} with {len(answers)} answers"
        raise ValueError(f"field 'is_impossible': {expected}, got {impossible}")
    where = place if "id" not in values else f"{source or place}: question {shown(id_)}"
    return Question(id_, values["question"].strip(), context, answers, where)


def _answers(value: Any, context: str) -> Iterable[Answer]:
    if isinstance(value, Mapping) and "text" in value:
        texts, starts = (_listed(value.get(name)) for name in ("text", "answer_start"))
        if texts is None or starts is None or len(starts) != len(texts):
            raise ValueError("field 'answers': expected a list of texts, and one answer_start per text")
        value = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
    if not isinstance(value, list | tuple) or not all(isinstance(answer, Mapping) for answer in value):
        raise ValueError(f"field 'answers': expected a list of objects with text and answer_start, got {shown(value)}")
    for number, answer in enumerate(value):
        text, start = scalar(answer.get("text")), scalar(answer.get("answer_start"))
        name = f"field 'answers[{number}]"
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}.text': expected a string, got {shown(text)}")
        if not isinstance(start, int) or isinstance(start, bool):
            raise ValueError(f"{name}.answer_start': expected an integer, got {shown(start)}")
        if start < 0 or context[start : start + len(text)] != text:
            at = context.find(text)
            found = f"but it is at {at}" if at >= 0 else "which does not contain it"
            raise ValueError(f"{name}.answer_start': expected {shown(text)} at {start} of the context, {found}")
        yield Answer(text, start)


def _listed(value: Any) -> Sequence[Any] | None:
    """A list of Python, of NumPy or of a tensor; else None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value if isinstance(value, list | tuple) else None


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces: what exact match compares."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(gold: str, prediction: str) -> float:
    """1.0 if both normalize to the same string, else 0.0."""
    return float(normalize_answer(gold) == normalize_answer(prediction))


def f1(gold: str, prediction: str) -> float:
    """The harmonic mean of precision and recall of the prediction's words; 1.0 if both strings are empty."""
    expected, got = normalize_answer(gold).split(), normalize_answer(prediction).split()
    if not expected or not got:
        return float(expected == got)
    common = sum((Counter(expected) & Counter(got)).values())
    return 2 * common / (len(expected) + len(got))


def score(questions: Iterable[Question], predictions: Mapping[str, str]) -> dict[str, float]:
    """Exact match and F1 of ``predictions`` (answers by question id, "" for none), in percent, by their official names.

    Returns:
        ``exact``, ``f1``, ``total``; and where some questions have an answer and some have none, the same of each kind
        with ``HasAns_`` and ``NoAns_`` before the name.

    Raises:
        ValueError: a question is not labeled, or has no prediction; the message names it.
    """
    groups: dict[str, list[tuple[float, float]]] = {"HasAns_": [], "NoAns_": []}
    for question in questions:
        if question.answers is None:
            raise ValueError(f"{question.place}: field 'answers': expected answers to score against, got none")
        if question.id not in predictions:
            raise ValueError(f"predictions: expected one for question {question.id!r}, got none")
        golds = [answer.text for answer in question.answers if normalize_answer(answer.text)] or [""]
        pairs = [(exact_match(gold, predictions[question.id]), f1(gold, predictions[question.id])) for gold in golds]
        best = max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
        groups["HasAns_" if question.answers else "NoAns_"].append(best)
    everything = groups["HasAns_"] + groups["NoAns_"]
    if not everything:
        raise ValueError("questions: expected at least one, got none")
    kinds = {"": everything} | (groups if all(groups.values()) else {})
    return {
        prefix + name: value
        for prefix, pairs in kinds.items()
        for name, value in (
            ("exact", 100 * sum(pair[0] for pair in pairs) / len(pairs)),
            ("f1", 100 * sum(pair[1] for pair in pairs) / len(pairs)),
            ("total", len(pairs)),
        )
    }
