"""What a run refuses to write over: before the training begins, and without changing a file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import TrainConfig, train
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.saved import save_config
from adapterkern.training.task import Task
from tests.support import tiny_run

ROWS, TOKENIZER = tiny_run.rows(8), tiny_run.tokenizer()


class Untrained(Task[Any]):
    def load(self, *_: Any) -> Any:
        raise AssertionError("the rows are read only after the folder has been checked")


def run(folder: Path, **values: Any) -> None:
    model = tiny_run.model()
    config = tiny_run.quiet(output_dir=folder, **{"overwrite": True} | values)
    train(model, ROWS, config, tokenizer=TOKENIZER, task=Untrained(model))


def saved_head(folder: Path) -> None:
    ClassificationHead(8, ["a", "b"]).save_pretrained(folder)


def with_file(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return write


def model(folder: Path) -> None:
    tiny_run.model().unload().save_pretrained(folder)


PEFT = '{"peft_type": "LORA"}'
# id, what is in the folder, what is tried, the exception, its message
REFUSALS: list[tuple[str, Callable[[Path], None], Callable[[Path], None], type[Exception], str]] = [
    (
        "a model",
        model,
        run,
        ValueError,
        r"output_dir: expected a folder without a model, got .*, which holds one \(config\.json\): saving there would "
        r"damage it; name another folder$",
    ),
    ("a model, resumed", model, lambda p: run(p, overwrite=False, resume=True), ValueError, "output_dir: .* a model"),
    ("PEFT's adapter", with_file("adapter_config.json", PEFT), run, ValueError, "output_dir: .* the fields peft_type"),
    (
        "PEFT's in tasks/a",
        with_file("tasks/a/adapter_config.json", PEFT),
        run,
        ValueError,
        r"output_dir: .*tasks/a/ada",
    ),
    ("task.json", with_file("task.json", '{"todo": 1}'), run, ValueError, r"output_dir: .*task\.json: .*fields todo"),
    ("sources", with_file("sources.json", '{"url": 1}'), run, ValueError, r"output_dir: .*sources\.json: .*fields url"),
    ("a head's", with_file("head_config.json", '{"a": 1}'), run, ValueError, r"output_dir: .*head_config\.json: .* a;"),
    ("a head", with_file("head.safetensors", "x"), run, ValueError, r"head\.safetensors: expected adapterkern's file"),
    ("metrics", with_file("metrics.jsonl", '{"f1": 1}\n'), run, ValueError, r"output_dir: .*metrics\.jsonl:1: expec"),
    ("a plot", with_file("training.png", "x"), run, ValueError, r"training\.png: expected a run's plot or none"),
    (
        "head over",
        with_file("head_config.json", '{"a": 1}'),
        saved_head,
        ValueError,
        r"head_config\.json: expected ada",
    ),
    (
        "head beside",
        with_file("head.safetensors", "x"),
        saved_head,
        ValueError,
        r"head\.safetensors: expected adapterk",
    ),
    ("head in a model", model, saved_head, ValueError, "directory: expected a folder without a model"),
]


@pytest.mark.parametrize(
    ("there", "tried", "error", "message"), [row[1:] for row in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_files_of_others_stay(
    tmp_path: Path,
    there: Callable[[Path], None],
    tried: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    there(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        tried(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_checkpoints_of_others_stay(tmp_path: Path) -> None:
    """Another program's folder may have this name, too."""
    (tmp_path / "checkpoints" / "epoch-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "epoch-1" / "weights.pt").write_bytes(b"precious")
    config = tiny_run.quiet(output_dir=tmp_path, overwrite=True, max_steps=1)
    train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER)
    assert (tmp_path / "checkpoints" / "epoch-1" / "weights.pt").read_bytes() == b"precious"


class Saving:
    kind: str
    model: LlamaAdapter

    def save(self, directory: Path, config: TrainConfig) -> None:
        save_config(directory, config, self.kind)
        self.model.save_pretrained(directory)


class Own(Saving, Task[Any]):
    pass


def test_an_adapter_is_not_saved_over_that_of_a_training(tmp_path: Path) -> None:
    adapted = tiny_run.model()
    config = tiny_run.quiet(output_dir=tmp_path / "run", max_steps=1)
    train(adapted, ROWS, config, tokenizer=TOKENIZER)
    folder = tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = tiny_run.model(adapter_dim=4)
    for place, held in (
        (folder, r"a training's adapter \(task\.json\)"),
        (folder / "checkpoints" / "step-00000001", r"a training's checkpoint \(state\.json\)"),
    ):
        for arguments in ({}, {"state_dict": None}):  # by hand, and as Trainer does
            with pytest.raises(ValueError, match=rf"directory: expected a folder .*, got .*, which holds {held}"):
                other.save_pretrained(place, **arguments)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="directory: expected the name of a folder, got ''"):
        other.save_pretrained("")
    train(adapted, ROWS, dataclasses.replace(config, resume=True), tokenizer=TOKENIZER)


def test_an_adapter_is_saved_where_none_is_replaced(tmp_path: Path) -> None:
    adapted = tiny_run.model()
    config = tiny_run.quiet(output_dir=tmp_path / "head", train_adapters=False, max_steps=1)
    train(adapted, ROWS, config, tokenizer=TOKENIZER)
    (tmp_path / "state.json").write_text('{"epoch": 1}')  # another program's
    for folder in (tmp_path / "head", tmp_path / "head" / "mine", tmp_path):
        adapted.save_pretrained(folder)
    for kind in (Task, Own):
        for _ in range(2):  # a task saves itself as often as it is asked
            kind(adapted).save(tmp_path / kind.__name__, config)
