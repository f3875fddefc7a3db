"""Two processes under DeepSpeed's ZeRO-2 and ZeRO-3, with gloo on a CPU: the numbers and the files of one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterkern.model.scale import LIVE, PERSISTENT, REDUCED
from tests.support import exchanged, pair, two_processes, zero_processes
from tests.support.pair import found
from tests.support.runs import cut, records, same
from tests.support.tiny_qa import shared_run

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [pytest.mark.timeout(480), pytest.mark.slow]

STAGES = ["zero2", "zero3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two; those that resume do so from step 3 of 7."""
    folder = tmp_path_factory.mktemp("runs")
    two_processes.run(folder / "one")
    two_processes.run(folder / "one bf16", precision="bf16")
    two_processes.run(folder / "one causal-lm", task="causal-lm")
    two_processes.run(folder / "one modules", modules=("embed_tokens", "layers.3.mlp"))
    for stage in STAGES:
        cut(folder / "one", folder / f"one to {stage}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        pair.start(zero_processes.work, folder)
    for stage in STAGES:
        cut(folder / stage, folder / f"{stage} to one")
        two_processes.run(folder / f"{stage} to one", resume=True)
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["{}", "one to {}", "{} to one"])
def test_learns_as_one_process_and_resumes_from_it_and_it_from_here(folder: Path, stage: str, name: str) -> None:
    assert all(record["grad_norm"] > 0.3 for record in records(folder / "one") if record["kind"] == "train")
    same(folder / name.format(stage), folder / "one", 2e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_next_token_and_spans_are_learned_as_by_one_process(folder: Path, stage: str) -> None:
    same(folder / f"{stage} causal-lm", folder / "one causal-lm", 5e-6)
    for kind, values, tolerance in (("qa", {}, 1e-5), ("qa bf16", {"precision": "bf16"}, 2e-2)):
        losses, metrics = shared_run(**values)
        got_losses, got = found(folder)[f"{stage} {kind}"]
        assert got_losses == pytest.approx(losses, rel=tolerance)
        assert got["loss"] == pytest.approx(metrics["loss"], rel=tolerance)


@pytest.mark.parametrize("stage", STAGES)
def test_modules_of_the_backbone_are_trained_with_the_adapter(folder: Path, stage: str) -> None:
    same(folder / f"{stage} modules", folder / "one modules", 2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16(folder: Path, stage: str) -> None:
    """DeepSpeed casts all parameters, autocast those of matrix products: some bits of 8 apart."""
    same(folder / f"{stage} bf16", folder / "one bf16", 5e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_what_one_process_s_does(folder: Path, stage: str) -> None:
    one, other = (folder / name / "checkpoints" / "step-00000006" for name in ("one", stage))
    assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in one.iterdir())
    expected, got = (load_file(each / "training.safetensors") for each in (one, other))
    assert got.keys() == expected.keys()
    for key in expected.keys() - {"generator/cpu"}:
        torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_an_infinite_loss_changes_nothing(folder: Path, stage: str) -> None:
    for rank in range(2):
        same_bits = found(folder, rank)[f"{stage} infinite"]
        assert same_bits
        assert all(same_bits)


@pytest.mark.parametrize("persistent", exchanged.PERSISTENT)
def test_bytes_that_a_step_exchanges(folder: Path, persistent: int) -> None:
    """Of ZeRO-3 that keeps nothing gathered; see ``model/scale.py``."""
    for rank in range(2):
        for name, got in found(folder, rank)["exchanged"][persistent].items():
            scale = exchanged.scale(exchanged.SHARDED[name])._replace(checkpointed=name == "checkpointed")
            gathered, reduced = scale.exchanged("ZeRO-3", 2, persistent)
            assert got["received"] == {"allgather_base": gathered, "reduce_scatter_base": reduced}


def test_the_defaults_that_are_counted() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(stage=3)
    assert (zero.param_persistence_threshold, zero.max_live_parameters) == (PERSISTENT, LIVE)
    assert (zero.contiguous_gradients, zero.reduce_bucket_size) == (True, REDUCED)


def test_refuses_what_would_be_done_twice_or_wrongly(folder: Path) -> None:
    for rank in range(2):
        got = found(folder, rank)
        for name, message in {
            "shard": "ValueError: shard: expected False under DeepSpeed",
            "compile": "ValueError: compile: expected False under DeepSpeed",
            "fp16": "ValueError: precision: expected fp32 or bf16 under DeepSpeed, got fp16",
            "bf16 backbone": "ValueError: precision: expected bf16 under DeepSpeed for parameters of",
            "task": "NotImplementedError: task: expected one whose forwards all run the same modules (uniform), got",
            "optimizer": "ValueError: optimizer: expected none in DeepSpeed's configuration",
            "offload": "NotImplementedError: zero_optimization.offload_param: expected the device 'none', got 'cpu'",
            "stage": "ValueError: zero_optimization.stage: expected 1, 2 or 3, got 0",
        }.items():
            assert got[name].startswith(message)


@pytest.mark.parametrize("stage", STAGES)
def test_the_shipped_configuration_asks_for_its_stage(stage: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(__file__).parents[2] / "docs" / "accelerate" / f"{stage}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == "DEEPSPEED"
    assert config.deepspeed_config == {"zero_stage": int(stage[-1])}
