"""What the files of a run must hold, one row each: refused by file and field, before anything is changed."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkern.files import sha256
from adapterkern.training import load_examples, read_metrics, train
from adapterkern.training.run import checkpoint
from adapterkern.training.run.checkpoint import TrainingState, checkpoints
from adapterkern.training.run.matching import check_restorable
from adapterkern.training.run.results import CheckpointError
from adapterkern.training.saved import load_sources
from tests.support import tiny_run

ROWS, TOKENIZER = tiny_run.rows(8), tiny_run.tokenizer()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingState]:
    """A checkpoint, and the state of the run that resumes from it."""
    found: list[tuple[Path, TrainingState]] = []

    def capture(directory: Path, state: TrainingState) -> None:
        found.append((directory, state))
        raise InterruptedError

    config: dict[str, Any] = {"output_dir": tmp_path_factory.mktemp("run"), "max_steps": 2}
    train(tiny_run.model(), ROWS, tiny_run.quiet(**config), tokenizer=TOKENIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_checkpoint", capture)
        with pytest.raises(InterruptedError):
            train(tiny_run.model(), ROWS, tiny_run.quiet(**config, resume=True), tokenizer=TOKENIZER)
    return found[0]


def setting(*keys: Any, value: Any) -> Callable[[Any, Any], None]:
    def change(saved: Any, _: Any) -> None:
        for key in keys[:-1]:
            saved = saved[key]
        saved[keys[-1]] = value

    return change


def tensor(name: str, value: Any) -> Callable[[Any, Any], None]:
    def change(_: Any, tensors: Any) -> None:
        key = next(key for key in sorted(tensors) if key.startswith(name))
        tensors[key] = value(tensors[key])

    return change


CHECKPOINT: list[tuple[str, Callable[[Any, Any], None], str]] = [
    ("step", setting("step", value=-1), r"state\.json: field 'step': expected an integer >= 0, got -1"),
    ("window", setting("window", value=[[1.0]]), r"state\.json: field 'window': expected pairs of loss and norm"),
    ("a null loss", setting("window", value=[[None, 1.0]]), r"field 'window': expected pairs .*, got \[None, 1\.0\]"),
    ("adapters", setting("adapters", value=["a"]), r"field 'adapters': expected objects, got 'a'"),
    ("a name", setting("files", "\0", value=""), r"damaged: '\\x00' is missing"),
    ("outside", setting("files", "../x", value=""), r"damaged: '\.\./x' is missing"),
    ("schedule", setting("schedule", value={}), r"state\.json: schedule: base_lrs: expected \d numbers >= 0, got None"),
    ("epochs", setting("schedule", "last_epoch", value=10**400), "schedule: last_epoch: expected an integer >= 0"),
    ("lr", setting("schedule", "_last_lr", value=["x"]), "schedule: _last_lr: expected"),
    ("a key", setting("optimizer_state", "head.linear.bias", value=["step"]), "bias: expected exp_avg, got"),
    ("keys", setting("optimizer_state", "head.linear.bias", value=1), "field 'optimizer_state': expected lists of"),
    ("NaN", tensor("parameter/", lambda t: t * torch.nan), r"training\.safetensors: parameter/.*: expected finite"),
    ("a moment", tensor("optimizer/exp_avg/", lambda t: t[None]), "optimizer/exp_avg/.*: missing or of another shape"),
    ("a count", tensor("optimizer/step/", lambda t: t[None]), r"optimizer/step/.*: expected \(\), got one of \(1,\)"),
    ("integers", tensor("parameter/", lambda t: t.long()), "parameter/.*: expected 16, 32 or 64 bits of floating"),
    ("generator", tensor("generator/cpu", lambda t: t[:9]), r"generator/cpu: expected a state of torch's generator"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in CHECKPOINT], ids=[row[0] for row in CHECKPOINT])
def test_a_checkpoint_with_valid_hashes(
    tmp_path: Path, resumed: tuple[Path, TrainingState], change: Callable[[Any, Any], None], message: str
) -> None:
    folder, state = shutil.copytree(resumed[0], tmp_path / "step-00000002"), resumed[1]
    saved, tensors = json.loads((folder / "state.json").read_text()), load_file(folder / "training.safetensors")
    change(saved, tensors)
    save_file(tensors, folder / "training.safetensors")
    saved["files"]["training.safetensors"] = sha256(folder / "training.safetensors")
    del saved["sha256"]
    (folder / "state.json").write_text(json.dumps(saved | {"sha256": checkpoint._digest(saved)}))
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    schedule, moments = copy.deepcopy(state.schedule.state_dict()), len(state.optimizer.state)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_checkpoint(folder, state)
    assert all(torch.equal(p, before[name]) for name, p in state.parameters.items())
    assert len(state.optimizer.state) == moments
    assert (state.schedule.state_dict(), state.step) == (schedule, 0)


def test_a_scale_that_has_doubled_for_long_is_one(resumed: tuple[Path, TrainingState]) -> None:
    directory, state = resumed
    state = dataclasses.replace(state, scaler=torch.amp.GradScaler("cpu"))
    saved = json.loads((directory / "state.json").read_text())
    saved["scaler"] = state.scaler.state_dict() | {"scale": 2.0**60}
    saved["schedule"]["base_lrs"] = [1e30 for _ in saved["schedule"]["base_lrs"]]
    check_restorable(directory, saved, state)
    for wrong in (-1.0, float("inf")):
        saved["scaler"]["scale"] = wrong
        with pytest.raises(CheckpointError, match=f"scaler: scale: expected a number >= 0, got {wrong}"):
            check_restorable(directory, saved, state)


def test_the_checkpoint_itself_loads(resumed: tuple[Path, TrainingState]) -> None:
    directory, state = resumed
    checkpoint.load_checkpoint(directory, copy.copy(state))
    assert checkpoints(directory.parents[1]) == [directory]


def of_text(name: str, text: str, load: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        (folder / name).write_text(text)
        return load(folder)

    return run


def metrics(line: str) -> Callable[[Path], Any]:
    return of_text("metrics.jsonl", line + "\n", lambda folder: read_metrics(folder / "metrics.jsonl"))


def read(path: Path) -> Any:
    return load_examples(path, tiny_run.quiet(), TOKENIZER)


FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no model", of_text("sources.json", "{}", load_sources), r"sources\.json: model: expected str, got None"),
    (
        "a flag",
        of_text("sources.json", '{"model": "a", "num_layers": true}', load_sources),
        r"sources\.json: num_layers: expected int | None, got True",
    ),
    ("no loss", metrics('{"step": 1, "kind": "train"}'), r"metrics\.jsonl:1: loss: expected a number, got None"),
    (
        "text",
        metrics('{"step": 1, "kind": "eval", "loss": "a"}'),
        r"metrics\.jsonl:1: loss: expected a number, got 'a'",
    ),
    (
        "a key twice",
        of_text("rows.jsonl", '{"text": "w1", "label": "a", "label": "b"}\n', lambda p: read(p / "rows.jsonl")),
        r"rows\.jsonl:1: key 'label' is there twice",
    ),
]


@pytest.mark.parametrize(("load", "message"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_file(tmp_path: Path, load: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_source_without_data_is_one(tmp_path: Path) -> None:
    (tmp_path / "sources.json").write_text('{"model": "a", "dtype": "fp32", "num_layers": null}')
    assert load_sources(tmp_path).eval_data is None
