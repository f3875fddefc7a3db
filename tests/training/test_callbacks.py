"""Callbacks and trackers: what they are told, that they can end a run, and what their errors leave."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking

import adapterkern as ak
from adapterkern.training import RunInfo, TrainResult, read_metrics, train
from adapterkern.training.run.checkpoint import checkpoints
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS, EVAL_ROWS = tiny_run.rows(24), tiny_run.rows(8, seed=1)


def run(directory: Path | None, callbacks: Any = (), **values: Any) -> TrainResult:
    settings = {"max_steps": 8, "eval_every": 3, "log_every": 2, "checkpoint_every": 3, "output_dir": directory}
    config = tiny_run.quiet(**(settings | values))
    return train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS, callbacks=callbacks)


class Told(ak.Callback):
    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.calls: list[Any] = []
        self.stop = stop

    def on_start(self, run: RunInfo) -> None:
        self.calls.append(run)

    def on_step(self, record: dict[str, Any]) -> bool:
        self.calls.append(dict(record))
        stop = self.stop == ("train", record["step"])
        record.clear()  # is the callback's own copy
        return stop

    def on_evaluation(self, record: dict[str, Any]) -> bool:
        self.calls.append(dict(record))
        return self.stop == ("eval", record["step"])

    def on_end(self, result: TrainResult) -> None:
        self.calls.append(result)

    def close(self) -> None:
        self.calls.append("closed")


def test_a_callback_is_told_what_metrics_jsonl_has(tmp_path: Path) -> None:
    told = Told()
    result = run(tmp_path, [ak.Callback(), told])
    started, *records, ended, closed = told.calls
    assert (started.step, started.total_steps, started.steps_per_epoch) == (0, 8, 6)
    assert (started.trainable_parameters, started.config.max_steps) == (result.trainable_parameters, 8)
    assert records == result.history == read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in records] == [
        *[("train", 2), ("eval", 3), ("train", 4), ("train", 6), ("eval", 6)],
        *[("train", 8), ("eval", 8)],
    ]
    assert ended is result
    assert closed == "closed"


@pytest.mark.parametrize(("at", "evaluated"), [(("train", 4), [3, 4]), (("eval", 3), [3])])
def test_a_callback_ends_a_run_that_has_its_files_and_goes_on(
    tmp_path: Path, at: tuple[str, int], evaluated: list[int]
) -> None:
    result = run(tmp_path, [Told(at)])
    assert (result.steps, result.stopped, result.ended) == (at[1], False, "Told has asked for it")
    assert [r["step"] for r in result.history if r["kind"] == "eval"] == evaluated
    assert checkpoints(tmp_path)[-1].name == f"step-{at[1]:08d}"
    assert (tmp_path / "adapterkern.safetensors").exists()
    whole = run(None)
    again = run(tmp_path, resume=True)
    assert (again.steps, again.ended) == (8, None)
    assert tiny_run.same_bits(tiny_run.weights(None, again.head), tiny_run.weights(None, whole.head))


def test_an_error_in_a_callback_names_it_and_the_checkpoint(tmp_path: Path) -> None:
    class Broken(Told):
        def on_step(self, record: dict[str, Any]) -> bool:
            return bool(record["step"] == 6 and 1 / 0)

    broken = Broken()
    message = (
        r"callbacks: Broken.on_step at step 6: ZeroDivisionError: division by zero; the newest checkpoint is .*003"
    )
    with pytest.raises(RuntimeError, match=message) as caught:
        run(tmp_path, [broken])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert broken.calls[-1] == "closed"
    assert run(tmp_path, resume=True).steps == 8


def test_an_error_in_a_callback_s_close_names_it_after_all_are_closed() -> None:
    class Broken(Told):
        def close(self) -> None:
            raise KeyError("handle")

    first, last = Told(), Told()
    with pytest.raises(RuntimeError, match=r"^callbacks: Broken.close: KeyError: 'handle'$"):
        run(None, [first, Broken(), last])
    assert first.calls[-1] == last.calls[-1] == "closed"


def test_what_is_no_callback_is_refused() -> None:
    for callbacks, message in (
        ([Told], "callbacks: expected Callback objects .*, got Told, a class: call it"),
        ([print], "callbacks: expected Callback objects .*, got builtin_function"),
        (Told(), "callbacks: expected a list of Callback objects, got Told"),
    ):
        with pytest.raises(TypeError, match=message):
            run(None, callbacks)
    with pytest.raises(
        TypeError, match=r"Misspelled.on_eval: expected a method among on_start, on_step, on_evaluation"
    ):

        class Misspelled(ak.Callback):
            def on_eval(self, record: Any) -> None: ...

    class Odd(ak.Callback):
        def on_step(self, record: Any) -> Any:
            return "stop"

    with pytest.raises(TypeError, match=r"Odd.on_step: expected it to return True, False or None, got 'stop'"):
        run(None, [Odd()])


class Kept(tracking.GeneralTracker):
    """What accelerate's own trackers are to a run."""

    name = "kept"
    requires_logging_directory = True
    made: ClassVar[list["Kept"]] = []

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.place, self.started, self.finished = (run_name, logging_dir), False, False
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.made.append(self)

    @property
    def tracker(self) -> Any:
        return None

    def start(self) -> None:
        self.started = True

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_trackers_get_the_records_and_go_on_in_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "kept", Kept)
    monkeypatch.setattr(Kept, "made", [])
    first = run(tmp_path, log_with="kept", max_steps=4)
    whole = run(tmp_path, log_with="kept", resume=True)
    one, two = Kept.made
    assert one.place == two.place == ("adapterkern", str(tmp_path / "trackers"))
    assert (one.started, one.finished, two.finished) == (True, True, True)
    assert (one.settings["lr"], one.settings["best"], one.settings["output_dir"]) == (1e-2, "None", str(tmp_path))
    assert all(isinstance(value, bool | int | float | str) for value in one.settings.values())
    assert not two.settings  # it is the same run
    records = first.history + [r for r in whole.history if r["step"] > 4]
    assert [step for step, _ in one.logged + two.logged] == [r["step"] for r in records]
    for (_, values), record in zip(one.logged + two.logged, records, strict=True):
        expected = {f"{record['kind']}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
        assert values == expected

    run_id = (tmp_path / "trackers" / "adapterkern.json").read_text()
    run(tmp_path, log_with="kept", overwrite=True, max_steps=2)
    assert (tmp_path / "trackers" / "adapterkern.json").read_text() != run_id

    monkeypatch.setattr(Kept, "log", lambda *_, **__: 1 / 0)
    with pytest.raises(RuntimeError, match=r"callbacks: Trackers.on_step at step 2: ZeroDivisionError"):
        run(tmp_path / "broken", log_with="kept")
    assert Kept.made[-1].finished


def test_trackers_that_there_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    for names, error, message in (
        ("tensorbord", ValueError, "log_with: expected trackers among aim, .*tensorboard.*, got 'tensorbord'"),
        ("wandb", ImportError, "log_with: expected wandb, which is not installed: pip install wandb"),
        ("comet_ml,aim", ImportError, "pip install comet-ml"),
    ):
        with pytest.raises(error, match=message):
            run(tmp_path, log_with=names)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "kept", Kept)
    with pytest.raises(ValueError, match="log_with: expected an output_dir, where trackers write, got 'kept' without"):
        run(None, log_with="kept")
    assert not list(tmp_path.iterdir())
