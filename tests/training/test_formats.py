"""Files and folders in every format that is read: the rows, their places, and what is refused."""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from adapterkern.training import DataError, load_examples
from adapterkern.training.data.formats import text
from adapterkern.training.data.rows import BadRows, Row, iter_rows, source_name
from tests.support import tiny_run

ROWS = [{"text": "two\nlines", "label": "a"}, {"text": "é", "label": "b"}]
FILES = {
    "a.jsonl": '{"text": "two\\nlines", "label": "a"}\n{"text": "é", "label": "b"}\n',
    "a.json": '[\n  {"text": "two\\nlines",\n   "label": "a"},\n  {"text": "é", "label": "b"}\n]\n',
    "a.csv": 'text,label\n"two\nlines",a\né,b\n',
    "a.tsv": 'text\tlabel\n"two\nlines"\ta\né\tb\n',
    "a.tab": 'text\tlabel\n"two\nlines"\ta\né\tb\n',
}
LINES = {"a.jsonl": (":1", ":2"), "a.json": (":2 (row 0)", ":4 (row 1)")} | dict.fromkeys(
    ("a.csv", "a.tsv", "a.tab"), (":2", ":4")
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def read(data: Any, skip: bool = False) -> list[Row]:
    bad = BadRows(source_name(data))
    rows = list(iter_rows(data, bad))
    bad.settle(skip)
    return rows


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["", ".gz", ".GZ"])
def test_rows_and_places(name: str, suffix: str, tmp_path: Path) -> None:
    content = FILES[name].encode()
    path = write(tmp_path / (name + suffix), gzip.compress(content) if suffix else content)
    rows = read(path)
    assert [dict(row.values) for row in rows] == ROWS
    assert [row.place for row in rows] == [f"{path}{line}" for line in LINES[name]]


def test_two_files_are_read_row_by_row_in_turn(tmp_path: Path) -> None:
    """One that ends first takes nothing from the other, such as the limit on a field's length."""
    short = write(tmp_path / "short.csv", "text\nw1\n")
    long = write(tmp_path / "long.csv", "text\nw1\n" + "w" * 200_000 + "\n")
    bad = BadRows("")
    first, second = iter_rows(short, bad), iter_rows(long, bad)
    assert [next(first).values["text"], next(second).values["text"]] == ["w1", "w1"]
    assert not list(first)
    assert len(next(second).values["text"]) == 200_000


# JSON


@given(
    st.lists(st.dictionaries(TEXTS, TEXTS | st.integers() | st.none() | st.lists(st.booleans()), max_size=3)),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
)
def test_any_list_is_read_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None, ascii: bool, block: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii), encoding="utf-8-sig")
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_BLOCK", block)
        found = read(path)
    assert [dict(row.values) for row in found] == rows
    if indent:
        begins = [number for number, line in enumerate(lines, start=1) if line.startswith(" {")]
        assert [row.place for row in found] == [f"{path}:{line} (row {row})" for row, line in enumerate(begins)]


def test_a_list_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_BLOCK", 100)
    path = write(tmp_path / "a.json", json.dumps([{"text": "w1 w2 w3"}] * 1000))
    held = []
    original = text._Json._read

    def watched(self: text._Json, size: int) -> None:
        original(self, size)
        held.append(len(self._buffer))

    monkeypatch.setattr(text._Json, "_read", watched)
    assert len(read(path)) == 1000
    assert max(held) < 300


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '{"data": []}',
            r"a\.json: expected a list of objects, got an object; name a file of one object per line \.js",
        ),
        ('"text"', r"""a\.json: expected a list of objects, got '"text"'$"""),
        ("\n", r"a\.json: expected a list of objects, got the end of the file$"),
        (
            '[\n{"a": 1}\n{"a": 2}]',
            r"a\.json:3: expected a comma or the end of the list after row 0, got '\{\"a\": 2\}\]'$",
        ),
        ('[\n{"a": 1},\n]', r"a\.json:3: not JSON: Expecting value, at '\]'"),
        ('[\n{"a": 1,\n"b": no}]', r"a\.json:3: not JSON: Expecting value, at 'no\}\]'"),
        ('[{"a": 1}] 2', r"a\.json:1: expected nothing after the list, got '2'"),
        (
            '[{"a": 1},\n{"a": "wo',
            r"a\.json:2: not JSON: Unterminated string .*; the file ends here and may have been cut",
        ),
        (
            '[{"a": 1}\n',
            r"a\.json:2: expected a comma .*, got the end of the file; the file ends here and may have been",
        ),
        ("[" * 100_000, r"a\.json:1: not JSON: maximum recursion"),
        ("[1" + "0" * 5000 + "]", r"a\.json:1: not JSON: Exceeds the limit"),
        (b'[{"a": 1},\n{"a": "\xff"}]', r"a\.json:2: not UTF-8: invalid start byte"),
        (b'[{"a": 1},\n{"a": "\xc3', r"a\.json:2: not UTF-8: unexpected end of data"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_json_that_is_no_list(
    content: str | bytes, problem: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_BLOCK", block)
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=problem):
        read(path, skip=True)


def test_values_of_a_list_that_are_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"a": 1},\n [1], {"a": 1, "a": 2}, null,\n {"b": {"a": 1, "a": 2}}]')
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).splitlines()[1:4] == [
        f"  {path}:2 (row 1): expected a JSON object, got a list",
        f"  {path}:2 (row 2): key 'a' is there twice",
        f"  {path}:2 (row 3): expected a JSON object, got null",
    ]
    assert [row.place for row in read(path, skip=True)] == [f"{path}:1 (row 0)", f"{path}:3 (row 4)"]


# gzip


@pytest.mark.parametrize("name", [*FILES])
def test_a_compressed_file_that_is_cut(name: str, tmp_path: Path) -> None:
    whole = gzip.compress(FILES[name].encode())
    with pytest.raises(DataError, match=rf"{name}\.gz(:\d)?: not a whole gzip file: Compressed file ended before"):
        read(write(tmp_path / f"{name}.gz", whole[:-9]))
    with pytest.raises(DataError, match=rf"{name}\.gz(:1)?: not a whole gzip file: Not a gzipped file"):
        read(write(tmp_path / f"{name}.gz", FILES[name]))


def test_a_compressed_table_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv.gz", gzip.compress(b"w1 w2,no\nw3,yes\n"))
    with pytest.raises(DataError, match=r"a\.csv\.gz: columns .* are missing; .*the file lacks a first line"):
        load_examples(path, tiny_run.quiet(), tiny_run.tokenizer())


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.gz", "a.xlsx", "a.json.zip"])
def test_no_such_format(name: str, tmp_path: Path) -> None:
    expected = r"expected a name that ends in \.jsonl, \.csv, \.tsv, \.tab, \.json \(each may be .*\.gz\) or \.parquet$"
    with pytest.raises(DataError, match=f"{name}: {expected}"):
        read(write(tmp_path / name, ""))


def test_one_text_file_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt: expected a name .*; of texts, one per file, name the folder$"):
        read(write(tmp_path / "a.txt", "w1"))


# Folders


def test_a_folder_of_folders_has_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("pos/b.txt", "pos/a.TXT", "neg/1.txt"):
        write(tmp_path / "reviews" / name, "\ufeff" + name)
    rows = read(tmp_path / "reviews")
    assert [dict(row.values) for row in rows] == [
        {"text": "neg/1.txt", "label": "neg"},
        {"text": "pos/a.TXT", "label": "pos"},
        {"text": "pos/b.txt", "label": "pos"},
    ]
    assert [row.place for row in rows] == [str(tmp_path / "reviews" / row.values["text"]) for row in rows]
    assert source_name(f"{tmp_path}/reviews/") == str(tmp_path / "reviews")
    assert not caplog.messages
    examples, labels = load_examples(f"{tmp_path}/reviews/", tiny_run.quiet(), tiny_run.tokenizer())
    assert labels == ["neg", "pos"]
    assert [int(example.targets[0]) for example in examples] == [0, 1, 1]


def test_a_folder_of_texts_has_none(tmp_path: Path) -> None:
    write(tmp_path / "2.txt", "w2\r\n")
    write(tmp_path / "1.txt", "w1")
    assert [(dict(row.values), row.place) for row in read(str(tmp_path))] == [
        ({"text": "w1"}, str(tmp_path / "1.txt")),
        ({"text": "w2\r\n"}, str(tmp_path / "2.txt")),
    ]


def test_what_is_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/1.txt", "a/deep/2.txt", "a/3.html", "b.csv"):
        write(tmp_path / name, "w1")
    (tmp_path / "empty").mkdir()
    assert [row.place for row in read(tmp_path)] == [str(tmp_path / "a/1.txt")]
    why = "not read, for only .txt files are, there and in its subfolders"
    assert caplog.messages == [f"{tmp_path}: {why}: 'a/3.html', 'a/deep', 'b.csv', 'empty'"]


def test_a_text_that_is_none_is_a_bad_row(tmp_path: Path) -> None:
    write(tmp_path / "a/1.txt", b"w1 \xff")
    write(tmp_path / "a/2.txt", b"w1 \0")
    write(tmp_path / "a/3.txt", b"")
    write(tmp_path / "b/4.txt", b"w1")
    write(tmp_path / "5.txt", b"w1")
    with pytest.raises(DataError) as error:
        load_examples(tmp_path, tiny_run.quiet(), tiny_run.tokenizer(), ["a", "b"])
    assert str(error.value).splitlines()[1:-1] == [
        f"  {tmp_path}/5.txt: column 'label' is missing",
        f"  {tmp_path}/a/1.txt: not UTF-8: invalid start byte at byte 3",
        f"  {tmp_path}/a/2.txt: not text: it has a NUL byte",
        f"  {tmp_path}/a/3.txt: column 'text': expected a non-empty string, got an empty one",
    ]


def test_a_folder_without_texts(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    expected = r"expected \.txt files, or a subfolder of them for each label, got"
    with pytest.raises(DataError, match=f"empty: {expected} an empty folder$"):
        read(tmp_path / "empty")
    write(tmp_path / "shards/a.csv", "text\nw1\n")
    with pytest.raises(DataError, match=f"shards: {expected} a folder with 'a.csv'$"):
        read(tmp_path / "shards")


# Parquet, and what the package datasets saves


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = pyarrow.table({"text": [f"w{i}" for i in range(3000)], "label": [i % 2 for i in range(3000)]})
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=1100)
    return path


def test_parquet(parquet: Path) -> None:
    rows = read(parquet)
    assert [dict(row.values) for row in rows] == [{"text": f"w{i}", "label": i % 2} for i in range(3000)]
    assert [row.place for row in rows] == [f"{parquet}: row {i}" for i in range(3000)]


def test_parquet_is_read_batch_by_batch(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = pytest.importorskip("pyarrow.parquet")
    batches = []

    class File(lib.ParquetFile):  # type: ignore[name-defined]
        def iter_batches(self, **options: Any) -> Any:
            for batch in super().iter_batches(**options):
                batches.append(batch.num_rows)
                yield batch

    monkeypatch.setattr(lib, "ParquetFile", File)
    rows = iter_rows(parquet, BadRows(""))
    assert next(rows).values["text"] == "w0"
    assert batches == [1024]
    assert len(list(rows)) == 2999
    assert sum(batches) == 3000


def test_parquet_that_is_none(parquet: Path) -> None:
    whole = parquet.read_bytes()
    for content in (b"", b"text,label\n" * 10, whole[:-100]):
        with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file: \S"):
            read(write(parquet, content))
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file: \S"):
        read(write(parquet, whole[:4] + b"\xff" * 200 + whole[204:]))
    parquet.unlink()
    with pytest.raises(FileNotFoundError, match=r"^data: expected a file of rows, got .*parquet, which is not there$"):
        read(parquet)


def test_parquet_with_a_column_twice(parquet: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    lib = pytest.importorskip("pyarrow.parquet")
    lib.write_table(pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"]), parquet)
    with pytest.raises(DataError, match=r"a\.parquet: expected each column once, got 'text', 'text'$"):
        read(parquet)


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_list(ROWS)
    with _no_bars(datasets):
        datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "saved")
    found = read(tmp_path / "saved" / "test")
    assert [(dict(row.values), row.place) for row in found] == [(ROWS[1], f"{tmp_path}/saved/test: row 0")]
    with pytest.raises(DataError, match=r"saved: expected one split, got the folder of the splits 'test', 'train'; na"):
        read(tmp_path / "saved")
    (tmp_path / "saved" / "test" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"test: not a dataset that can be read: \S"):
        read(tmp_path / "saved" / "test")


@contextlib.contextmanager
def _no_bars(datasets: Any) -> Any:
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("a.parquet", "pyarrow.parquet", "pyarrow"), ("saved", "datasets", "datasets")],
)
def test_a_package_that_is_not_installed(
    name: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("dataset_info.json", "state.json"):
        write(tmp_path / "saved" / file, "{}")
    (tmp_path / "a.parquet").touch()
    _uninstall(monkeypatch, package)
    message = rf"{name}: expected {package}, which is not installed: pip install {package}$"
    with pytest.raises(ImportError, match=message):
        read(tmp_path / name)


def _uninstall(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    import importlib

    original = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return original(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
