"""What a run refuses: its folder, its steps. One row each: what provokes it, the error, its message."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from adapterkern.model.config import AdapterConfig
from adapterkern.training import evaluate, train
from adapterkern.training.run.lock import in_one_thread, locked
from tests.support import tiny_run


def run(**values: Any) -> Any:
    return train(tiny_run.model(), tiny_run.rows(8), tiny_run.quiet(**values), tokenizer=tiny_run.tokenizer())


def in_a_file(folder: Path) -> None:
    (folder / "file").touch()
    run(output_dir=folder / "file" / "run")


def in_use(folder: Path) -> None:
    with locked(folder):
        run(output_dir=folder)


def read_only(folder: Path) -> None:
    run(output_dir="/proc/adapterkern")


def inside_mixing(folder: Path) -> None:
    model = tiny_run.model()
    with model.mixing(["default"], torch.zeros(4, dtype=torch.int64)):
        train(model, tiny_run.rows(8), tiny_run.quiet(), tokenizer=tiny_run.tokenizer())


def another_thread_trains(folder: Path) -> None:
    model = tiny_run.model()
    with in_one_thread(model), ThreadPoolExecutor(thread_name_prefix="second") as pool:
        train(model, tiny_run.rows(8), tiny_run.quiet(), tokenizer=tiny_run.tokenizer())  # in this thread it may
        pool.submit(lambda: train(model, tiny_run.rows(8), tiny_run.quiet(), tokenizer=tiny_run.tokenizer())).result()


def another_thread_evaluates(folder: Path) -> None:
    model = tiny_run.model()
    with in_one_thread(model), ThreadPoolExecutor() as pool:
        pool.submit(lambda: evaluate(model, tiny_run.rows(8), tiny_run.quiet(task="causal-lm"))).result()


def stopped_early(**values: Any) -> Callable[[Path], Any]:
    def begin(folder: Path) -> None:
        (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
        try:
            run(output_dir=folder, **values)
        finally:
            (folder / "metrics.jsonl").unlink()

    return begin


def offloaded(folder: Path) -> None:
    model = tiny_run.model()
    accelerate.cpu_offload(model.base, execution_device=torch.device("cpu"))
    train(model, tiny_run.rows(8), tiny_run.quiet(compile=True), tokenizer=tiny_run.tokenizer())


def with_a_trained_mlp(folder: Path) -> None:
    model = tiny_run.model(modules_to_save=("layers.3.mlp",))
    train(model, tiny_run.rows(8), tiny_run.quiet(compile=True), tokenizer=tiny_run.tokenizer())


ROWS: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    ("in a file", in_a_file, NotADirectoryError, r"output_dir: expected a folder, got .*file/run, which is or is in a"),
    (
        "in use",
        in_use,
        BlockingIOError,
        r"output_dir: .* is in use by process \d+ on .*: wait for it, stop it",
    ),
    ("read only", read_only, OSError, r"output_dir: expected a folder to write to, got /proc/adapterkern: "),
    ("nothing to resume", lambda f: run(output_dir=f, resume=True), FileNotFoundError, "resume: expected a checkpoint"),
    (
        "a run without a checkpoint",
        stopped_early(),
        FileExistsError,
        r"holds an earlier run \(metrics.jsonl\), which stopped before its first checkpoint: replace it \(overwrite=T",
    ),
    (
        "no checkpoint to resume from",
        stopped_early(resume=True),
        FileNotFoundError,
        r"got none: the run there stopped before its first; begin again \(overwrite=True\)",
    ),
    (
        "two threads",
        another_thread_trains,
        RuntimeError,
        "model: expected one that no other thread trains or evaluates, got one in use by MainThread: wait for it",
    ),
    ("evaluation in a second thread", another_thread_evaluates, RuntimeError, "model: expected one that no other"),
    ("lr 0", lambda f: run(lr=0.0), ValueError, "lr: expected a number above 0, with which a step changes something"),
    ("max_norm 0", lambda f: run(max_norm=0.0), ValueError, "max_norm: expected a number above 0, .* or inf, got 0"),
    ("a folder without a name", lambda f: run(output_dir=""), ValueError, "output_dir: expected the name of a folder"),
    ("long warmup", lambda f: run(warmup=9), ValueError, "warmup: expected at most the run's 4 steps, got 9"),
    ("warmup of all", lambda f: run(max_steps=1, warmup=1), ValueError, "warmup: expected 0 in a run of one step"),
    ("inside mixing", inside_mixing, ValueError, "model: expected one adapter to train, got a call inside mixing"),
    ("compiled shards", lambda f: run(compile=True, shard=True), ValueError, "compile: expected False with shard=True"),
    (
        "compiled and offloaded",
        offloaded,
        ValueError,
        "^compile: expected layers on one device, got layer 0 with .* hooks",
    ),
    (
        "compiled and trained",
        with_a_trained_mlp,
        ValueError,
        "^compile: expected frozen layers, got layer 3 with a LlamaMLP among the modules_to_save of an adapter",
    ),
    ("no epochs", lambda f: run(epochs=0), ValueError, "epochs: expected an integer >= 1, got 0"),
    ("deep", lambda f: AdapterConfig(depth=1000), ValueError, "depth: expected at most 32 adapters, which run one"),
    (
        "two widths",
        lambda f: AdapterConfig(adapter_dim=8, max_params=1000),
        ValueError,
        "^max_params: expected max_params or adapter_dim, not both: a budget decides the dimension; got "
        "max_params=1000 and adapter_dim=8$",
    ),
]


@pytest.mark.parametrize(("provoke", "error", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_refused(provoke: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        provoke(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["file"])
