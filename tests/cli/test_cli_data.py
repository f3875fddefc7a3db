"""Commands on data of every kind: checked before a backbone is loaded, trained on, and found again by ``eval``."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from adapterkern import cli
from adapterkern.model import backbone
from tests.support.commands import accuracy

TRAIN = "train --model {model} --output run --adapter-dim 4 --layers=-1 --lr 0.02 --epochs 1 --no-progress "


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_folder(of_rows: list[dict[str, str]], folder: Path) -> str:
    for number, row in enumerate(of_rows):
        (folder / row["label"]).mkdir(parents=True, exist_ok=True)
        (folder / row["label"] / f"{number}.txt").write_text(row["text"])
    return f"{folder.name}/"


def as_parquet(of_rows: list[dict[str, str]], folder: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = folder.with_suffix(".parquet")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(of_rows), path)
    return path.name


def as_json(of_rows: list[dict[str, str]], folder: Path) -> str:
    folder.with_suffix(".json").write_text(json.dumps(of_rows))
    return f"./{folder.name}.json"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    splits = {"train": files[0], "test": files[1]}

    def load_dataset(path: str, name: str | None = None, *, split: str) -> Any:
        if path != "user/topics":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}.")
        return datasets.Dataset.from_list(rows(splits[split]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def run(line: str, **values: Any) -> int:
    return cli.main(shlex.split(line.format(**values)))


@pytest.mark.parametrize("make", [as_folder, as_parquet, as_json])
def test_train_and_eval_of_files(
    make: Any, model_folder: Path, files: tuple[Path, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = (make(rows(path), here / name) for path, name in zip(files, ("train", "test"), strict=True))
    assert run(TRAIN + "--train {train} --eval {test}", model=model_folder, train=train, test=test) == 0
    trained = accuracy(capsys.readouterr().out)
    summary = json.loads((here / "run" / "data_summary.json").read_text())
    assert [summary[part]["labels"] for part in ("train", "eval")] == [
        {"fruit": 32, "metal": 32},
        {"fruit": 16, "metal": 16},
    ]
    assert json.loads((here / "run" / "sources.json").read_text())["eval_data"] == str(here / Path(test))
    assert run("eval run") == 0
    assert accuracy(capsys.readouterr().out) == pytest.approx(trained, abs=5e-5)
    assert f"Trained on {Path(train).name}: 64 examples." in (here / "run" / "README.md").read_text()


def test_train_and_eval_of_the_hub(
    model_folder: Path, here: Path, hub: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(TRAIN + "--train user/topics --eval user/topics:test", model=model_folder) == 0
    trained = accuracy(capsys.readouterr().out)
    assert json.loads((here / "run" / "sources.json").read_text())["eval_data"] == "user/topics:test"
    assert run("eval run") == 0
    assert accuracy(capsys.readouterr().out) == pytest.approx(trained, abs=5e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "user/topic",
            "adapterkern train: --train: no file or folder user/topic here, and no dataset on the hub: Dataset 'us",
        ),
        (
            "user/topics:dev",
            "adapterkern train: --train: user/topics:dev: Unknown split 'dev'.; expected NAME:SPLIT, or NAME:CONF",
        ),
        ("./topics", "adapterkern train: --train: no file or folder ./topics"),
        ("topics/", "adapterkern train: --train: no file or folder topics/"),
        ("topics.parquet", "adapterkern train: --train: no file topics.parquet"),
        ("folder.json", "adapterkern train: --train: expected a file, got the folder folder.json"),
        (
            "texts",
            "adapterkern train: --train: texts: 1 bad row:\n  texts/a/1.txt: column 'text': expected a non-empty ",
        ),
        ("object.json", "adapterkern train: --train: object.json: expected a list of objects, got an object"),
    ],
)
def test_data_are_checked_before_the_backbone_is_loaded(
    data: str,
    message: str,
    model_folder: Path,
    here: Path,
    hub: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(backbone, "_read", lambda *_, **__: pytest.fail("loads a backbone"))
    for name, text in (("a/1", " "), ("a/2", "the"), ("b/3", "apple")):
        Path("texts", name).parent.mkdir(parents=True, exist_ok=True)
        Path("texts", f"{name}.txt").write_text(text)
    Path("folder.json").mkdir()
    Path("object.json").write_text("{}")
    before = sorted(here.rglob("*"))
    assert run(TRAIN + "--train {data}", model=model_folder, data=data) == 1
    assert capsys.readouterr().err.startswith(message)
    assert sorted(here.rglob("*")) == before
