"""Rows from Python's objects and from the hub: frames, tables, columns, datasets; and which names are the hub's."""

import datetime
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapterkern.training import DataError, load_examples
from adapterkern.training.data.formats import hub as hub_module
from adapterkern.training.data.formats.names import HubName, hub_name
from adapterkern.training.data.rows import BadRows, iter_rows, read_rows, source_name
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS = [{"text": "w1 w2", "label": "a"}, {"text": "w3", "label": "b"}, {"text": "w4", "label": "a"}]
COLUMNS = {name: [row[name] for row in ROWS] for name in ("text", "label")}


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed")


def found(data: Any) -> list[tuple[dict[str, Any], str]]:
    bad = BadRows(source_name(data))
    rows = [(dict(row.values), row.place) for row in read_rows(data, bad)]
    bad.settle(skip=False)
    return rows


class Stream:
    """What another library's table has."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)


OBJECTS: dict[str, Callable[[], Any]] = {
    "frame": lambda: library("pandas").DataFrame(ROWS, index=[7, 7, 9]),
    "frame of categories": lambda: library("pandas").DataFrame(ROWS).astype({"label": "category", "text": object}),
    "table": lambda: library("pyarrow").Table.from_pylist(ROWS),
    "table of dictionaries": lambda: library("pyarrow").table(
        {"text": COLUMNS["text"], "label": library("pyarrow").array(COLUMNS["label"]).dictionary_encode()}
    ),
    "table of views": lambda: library("pyarrow").table(
        {name: library("pyarrow").array(values, "string_view") for name, values in COLUMNS.items()}
    ),
    "stream": lambda: Stream(library("pyarrow").Table.from_pylist(ROWS)),
    "reader": lambda: library("pyarrow").Table.from_pylist(ROWS).to_reader(1),
    "dataset": lambda: library("datasets").Dataset.from_list(ROWS),
    "iterable dataset": lambda: library("datasets").Dataset.from_list(ROWS).to_iterable_dataset(),
    "generator": lambda: (row for row in ROWS),
    "lists": lambda: COLUMNS,
    "tuples": lambda: {name: tuple(values) for name, values in COLUMNS.items()},
    "arrays": lambda: {name: np.array(values) for name, values in COLUMNS.items()},
    "series": lambda: {name: library("pandas").Series(values, index=[5, 6, 7]) for name, values in COLUMNS.items()},
    "arrays of arrow": lambda: {name: library("pyarrow").array(values) for name, values in COLUMNS.items()},
    "columns of a dataset": lambda: {name: library("datasets").Dataset.from_list(ROWS)[name] for name in COLUMNS},
    "slice of a dataset": lambda: library("datasets").Dataset.from_list(ROWS)[:3],
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects(kind: str) -> None:
    assert found(OBJECTS[kind]()) == [(row, f"row {number}") for number, row in enumerate(ROWS)]
    examples, labels = load_examples(OBJECTS[kind](), tiny_run.quiet(), TOKENIZER)
    assert [example.input_ids.tolist() for example in examples] == [[4, 5], [6], [7]]
    assert labels == ["a", "b"]


def test_a_frame_has_the_values_of_python() -> None:
    pandas = library("pandas")
    frame = pandas.DataFrame({"text": ["w1", "w2"], "label": np.array([1, 0], dtype=np.int8), "share": [0.5, 1.5]})
    frame["when"] = pandas.to_datetime(["2026-01-02", None])
    frame["given"] = [[4, 5], np.array([6])]
    (first, _), (second, _) = found(frame)
    assert {name: type(value) for name, value in first.items()} == {
        "text": str,
        "label": int,
        "share": float,
        "when": pandas.Timestamp,
        "given": list,
    }
    assert first["when"] == datetime.datetime(2026, 1, 2)
    assert second["when"] is None
    assert second["given"].tolist() == [6]
    assert load_examples(frame, tiny_run.quiet(), TOKENIZER)[1] == ["0", "1"]


@pytest.mark.parametrize("dtype", ["str", "object", "string", "category"])
@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("missing", ["None", "NaN", "NA"])
def test_a_missing_value_is_not_the_text_nan(dtype: str, column: str, missing: str) -> None:
    pandas = library("pandas")
    value = {"None": None, "NaN": float("nan"), "NA": pandas.NA}[missing]
    frame = pandas.DataFrame(ROWS)
    frame[column] = pandas.Series([*COLUMNS[column][:2], value], dtype=dtype)
    with pytest.raises(DataError, match=rf"1 bad row:\n  row 2: column '{column}': expected .*, got None\n"):
        load_examples(frame, tiny_run.quiet(), TOKENIZER)


@pytest.mark.parametrize(
    "rows",
    [
        lambda: library("pandas").DataFrame(ROWS).assign(text=[1.0, float("nan"), 2.0]),
        lambda: {"text": [1.0, float("nan"), 2.0], "label": COLUMNS["label"]},
        lambda: library("pandas").DataFrame(ROWS).assign(text=library("pandas").Timestamp("2026-01-02")),
    ],
    ids=["numbers", "numbers in lists", "times"],
)
def test_values_that_are_no_texts(rows: Callable[[], Any]) -> None:
    with pytest.raises(DataError, match=r"3 bad rows:\n  row 0: column 'text': expected a non-empty string, got "):
        load_examples(rows(), tiny_run.quiet(), TOKENIZER)


def test_integers_with_a_missing_one_stay_integers() -> None:
    pandas = library("pandas")
    frame = pandas.DataFrame({"text": COLUMNS["text"], "label": pandas.array([3, None, 1], dtype="Int64")})
    assert [row["label"] for row, _ in found(frame)] == [3, None, 1]


@pytest.mark.parametrize("kind", ["pandas", "pyarrow"])
def test_large_objects_are_read_in_parts(kind: str) -> None:
    columns = {"text": [f"w{i}" for i in range(2500)], "label": list(range(2500))}
    data = library("pandas").DataFrame(columns) if kind == "pandas" else library("pyarrow").table(columns)
    assert found(data) == [({"text": f"w{i}", "label": i}, f"row {i}") for i in range(2500)]


def test_tensors_and_tokenized_columns() -> None:
    columns = {"input_ids": torch.tensor([[4, 5], [6, 7]]), "label": torch.tensor([1, 0])}
    examples, labels = load_examples(columns, tiny_run.quiet())
    assert [example.input_ids.tolist() for example in examples] == [[4, 5], [6, 7]]
    assert labels == ["0", "1"]
    encoded = TOKENIZER(["w1 w2", "w3 w4"])  # a mapping, though no dict
    examples, _ = load_examples(encoded, tiny_run.quiet(task="causal-lm"))
    assert [example.input_ids.tolist() for example in examples] == [[4, 5], [6, 7]]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_dataset_in_another_format(kind: str) -> None:
    data = library("datasets").Dataset.from_dict({"text": ["w1", "w2"], "label": [1, 0], "input_ids": [[4], [5, 6]]})
    examples, labels = load_examples(data.with_format(kind), tiny_run.quiet(), TOKENIZER)
    assert [example.input_ids.tolist() for example in examples] == [[4], [5, 6]]
    assert labels == ["0", "1"]


SPLITS = "with the keys 'train', 'test'; pass one of its splits, or a mapping for each row$"


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (
            lambda: {"text": "w1", "label": "a"},
            TypeError,
            "got dict with the keys 'text', 'label'; pass .* a mapping f",
        ),
        (lambda: {"text": ["w1"], "label": ["a", "b"]}, DataError, "one length, got 'text' of 1, 'label' of 2$"),
        (lambda: {"train": ROWS, "test": ROWS}, TypeError, f"got dict {SPLITS}"),
        (lambda: {"train": OBJECTS["frame"](), "test": OBJECTS["frame"]()}, TypeError, f"got dict {SPLITS}"),
        (lambda: {"train": OBJECTS["table"](), "test": OBJECTS["table"]()}, TypeError, f"got dict {SPLITS}"),
        (lambda: {"train": OBJECTS["dataset"](), "test": OBJECTS["dataset"]()}, TypeError, f"got dict {SPLITS}"),
        (
            lambda: library("datasets").DatasetDict(train=OBJECTS["dataset"](), test=OBJECTS["dataset"]()),
            TypeError,
            f"got DatasetDict {SPLITS}",
        ),
        (lambda: {"text": np.array(3)}, TypeError, "got dict with the keys 'text'; pass"),
        (lambda: {}, TypeError, "got dict with the keys ; pass"),
        (lambda: OBJECTS["frame"]()["text"], TypeError, "expected a table of columns, got Series: "),
        (lambda: OBJECTS["table"]()["text"], TypeError, "expected a table of columns, got ChunkedArray: "),
        (
            lambda: library("pandas").DataFrame([["w1", "w2"]], columns=["text", "text"]),
            DataError,
            "expected each column once, got 'text', 'text'$",
        ),
        (
            lambda: library("pyarrow").table([["w1"], ["w2"]], names=["text", "text"]),
            DataError,
            "expected each column once, got 'text', 'text'$",
        ),
        (
            lambda: library("pyarrow").table({"text": library("pyarrow").array([b"\xff"]).view("string")}),
            DataError,
            "row 0 or one of the next 1024: not UTF-8: invalid start byte$",
        ),
    ],
)
def test_objects_that_are_no_rows(data: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^data: .*{message}"):
        list(iter_rows(data(), BadRows("data")))


# The hub


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("imdb", ("imdb", None, "train")),
        ("stanfordnlp/imdb", ("stanfordnlp/imdb", None, "train")),
        ("stanfordnlp/imdb:test", ("stanfordnlp/imdb", None, "test")),
        ("imdb:train[:10%]+test[5:9]", ("imdb", None, "train[:10%]+test[5:9]")),
        ("nyu-mll/glue:sst2:validation", ("nyu-mll/glue", "sst2", "validation")),
        ("wikimedia/wikipedia:20231101.en:train[:100]", ("wikimedia/wikipedia", "20231101.en", "train[:100]")),
        ("teknium/OpenHermes-2.5", ("teknium/OpenHermes-2.5", None, "train")),
        *((path, None) for path in ("a.csv", "a.CSV:train", "user/a.jsonl.gz", "a.txt", "a.h5", "./imdb", "/imdb")),
        *((path, None) for path in ("~/imdb", "a/b/c", "imdb/", "imdb:", "my data", "", "tests", "tests/training")),
        (Path("imdb"), None),
    ],
)
def test_names_of_the_hub(text: Any, name: tuple[str, str | None, str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # which has tests/training
    assert hub_name(text) == (None if name is None else HubName(*name))


def test_the_hub_s_source_is_named_with_its_split() -> None:
    assert source_name("imdb") == "imdb:train"
    assert source_name("nyu-mll/glue:sst2:test") == "nyu-mll/glue:sst2:test"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Datasets as a hub would have them; the calls that ask for them."""
    datasets = library("datasets")
    calls = []

    def load_dataset(path: str, name: str | None = None, *, split: str) -> Any:
        calls.append((path, name, split))
        if path == "user/gated":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' is a gated dataset on the Hub.")
        if path == "user/far":
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub (ConnectError)")
        if path == "user/script":
            raise RuntimeError("Dataset scripts are no longer supported,\nbut found script.py")
        if path == "glue" and name is None:
            raise ValueError(f"Config name is missing.\nPlease pick one: {['sst2'] * 100}")
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")
        return datasets.Dataset.from_list(ROWS[:2] if split == "train" else [*ROWS[1:], {"text": None, "label": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_dataset_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    assert found("user/reviews") == [(row, f"user/reviews:train: row {i}") for i, row in enumerate(ROWS[:2])]
    assert len(found("glue:sst2:test")) == 3
    assert hub == [("user/reviews", None, "train"), ("glue", "sst2", "test")]
    with pytest.raises(DataError) as error:
        load_examples("user/reviews:test", tiny_run.quiet(), TOKENIZER)
    assert str(error.value).splitlines()[:2] == [
        "user/reviews:test: 1 bad row:",
        "  user/reviews:test: row 2: column 'text': expected a non-empty string, got None",
    ]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "user/reviews:dev",
            DataError,
            r"^user/reviews:dev: Unknown split \"dev\"\. Should be one of \['train', 'test'\]\.; expected NAME:SPLIT, "
            "or NAME:CONFIGURATION:SPLIT$",
        ),
        (
            "glue",
            DataError,
            r"^glue:train: Config name is missing\. Please pick one: \['sst2', .* \.\.\.; expected NAME:",
        ),
        (
            "user/script",
            DataError,
            r"^user/script:train: Dataset scripts are no longer supported, but found script\.py;",
        ),
        (
            "user/gated:test",
            FileNotFoundError,
            "^data: no file or folder user/gated here, and no dataset on the hub: .* is a gated dataset on the Hub",
        ),
        ("user/far", OSError, "^data: no file or folder user/far here, and no dataset on the hub: Couldn't reach"),
    ],
)
def test_what_the_hub_does_not_have(name: str, kind: type[Exception], message: str, hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(kind, match=message):
        read_rows(name, BadRows(""))


def test_without_a_network_the_cache_alone_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package datasets tries for half a minute, unless it is told to be offline."""
    datasets, hub = library("datasets"), library("huggingface_hub")
    asked: list[Any] = []

    class ConnectError(Exception):  # as httpx has it
        pass

    def unreachable(url: str) -> None:
        asked.append(url)
        raise ConnectError

    def load_dataset(path: str, name: str | None, *, split: str) -> Any:
        asked.append(datasets.config.HF_HUB_OFFLINE)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(hub_module, "_PAUSE", 0.0)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(found("user/reviews")) == 3
    url = hub.hf_hub_url("user/reviews", "README.md", repo_type="dataset")
    assert asked == [url, url, True]
    assert datasets.config.HF_HUB_OFFLINE is False
    monkeypatch.setattr(hub, "get_hf_file_metadata", asked.append)
    found("user/reviews")
    assert asked[3:] == [url, False]


def test_the_hub_without_a_network() -> None:
    library("datasets")
    with pytest.raises(
        OSError, match=r"^data: no file or folder user/no here, and no dataset on the hub: Couldn't reach"
    ):
        read_rows("user/no", BadRows(""))


@pytest.mark.parametrize(
    ("data", "package", "message"),
    [
        (
            "imdb",
            "datasets",
            "no file or folder imdb here; to look for it on the hub: expected datasets, which is not ",
        ),
        (Stream(None), "pyarrow", "to read Stream: expected pyarrow, which is not installed: pip install pyarrow$"),
    ],
)
def test_a_package_that_is_not_installed(
    data: Any, package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=f"^data: {message}"):
        read_rows(data, BadRows(""))
