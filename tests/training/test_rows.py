"""Files and lists of rows: what is read, and that every error names file and line."""

import csv
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from adapterkern.training.data.rows import BadRows, DataError, Row, read_rows


def read(data: Any, skip: bool = False) -> list[Row]:
    bad = BadRows(str(data))
    rows = read_rows(data, bad)
    bad.settle(skip)
    return rows


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# No NUL (refused) and no lone surrogates (not UTF-8); a bare CR would end a CSV record.
TEXTS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.sampled_from([".csv", ".tsv", ".jsonl"]))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], kind: str) -> None:
    path = tmp_path_factory.mktemp("rows") / f"data{kind}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == ".jsonl":
            file.writelines(json.dumps({"text": a, "label": b}, ensure_ascii=False) + "\n" for a, b in pairs)
        else:
            writer = csv.writer(file, delimiter="," if kind == ".csv" else "\t", quoting=csv.QUOTE_ALL)
            writer.writerows([("text", "label"), *pairs])
    assert [(row.values["text"], row.values["label"]) for row in read(path)] == pairs


def test_places_count_lines_and_not_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufefftext,label\n"two\nlines",x\n\nlast,y\n')
    assert [(row.values["text"], row.place) for row in read(path)] == [
        ("two\nlines", f"{path}:2"),
        ("last", f"{path}:5"),
    ]


def test_bad_rows_are_all_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": \n[1, 2]\n{"text": "b"}\n')
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path}:3: not JSON" in str(error.value)
    assert f"{path}:4: expected a JSON object, got a list" in str(error.value)
    assert "2 bad rows" in str(error.value)
    assert [row.place for row in read(path, skip=True)] == [f"{path}:1", f"{path}:5"]


def test_a_wrong_number_of_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\na\tb\nc\nd\te\tf\n")
    with pytest.raises(DataError, match=r"a\.tsv:3: expected 2 fields(.|\n)*a\.tsv:4: expected 2 fields .* got 3"):
        read(path)


def test_many_bad_rows_are_counted() -> None:
    with pytest.raises(DataError, match=r"25 bad rows(.|\n)*row 9: (.|\n)*and 15 more"):
        read(["no mapping"] * 25)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"text,label\na,b\n\xff,d\n", r"a\.csv:3: not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n\0\n', r"a\.jsonl:2: .*NUL"),
        ("a.csv", b'text,label\n"a,b\n', r"a\.csv:2: "),
        (
            "a.csv",
            b"text,text\na,b\n",
            r"a\.csv:1: expected a line that names the columns, each once, got 'text', 'text'",
        ),
        ("a.csv", b"", r"a\.csv: expected a header"),
        ("a.txt", b"text", r"a\.txt: expected a name that ends in \.jsonl, \.csv"),
    ],
)
def test_a_file_that_is_not_what_it_claims(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read(write(tmp_path / name, content))


def test_long_fields(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    text = "word " * 100_000
    path = write(tmp_path / "a.csv", f"text,label\n{text},x\n")
    assert read(path)[0].values["text"] == text
    assert csv.field_size_limit() == before


def test_neither_path_nor_rows() -> None:
    with pytest.raises(TypeError, match="data: expected a path or a list"):
        read(3)


def test_a_key_that_is_twice_inside_a_column_is_the_columns_own(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "w1", "meta": {"a": 1, "a": 2}}\n')
    assert [row.values for row in read(path)] == [{"text": "w1", "meta": {"a": 2}}]
