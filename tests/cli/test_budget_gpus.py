"""What ``budget --gpus`` says of a step on several GPUs, against numbers by hand; test_distributed.py measures."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import adapterkern as ak
from adapterkern import cli
from adapterkern.cli.budget import SHAPES
from adapterkern.model.memory import Training
from adapterkern.model.scale import Cluster, Scale

BUDGET = "budget --model-config llama-2-70b --gpus 1,64 --memory 80GB --task causal-lm --batch-size 4 --max-length 1024"
N, ADAPTERS = 68_976_648_192, 80 * (64 * (2 * 8192 + 1) + 3 * 8192)
WHOLE = 2 * 32_000 * 8192 + 8192  # embeddings, LM head and final norm
LAYER = (N - WHOLE) // 80


def scale(name: str = "llama-2-70b", rows: int = 4, full: bool = False, **adapter: Any) -> Scale:
    shape = SHAPES[name]
    config = ak.AdapterConfig(**adapter).resolve(shape.hidden_size, shape.num_layers)
    return Scale(Training(shape, config, 1024, 1024), rows, full)


def printed(table: str) -> dict[str, list[str]]:
    """The cells of each line, by GPUs, run and engine."""
    return {key: cells.split() for key, cells in re.findall(r"^ *(\d+ \w+ +[\w-]+) +(.*)$", table, re.M)}


def test_a_70b_on_64_gpus() -> None:
    done = subprocess.run([sys.executable, "-m", "adapterkern", *BUDGET.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"llama-2-70b: {N:,} parameters in bf16, {ADAPTERS:,} in adapters"
    memory, step = (printed(part) for part in done.stdout.split("\n\n")[1:])
    # weights, trained, buffers: what DDP repeats, and FSDP2 cuts into 64 pieces
    assert memory["1 adapter one"][:3] == ["137.95", f"{16 * ADAPTERS / 1e9:.2f}", "0.00"]
    assert memory["64 adapter DDP"][:3] == ["137.95", "1.37", f"{4 * ADAPTERS / 1e9:.2f}"]
    held = 2 * WHOLE + 4 * ADAPTERS + 4 * LAYER + 4 * ADAPTERS  # root, two layers, gradients
    assert memory["64 adapter FSDP2"][:3] == [f"{2 * N / 64e9:.2f}", "0.02", f"{held / 1e9:.2f}"]
    assert memory["64 full    DDP"][1] == f"{16 * N / 1e9:.2f}"
    # 64/63 of all that is received: each layer twice, the root once; the adapters' gradients in fp32
    gathered, reduced, *_, limit = step["64 adapter FSDP2"]
    assert float(gathered) == pytest.approx((160 * 2 * LAYER + 2 * WHOLE + 4 * ADAPTERS) * 63 / 64e9, abs=1e-3)
    assert float(reduced) == pytest.approx(4 * ADAPTERS * 63 / 64e9, abs=1e-3)
    assert limit == "compute"
    assert step["64 adapter DDP"] == ["0.000", f"{8 * ADAPTERS * 63 / 64e9:.3f}", "-", "-", "-", "memory"]


@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b"])
def test_the_table_of_the_docs(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--gpus 1,8,64,512 --memory 80GB --task causal-lm --batch-size 4 --max-length 1024"
    assert cli.main(["budget", "--model-config", model, *options.split()]) == 0
    memory, step = (printed(part) for part in capsys.readouterr().out.split("\n\n")[1:])
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for gpus in (1, 8, 64, 512):
        cells = []
        for run in ("adapter", "full"):
            engines = ["one"] if gpus == 1 else ["DDP", "FSDP2"]
            keys = [f"{gpus} {run:7} {engine}" for engine in engines]
            key = next((key for key in keys if step[key][-1] != "memory"), keys[-1])
            *_, speed, limit = step[key]
            how = key.split()[-1].replace("one", "–")
            cells += [how, memory[key][-2], *step[key][:2], speed.replace("-", "–"), limit]
        assert f"| {model} | {gpus} | {' | '.join(cells)} |\n" in page


def test_a_step_s_time_by_hand() -> None:
    """One GPU: forward and the inputs' gradients of 1,024 tokens, at 4·10¹⁴ operations per second."""
    shape, tokens = SHAPES["llama-3.2-1b"], 1024
    products, attention = 2 * tokens * (shape.num_params - 128256 * 2048 - 33 * 2048), 2 * 16 * tokens * tokens * 2048
    head = 2 * tokens * 2048 * 128256
    cluster = Cluster(1, flops=1e15)
    step = scale("llama-3.2-1b", 1, layers=[7], adapter_dim=1).step("DDP", cluster)
    # 16 layers forward and the 8 above layer 7 back, with attention's two products twice
    expected = products + attention + products / 2 + attention + 2 * head
    assert step.compute == pytest.approx(expected / 4e14, rel=1e-4)
    assert step.tokens_per_second == pytest.approx(tokens / step.compute)
    assert step.exposed == 0
    cached = scale("llama-3.2-1b", 1, layers=[7], adapter_dim=1)._replace(cached=True).step("DDP", cluster)
    assert cached.compute == pytest.approx((expected - (products + attention) / 2) / 4e14, rel=1e-4)
    full = scale("llama-3.2-1b", 1, full=True).step("DDP", cluster)
    assert full.compute == pytest.approx((3 * products + 3 * attention + 3 * head) / 4e14, rel=1e-4)


def test_what_is_exposed() -> None:
    """Links that are infinitely fast expose nothing; those that are slow, all that is gathered."""
    step, slow = scale(), Cluster(64, network=1e6)
    for engine in ("DDP", "FSDP2", "ZeRO-3"):
        for run in (step, step._replace(full=True)):
            received = sum(run.exchanged(engine, 64))
            assert run.step(engine, Cluster(64, link=1e30, network=1e30)).exposed == pytest.approx(0, abs=1e-9)
            exposed = run.step(engine, slow).exposed
            assert exposed == pytest.approx(received / 1e6, rel=0.02)
            assert run.step(engine, slow).tokens_per_second < run.step(engine, Cluster(64)).tokens_per_second
    within, across = (scale().step("FSDP2", Cluster(8, per_node=n, network=1e9)).exposed for n in (8, 4))
    assert across > 100 * within


def test_small_first_dimensions_are_padded() -> None:
    """512 GPUs cut 64 rows into 512: FSDP2 reduces more than eight times W_down, ZeRO-3 no padding to speak of."""
    at_64, at_512 = (scale().exchanged("FSDP2", n).reduced for n in (64, 512))
    down = 80 * 64 * 8192
    assert at_64 == 4 * ADAPTERS * 63 // 64
    assert at_512 == pytest.approx(4 * (ADAPTERS + 7 * down) * 511 / 512, rel=1e-3)
    assert scale().exchanged("ZeRO-3", 512).reduced == pytest.approx(2 * ADAPTERS * 511 / 512, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 64 --max-params 8e6", "--gpus: has no effect without --memory"),
        ("--link 1GB/s --memory 80GB", "--link: has no effect without --gpus"),
        ("--gpus 12 --memory 80GB", "--gpus: expected a multiple of --gpus-per-node 8, got 12"),
        ("--gpus 0 --memory 80GB", "--gpus: expected an integer from 1 to 1048576, got 0"),
        ("--gpus 8 --memory 80GB --link 0GB/s", "--link: expected a rate > 0, got 0"),
        ("--gpus 8 --memory 80GB --link 400GB", "--link: expected bytes per second such as 400GB/s, got '400GB'"),
        ("--gpus 8 --memory 80GB --utilization 40", "--utilization: expected a number in (0, 1], got 40.0"),
        ("--gpus 8 --memory 80GB --flops 0", "--flops: expected a number in (0, inf), got 0.0"),
        ("--gpus 8 --memory 80GB --gpus-per-node 0", "--gpus-per-node: expected an integer >= 1, got 0"),
        ("--gpus 8 --memory 80GB --dtype fp16", "--dtype: expected bf16 or fp32 with --gpus, got fp16, which neither"),
        ("--gpus x --memory 80GB", "--gpus: expected an integer, got 'x'"),
        ("--gpus 8 --memory 80GB --load-in 4bit", "unknown --load-in"),
    ],
)
def test_what_is_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["budget", "--model-config", "llama-7b", *arguments.split()]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("more", ["--kind prompt", "--bias-scale --position attention", "--layers 3 --depth 2"])
def test_all_kinds_of_adapter(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(f"budget --model-config smollm2-135m --gpus 2 --memory 1GB --batch-size 1 {more}".split()) == 0
    printed = capsys.readouterr().out
    trained = int(re.search(r"([\d,]+) in adapters", printed)[1].replace(",", ""))
    assert re.search(rf"2 adapter DDP +0.000 +{4 * trained / 1e9:.3f}", printed)
