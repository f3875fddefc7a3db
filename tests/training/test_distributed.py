"""Two processes with gloo, under DDP and FSDP2: the numbers and the files of one process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterkern.training import processes
from tests.support import exchanged, pair, two_processes
from tests.support.pair import found
from tests.support.runs import cut, records, same

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

# Two processes sum a step's rows, and FSDP2 the squares of its shards, in another order: fp32 rounding, amplified by
# Adam over 7 steps of 1e-2.
TOLERANCE = {"ddp": 2e-6, "shard": 2e-6, "ddp bf16": 2e-2, "shard bf16": 2e-2}
TOLERANCE |= {"ddp packed": 2e-6, "shard packed": 2e-6}
TOLERANCE |= {"ddp modules": 2e-5, "shard modules": 2e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two; those that resume do so from step 3 of 7."""
    folder = tmp_path_factory.mktemp("runs")
    two_processes.run(folder / "one")
    two_processes.run(folder / "one padded", task="causal-lm")
    two_processes.run(folder / "one bf16", precision="bf16", dtype=torch.bfloat16)
    two_processes.run(folder / "one modules", modules=("embed_tokens",))
    for name in ("one to ddp", "one to shard"):
        cut(folder / "one", folder / name)
    shutil.copytree(folder / "one", folder / "damaged")
    (folder / "damaged" / "metrics.jsonl").write_text("nonsense\n")
    pair.start(two_processes.work, folder)
    for name in ("ddp", "shard"):
        cut(folder / name, folder / f"{name} to one")
        two_processes.run(folder / f"{name} to one", resume=True)
    return folder


def test_clipping_has_something_to_do(folder: Path) -> None:
    assert all(record["grad_norm"] > 0.3 for record in records(folder / "one") if record["kind"] == "train")


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("ddp", "one"),
        ("shard", "one"),
        ("ddp packed", "one padded"),
        ("shard packed", "one padded"),
        ("ddp bf16", "one bf16"),
        ("shard bf16", "one bf16"),
        ("ddp modules", "one modules"),
        ("shard modules", "one modules"),
    ],
)
def test_two_processes_learn_as_one(folder: Path, name: str, one: str) -> None:
    same(folder / name, folder / one, TOLERANCE[name])


@pytest.mark.parametrize("name", ["ddp to one", "shard to one", "one to ddp", "one to shard"])
def test_a_checkpoint_resumes_on_another_number_of_processes(folder: Path, name: str) -> None:
    same(folder / name, folder / "one", 2e-6)


def test_a_checkpoint_of_two_holds_what_one_s_does(folder: Path) -> None:
    one, *others = (folder / name / "checkpoints" / "step-00000006" for name in ("one", "ddp", "shard"))
    expected = load_file(one / "training.safetensors")
    states = [json.loads((run / "state.json").read_text()) for run in (one, *others)]
    for state in states:
        assert state["task"] == "Task"
        assert state["backbone"]["weights"] is not None
        assert {n: state[n] for n in ("adapters", "backbone")} == {n: states[0][n] for n in ("adapters", "backbone")}
    for other in others:
        assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in one.iterdir())
        got = load_file(other / "training.safetensors")
        assert got.keys() == expected.keys()
        for key in expected.keys() - {"generator/cpu"}:
            torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-4)


def test_both_processes_know_how_it_went(folder: Path) -> None:
    for name in ("ddp", "shard"):
        first, second = (found(folder, rank)[name]["metrics"] for rank in range(2))
        assert {key: first[key] for key in ("loss", "accuracy")} == {key: second[key] for key in ("loss", "accuracy")}


def test_each_process_has_a_prefix_cache_of_what_it_needs(folder: Path) -> None:
    """Half of two steps of 8 rows, and the 9 texts of the evaluation; no cache if layers are sharded."""
    counts = [found(folder, rank)["cached"] for rank in range(2)]
    assert counts == [8 + 9 + 0, 8 + 9 + 0]
    assert found(folder)["ddp"]["prefix"] == 3
    assert found(folder)["shard"]["prefix"] == 0


def test_bytes_that_a_step_exchanges(folder: Path) -> None:
    """Every byte that ``model/scale.py`` counts, and none besides: in a step's last forward, or in each."""
    for rank in range(2):
        got = {name: each["received"] for name, each in found(folder, rank)["exchanged"].items()}
        for name in exchanged.DDP:  # two forwards exchange gradients once
            assert got[f"ddp {name}"] == {"allreduce": exchanged.scale(exchanged.DDP[name]).exchanged("DDP", 2).reduced}
        for name, adapter in exchanged.SHARDED.items():
            gathered, reduced = exchanged.scale(adapter, "bf16" if name == "bf16" else "fp32").exchanged("FSDP2", 2)
            gathered *= 2 if name == "two forwards" else 1
            assert got[f"shard {name}"] == {"allgather_base": gathered, "reduce_scatter_base": reduced}, name
        for dtype in exchanged.DTYPES:
            gathered, reduced = exchanged.scale({}, dtype, full=True).exchanged("FSDP2", 2)
            assert got[f"full {dtype}"] == {"allgather_base": gathered, "reduce_scatter_base": reduced}


def test_bytes_that_a_process_holds(folder: Path) -> None:
    """Weights, values, gradients, moments of rank 0, which has the larger pieces; buckets, and what is gathered."""
    for name, got in found(folder)["exchanged"].items():
        how, _, case = name.partition(" ")
        if how == "full":
            scale = exchanged.scale({}, case, full=True)
        else:
            scale = exchanged.scale(exchanged.SHARDED[case], "bf16" if case == "bf16" else "fp32")
        engine = "DDP" if how == "ddp" else "FSDP2"
        taken = scale.memory(engine, 2)
        assert (got["weights"], got["trained"]) == (taken.weights, taken.trained), name
        if engine == "DDP":
            assert int(got["buckets"]) == taken.buffers
        else:
            assert got["gathered"] == scale.gathered(2), name
            assert scale.gathered(2) <= taken.buffers


def test_the_backbone_is_split(folder: Path) -> None:
    assert [found(folder, rank)["part"] for rank in range(2)] == [0.5, 0.5]


def test_a_signal_to_one_process_stops_both_at_one_step(folder: Path) -> None:
    checkpoint = folder / "stopped" / "checkpoints" / "step-00000004"
    assert [found(folder, rank)["stopped"] for rank in range(2)] == [(True, 4, checkpoint)] * 2
    assert checkpoint.is_dir()


def test_errors_reach_both_processes(folder: Path) -> None:
    first, second = (found(folder, rank) for rank in range(2))
    assert first["folder"].startswith("FileExistsError: output_dir:")
    assert second["folder"] == f"OtherProcessError: process 0: {first['folder']}"
    for each in (first, second):
        assert each["cache"].startswith("ValueError: prefix_cache: expected None or False, because the backbone is")
        assert each["fp16"].startswith("ValueError: precision: expected fp32 or bf16 with shard=True")
    for name, error in (("metrics", "IsADirectoryError: [Errno 21] not written"), ("damaged", "ValueError: ")):
        assert first[name].startswith(error)
        assert "metrics.jsonl" in first[name]
        assert second[name] == f"OtherProcessError: process 0: {first[name]}"
    assert second["full"] == "OSError: prefix_cache: no room"
    assert first["full"] == f"OtherProcessError: process 1: {second['full']}"


def test_one_process_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="shard: expected several processes"):
        two_processes.run(None, shard=True)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_shares_are_disjoint_complete_and_equally_many(monkeypatch: pytest.MonkeyPatch, count: int, rows: int) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.share(list(range(rows)), 3))
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch, counts in share if counts for i in batch) == list(range(rows))
    assert all(batch and len(batch) <= 3 for share in shares for batch, _ in share)
