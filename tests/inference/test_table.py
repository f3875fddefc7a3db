"""Predictions in files, beside the columns of their rows."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterkern.inference.table import format_of_output, write_predictions
from adapterkern.training.data.rows import DataError
from adapterkern.training.heads import Prediction

YES = Prediction("yes", 0.75, {"no": 0.25, "yes": 0.75})
NO = Prediction("no", 0.5, {"no": 0.5, "yes": 0.5})


def lines(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open(newline="")))


def test_csv_keeps_the_columns(tmp_path: Path) -> None:
    rows: list[tuple[Any, Any]] = [
        ({"id": 7, "text": 'say "a, b"\nc'}, YES),
        ({"id": 8, "text": ""}, None),
        ({"id": np.int64(9), "text": [1, 2]}, NO),
    ]
    assert write_predictions(path := tmp_path / "out.csv", rows) == 3
    assert lines(path) == [
        ["id", "text", "prediction", "probability"],
        ["7", 'say "a, b"\nc', "yes", "0.75"],
        ["8", "", "", ""],
        ["9", "[1, 2]", "no", "0.5"],
    ]


def test_csv_has_a_column_per_label(tmp_path: Path) -> None:
    write_predictions(path := tmp_path / "out.tsv", [({"text": "a"}, YES)], probabilities=True)
    assert (
        path.read_text() == "text\tprediction\tprobability\tprobability no\tprobability yes\na\tyes\t0.75\t0.25\t0.75\n"
    )


def test_a_bad_first_row_does_not_take_the_labels_columns(tmp_path: Path) -> None:
    write_predictions(path := tmp_path / "out.csv", [({"text": ""}, None), ({"text": "a"}, YES)], probabilities=True)
    assert lines(path) == [
        ["text", "prediction", "probability", "probability no", "probability yes"],
        ["", "", "", "", ""],
        ["a", "yes", "0.75", "0.25", "0.75"],
    ]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_jsonl_keeps_values(name: str, tmp_path: Path) -> None:
    row = {"text": "é", "ids": np.arange(2), "path": Path("x"), "deep": {"a": None}}
    write_predictions(path := tmp_path / name, [(row, YES)], probabilities=True)
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith("gz") else path.read_text()
    expected = {"text": "é", "ids": [0, 1], "path": "x", "deep": {"a": None}}
    assert json.loads(text) == expected | {
        "prediction": "yes",
        "probability": 0.75,
        "probabilities": {"no": 0.25, "yes": 0.75},
    }


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("before")
    with pytest.raises(DataError, match="column 'prediction': expected rows without what a prediction adds"):
        write_predictions(path, [({"text": "a"}, YES), ({"prediction": "b"}, YES)])
    with pytest.raises(
        DataError, match=r"out\.csv: expected the columns of the first row, .*, got 'more'; write \.jsonl"
    ):
        write_predictions(path, [({"text": "a"}, YES), ({"text": "a", "more": 1}, YES)])
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"output: expected a name that ends in \.csv, \.tsv, \.jsonl .*, got .*out\.xlsx"
    ):
        format_of_output(tmp_path / "out.xlsx")
    with pytest.raises(FileNotFoundError, match=r"output: expected a file in a folder that exists, got .*no/out\.csv"):
        format_of_output(tmp_path / "no" / "out.csv")


def test_data_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, link = tmp_path / "in" / "a.jsonl", tmp_path / "link.jsonl"
    data.parent.mkdir()
    data.write_text("{}\n")
    link.symlink_to(data)
    monkeypatch.chdir(data.parent)
    for output, source in ((Path("a.jsonl"), data), (link, data), (data, str(link)), (Path("b.jsonl"), data.parent)):
        with pytest.raises(ValueError, match=r"^output: expected a file that is no part of the data"):
            format_of_output(output, source)
    for other in (data, "owner/name", [{"text": "a"}], None):
        assert format_of_output(tmp_path / "out.jsonl", other) == ".jsonl"
