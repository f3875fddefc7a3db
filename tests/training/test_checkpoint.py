"""Checkpoints: resumed bit-identically, refused if damaged or of another run, never half-written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import CheckpointError, TrainResult, load_run, read_metrics, train
from adapterkern.training.run import checkpoint as checkpoint_module
from adapterkern.training.run.checkpoint import checkpoints
from adapterkern.training.task import Task
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(22)
EVAL_ROWS = tiny_run.rows(6, seed=1)


class Killed(BaseException):
    """Simulates the death of the process."""


def run(directory: Path, model: LlamaAdapter | None = None, rows: Any = None, **values: Any) -> TrainResult:
    config = tiny_run.quiet(output_dir=directory, **({"checkpoint_every": 2, "log_every": 1} | values))
    model = model or tiny_run.model()
    return train(model, rows or ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS)


def die_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Make the run die in the middle of a save, after ``saves`` complete ones."""
    save_file, left = checkpoint_module.save_file, [saves]

    def save(*args: Any) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        save_file(*args)

    monkeypatch.setattr(checkpoint_module, "save_file", save)


# 22 rows make 6 forwards per epoch, the last with 2 rows; with accumulation 2, 3 steps per epoch. The run dies in the
# first epoch's third step or in the second epoch, never at the end of an epoch.
@pytest.mark.parametrize("saves", [1, 2])
@pytest.mark.parametrize(
    "values",
    [
        {"accumulation": 2},
        {"task": "causal-lm", "accumulation": 2, "schedule": "cosine"},
        {"train_adapters": False, "prefix_cache": False},
        {"precision": "fp16", "max_steps": 6},
        {"log_every": 3},
        {"lr": 1e-3, "head_lr": 5e-3},
    ],
    ids=["classification", "causal-lm", "head", "fp16", "log window", "a head's rate"],
)
def test_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int, values: dict[str, Any]
) -> None:
    whole_model, model = tiny_run.model(), tiny_run.model()
    whole = run(tmp_path / "whole", whole_model, **values)
    with monkeypatch.context() as patch:
        die_after(patch, saves)
        with pytest.raises(Killed):
            run(tmp_path / "broken", model, **values)
    steps_saved = [int(p.name[5:]) for p in checkpoints(tmp_path / "broken")]
    assert steps_saved == [2, 4][:saves]

    fresh = tiny_run.model(seed=9)  # nothing may come from the model that is passed in
    fresh.base.load_state_dict(model.base.state_dict())
    resumed = run(tmp_path / "broken", fresh, resume=True, **values)
    assert resumed.steps == whole.steps > 4
    trained = values.get("train_adapters", True)
    found = tiny_run.weights(fresh if trained else None, resumed.head)
    assert tiny_run.same_bits(found, tiny_run.weights(whole_model if trained else None, whole.head))
    timeless = [
        [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in read_metrics(path)]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "broken" / "metrics.jsonl")
    ]
    assert timeless[0] == timeless[1]
    assert sum(r["kind"] == "train" for r in timeless[0]) == whole.steps // values.get("log_every", 1)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    model = tiny_run.model()
    first = run(tmp_path, model)
    again = run(tmp_path, tiny_run.model(), resume=True)
    assert (again.steps, again.metrics and again.metrics["loss"]) == (
        first.steps,
        first.metrics and first.metrics["loss"],
    )


def test_an_interrupted_write_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_after(patch, 1)
        with pytest.raises(Killed):
            run(tmp_path)
    (kept,) = checkpoints(tmp_path)
    assert kept.name == "step-00000002"
    assert load_run(kept)[1] is not None
    run(tmp_path, resume=True)


def test_keeps_the_newest(tmp_path: Path) -> None:
    run(tmp_path, keep_checkpoints=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000008", "step-00000010", "step-00000012"]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {p.name for p in checkpoints(tmp_path)}


def test_a_checkpoint_is_usable_by_itself(tmp_path: Path) -> None:
    model = tiny_run.model()
    result = run(tmp_path, model)
    assert result.checkpoint is not None
    llama = tiny_run.model().unload()
    loaded = LlamaAdapter.from_pretrained(llama, result.checkpoint)
    config, head = load_run(result.checkpoint)
    assert tiny_run.same_bits(tiny_run.weights(loaded, head), tiny_run.weights(model, result.head))
    assert (config.max_length, config.output_dir) == (16, None)


def test_no_file_can_hold_code(tmp_path: Path) -> None:
    run(tmp_path)
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".jsonl", ".md"}


FILES = [
    "state.json",
    "training.safetensors",
    "adapterkern.safetensors",
    "head.safetensors",
    "adapterkern.json",
    "task.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    model = tiny_run.model()
    result = run(tmp_path, max_steps=2)
    assert result.checkpoint is not None
    path = result.checkpoint / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content[:-7] if damage == "cut" else content)
    before = tiny_run.weights(model)
    with pytest.raises(CheckpointError, match=rf"{result.checkpoint.name}.*{name}"):
        run(tmp_path, model, max_steps=2, resume=True)
    assert tiny_run.same_bits(tiny_run.weights(model), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", 99),
        ("step", "2"),
        ("config", None),
        ("files", {}),
        ("files", {"../state.json": "0"}),
        ("optimizer_state", {"adapter.nothing": ["exp_avg"]}),
        ("parameters", {}),
    ],
)
def test_a_wrong_field_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    result = run(tmp_path, max_steps=2)
    assert result.checkpoint is not None
    path = result.checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=result.checkpoint.name):
        run(tmp_path, max_steps=2, resume=True)


@pytest.mark.parametrize("values", [{"lr": 2e-2}, {"batch_size": 5}, {"seed": 1}, {"accumulation": 3}])
def test_another_configuration_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    run(tmp_path, max_steps=2)
    name = next(iter(values))
    with pytest.raises(CheckpointError, match=rf"begun with {name}=.*, not {values[name]}"):
        run(tmp_path, max_steps=2, resume=True, **values)


def test_no_learning_rate_is_the_default_and_on_resuming_the_run_s_own(tmp_path: Path) -> None:
    for name, lr, used, of_head in [("default", None, 6e-3, 1e-2), ("own", 1e-3, 1e-3, None)]:
        run(tmp_path / name, lr=lr, max_steps=2)
        assert load_run(tmp_path / name)[0].lr == used
        assert load_run(tmp_path / name)[0].head_lr == of_head
        again = run(tmp_path / name, lr=None, max_steps=4, resume=True)
        assert (again.steps, load_run(tmp_path / name)[0].lr) == (4, used)
    for values in ({"lr": 1e-3}, {"lr": None, "head_lr": 1e-3}):
        with pytest.raises(CheckpointError, match=r"begun with (lr=0\.006|head_lr=0\.01), not 0\.001"):
            run(tmp_path / "default", max_steps=6, resume=True, **values)


def test_what_changes_no_number_may_change(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    assert run(tmp_path, max_steps=2, resume=True, keep_checkpoints=9, prefix_cache=False, eval_every=1).steps == 2


def test_other_data_and_other_models_are_refused(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    with pytest.raises(
        CheckpointError, match="other training data or another tokenizer: resume with the same, or begin"
    ):
        run(tmp_path, rows=ROWS[::-1], max_steps=2, resume=True)
    with pytest.raises(CheckpointError, match="begun with adapter_dim=8, not 4: resume with the same value"):
        run(tmp_path, tiny_run.model(adapter_dim=4), max_steps=2, resume=True)


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        (EVAL_ROWS, EVAL_ROWS[:5], "begun with other evaluation data: resume with the same, and score the finished"),
        (EVAL_ROWS, None, "begun with evaluation data, and has none now: resume with the same"),
        (None, EVAL_ROWS, "begun with no evaluation data, and has some now: resume with the same"),
    ],
    ids=["other", "then", "now"],
)
def test_other_evaluation_data_are_refused(tmp_path: Path, first: Any, second: Any, problem: str) -> None:
    config = tiny_run.quiet(output_dir=tmp_path, max_steps=2, checkpoint_every=2, log_every=1)
    again = dataclasses.replace(config, resume=True)
    train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER, eval_data=first)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=problem):
        train(tiny_run.model(), ROWS, again, tokenizer=TOKENIZER, eval_data=second)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert train(tiny_run.model(), ROWS, again, tokenizer=TOKENIZER, eval_data=first).steps == 2


def test_other_settings_are_refused_before_the_data_are_read(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    with pytest.raises(CheckpointError, match=r"begun with lr=0\.01, not 0\.02: resume with the same value"):
        train(tiny_run.model(), tmp_path / "none.csv", tiny_run.quiet(output_dir=tmp_path, resume=True, lr=2e-2))


def test_a_run_that_has_not_finished_names_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_after(monkeypatch, 2)
    with pytest.raises(Killed):
        run(tmp_path)
    half = tmp_path / "checkpoints" / ".step-00000006.1"  # as of a killed process
    half.mkdir()
    (half / "adapterkern.json").touch()
    newest = tmp_path / "checkpoints" / "step-00000004"
    unfinished = f"task.json: no such file. The newest checkpoint of a run that has not finished is {newest}"
    with pytest.raises(FileNotFoundError, match=unfinished):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"got no such file; there is one in {newest}"):
        LlamaAdapter.from_pretrained(tiny_run.model().unload(), tmp_path)
    assert load_run(newest)[0].lr == 1e-2


def test_another_task_adapter_or_backbone_is_refused(tmp_path: Path) -> None:
    """With the same parameter names and shapes."""
    run(tmp_path, max_steps=2)

    class Another(Task):
        pass

    config, model = tiny_run.quiet(output_dir=tmp_path, max_steps=2, resume=True), tiny_run.model()
    with pytest.raises(CheckpointError, match="begun with another task: Task, not Another: resume with the same, or"):
        train(model, ROWS, config, tokenizer=TOKENIZER, task=Another(model))
    for adapter, message in (
        ({"activation": "gelu"}, "activation='silu', not 'gelu'"),
        ({"position": "attention"}, "position='layer', not 'attention'"),
        ({"modules_to_save": ["norm"]}, r"begun with modules_to_save=None, not \['model.norm'\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path, tiny_run.model(**adapter), max_steps=2, resume=True)
    with pytest.raises(
        CheckpointError, match=r"begun with other backbone weights \(another model, or dtype of its .*: resume"
    ):
        run(tmp_path, tiny_run.model(seed=5), max_steps=2, resume=True)
    narrower = tiny_run.model()
    narrower.config.num_key_value_heads = 1
    with pytest.raises(CheckpointError, match=r"a backbone of num_key_value_heads=2, not 1: resume with the same$"):
        run(tmp_path, narrower, max_steps=2, resume=True)
    assert run(tmp_path, tiny_run.model(init="xavier"), max_steps=2, resume=True).steps == 2


def test_a_checkpoint_without_its_origin_resumes(tmp_path: Path) -> None:
    """As version 0.1.0 wrote them."""
    result = run(tmp_path, max_steps=2)
    assert result.checkpoint is not None
    path = result.checkpoint / "state.json"
    older = {
        name: value
        for name, value in json.loads(path.read_text()).items()
        if name not in ("task", "head", "adapters", "backbone", "eval_fingerprint", "sha256")
    }
    path.write_text(json.dumps(older | {"sha256": checkpoint_module._digest(older)}))
    assert run(tmp_path, max_steps=2, resume=True).steps == 2


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
        run(tmp_path, resume=True)
