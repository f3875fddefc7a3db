"""What ``budget --gpus`` says of a step on several GPUs, against numbers by hand; test_distributed.py measures."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import adapterkern as ak
from adapterkern import cli
from adapterkern.cli.budget import SHAPES
from adapterkern.model.memory import Training
from adapterkern.model.scale import Scale
from adapterkern.model.speed import Cluster, step

OPTIONS = "--memory 80GB --task causal-lm --batch-size 4 --max-length 1024"
BUDGET = f"budget --model-config llama-2-70b --gpus 1,64 {OPTIONS}"
PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
N, ADAPTERS = 68_976_648_192, 80 * (64 * (2 * 8192 + 1) + 3 * 8192)
WHOLE = 2 * 32_000 * 8192 + 8192  # embeddings, LM head and final norm
LAYER = (N - WHOLE) // 80
# llama-7b, 16 rows of 256 tokens, checkpointed: weights; trained; layers' inputs, the final norm's; in a layer
SMALL = 6_738_415_616 * 2 + 16 * 32 * (64 * 8193 + 3 * 4096) + 4096 * (32 * 8192 + 4 * 4096 + 4)
LEAST = f"{(SMALL + 4096 * (8 * 4096 + 8 + 8 * 4096 + 4 * 32 + 256 * 2 + 12 * 11008 + 4 * 4096)) / 1e9:.2f}"


def scale(
    name: str = "llama-2-70b", rows: int = 4, full: bool = False, checkpointed: bool = False, **adapter: Any
) -> Scale:
    shape = SHAPES[name]
    config = ak.AdapterConfig(**adapter).resolve(shape.hidden_size, shape.num_layers, shape.inside)
    return Scale(Training(shape, config, 1024, 1024), rows, full, checkpointed)


def printed(table: str) -> dict[str, list[str]]:
    """The cells of each line, by GPUs, run and engine."""
    return {key: cells.split() for key, cells in re.findall(r"^ *(\d+ \w+ +[\w-]+) +(.*)$", table, re.M)}


def tables(arguments: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, list[str]]]:
    """Those of memory and of steps that the command prints."""
    assert cli.main(["budget", *arguments.split()]) == 0
    return [printed(part) for part in capsys.readouterr().out.split("\n\n")[1:]]


def fastest(memory: dict[str, list[str]], steps: dict[str, list[str]], gpus: int, run: str) -> str:
    """The key of the engine that fits with the most tokens per second; if none does, of that of the least memory."""
    keys = [key for key in memory if key.split()[:2] == [str(gpus), run]]
    if fitting := [key for key in keys if steps[key][-1] != "memory"]:
        return max(fitting, key=lambda key: int(steps[key][-2].replace(",", "")))
    return min(keys, key=lambda key: float(memory[key][-2].rstrip("c")))


def test_a_70b_on_64_gpus() -> None:
    done = subprocess.run([sys.executable, "-m", "adapterkern", *BUDGET.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"llama-2-70b: {N:,} parameters in bf16, {ADAPTERS:,} in adapters"
    memory, steps = (printed(part) for part in done.stdout.split("\n\n")[1:])
    # weights, trained, buffers: what DDP repeats, and FSDP2 cuts into 64 pieces
    assert memory["1 adapter one"][:3] == ["137.95", f"{16 * ADAPTERS / 1e9:.2f}", "0.00"]
    assert memory["64 adapter DDP"][:3] == ["137.95", "1.37", f"{4 * ADAPTERS / 1e9:.2f}"]
    held = 2 * WHOLE + 4 * ADAPTERS + 4 * LAYER + 4 * ADAPTERS  # root, two layers, gradients
    assert memory["64 adapter FSDP2"][:3] == [f"{2 * N / 64e9:.2f}", "0.02", f"{held / 1e9:.2f}"]
    assert memory["64 adapter ZeRO-3"][2] == "3.00"  # 10⁹ parameters, and a bucket of 5·10⁸ gradients
    assert memory["64 full    DDP"][1] == f"{16 * N / 1e9:.2f}"
    # 64/63 of all that is received: each layer twice, the root once; the adapters' gradients in fp32
    gathered, reduced, *_, limit = steps["64 adapter FSDP2"]
    assert float(gathered) == pytest.approx((160 * 2 * LAYER + 2 * WHOLE + 4 * ADAPTERS) * 63 / 64e9, abs=1e-3)
    assert float(reduced) == pytest.approx(4 * ADAPTERS * 63 / 64e9, abs=1e-3)
    assert limit == "compute"
    # checkpointed, ZeRO-3 gathers 79 layers once more; twice embeddings, LM head and norm but once the embeddings
    thrice = (3 * 80 - 1) * 2 * LAYER + 2 * (WHOLE + 32_000 * 8192)
    assert float(steps["64 adapter ZeRO-3"][0]) == pytest.approx(thrice * 63 / 64e9, rel=2e-3)
    assert steps["64 adapter DDP"] == ["0.000", f"{8 * ADAPTERS * 63 / 64e9:.3f}", "-", "-", "-", "memory"]


@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b"])
def test_the_table_of_the_docs(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    memory, steps = tables(f"--model-config {model} --gpus 1,8,64,512 {OPTIONS}", capsys)
    for gpus in (1, 8, 64, 512):
        cells = []
        for run in ("adapter", "full"):
            key = fastest(memory, steps, gpus, run)
            *_, speed, limit = steps[key]
            how = key.split()[-1].replace("one", "–")
            cells += [how, memory[key][-2], *steps[key][:2], speed.replace("-", "–"), limit]
        assert f"| {model} | {gpus} | {' | '.join(cells)} |\n" in PAGE


def test_the_other_numbers_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    """The first block as it is printed, the table of a slow network, and the prefix cache's tokens per second."""
    command, output = re.findall(r"^```(?:sh)?\n(.*?)^```$", PAGE, re.S | re.M)[:2]
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == output
    for model in ("llama-3.2-1b", "llama-3-8b", "llama-3-70b"):
        memory, steps = tables(f"--model-config {model} --gpus 64 {OPTIONS} --network 25GB/s", capsys)
        keys = [fastest(memory, steps, 64, run) for run in ("adapter", "full")]
        cells = [f"{key.split()[-1]} | {' | '.join(steps[key][-2:])}" for key in keys]
        assert f"| {model} | {' | '.join(cells)} |\n" in PAGE
    _, steps = tables(f"--model-config llama-3-8b --gpus 64 {OPTIONS} --layers 24,25,26,27,28,29,30,31", capsys)
    plain, cached = (steps[f"64 adapter {name}"][-2] for name in ("DDP", "cache"))
    assert f"{plain} tokens/s, cached {cached}," in " ".join(PAGE.split())


def test_a_step_s_time_by_hand() -> None:
    """One GPU: forward and the inputs' gradients of 1,024 tokens, at 4·10¹⁴ operations per second."""
    shape, tokens = SHAPES["llama-3.2-1b"], 1024
    products, attention = 2 * tokens * (shape.num_params - 128256 * 2048 - 33 * 2048), 2 * 16 * tokens * tokens * 2048
    head = 2 * tokens * 2048 * 128256
    cluster = Cluster(1, flops=1e15)
    took = step(scale("llama-3.2-1b", 1, layers=[7], adapter_dim=1), "DDP", cluster)
    # 16 layers forward and the 8 above layer 7 back, with attention's two products twice
    expected = products + attention + products / 2 + attention + 2 * head
    assert took.compute == pytest.approx(expected / 4e14, rel=1e-4)
    assert took.tokens_per_second == pytest.approx(tokens / took.compute)
    assert took.exposed == 0
    cached = step(scale("llama-3.2-1b", 1, layers=[7], adapter_dim=1)._replace(cached=True), "DDP", cluster)
    assert cached.compute == pytest.approx((expected - (products + attention) / 2) / 4e14, rel=1e-4)
    # Checkpointed, 9 layers run again: those above layer 7, and layer 7
    again = step(scale("llama-3.2-1b", 1, checkpointed=True, layers=[7], adapter_dim=1), "DDP", cluster).compute
    assert again - took.compute == pytest.approx(9 / 16 * (products + attention) / 4e14, rel=1e-4)
    full = step(scale("llama-3.2-1b", 1, full=True), "DDP", cluster)
    assert full.compute == pytest.approx((3 * products + 3 * attention + 3 * head) / 4e14, rel=1e-4)


def test_what_is_exposed() -> None:
    """Links that are infinitely fast expose nothing; those that are slow, all that is gathered."""
    slow = Cluster(64, network=1e6)
    for engine in ("DDP", "FSDP2", "ZeRO-3"):
        for run in (scale(), scale(full=True), scale(checkpointed=True), scale(full=True, checkpointed=True)):
            received = sum(run.exchanged(engine, 64))
            assert step(run, engine, Cluster(64, link=1e30, network=1e30)).exposed == pytest.approx(0, abs=1e-9)
            exposed = step(run, engine, slow).exposed
            assert exposed == pytest.approx(received / 1e6, rel=0.02)
            assert step(run, engine, slow).tokens_per_second < step(run, engine, Cluster(64)).tokens_per_second
    within, across = (step(scale(), "FSDP2", Cluster(8, per_node=n, network=1e9)).exposed for n in (8, 4))
    assert across > 100 * within
    # DDP's last bucket: 25 MiB; of all parameters the embeddings, whole and in fp32, since their gradient comes last
    for full, last in ((False, 25 << 20), (True, 4 * 128256 * 2048)):
        exposed = step(scale("llama-3.2-1b", 16, full), "DDP", Cluster(64)).exposed
        sent = min(last, 4 * scale("llama-3.2-1b").trained_params) if not full else last
        assert exposed == pytest.approx(2 * sent * 63 / 64 / 400e9)
    assert Cluster(8, per_node=1, link=1e9, network=4e9).bandwidth == 4e9  # no link is used
    assert Cluster(8, per_node=2, link=1e9, network=4e9).bandwidth == 1e9


def test_what_zero_3_keeps_gathered() -> None:
    """10⁹ parameters, or a model that has fewer, or the embeddings, whole; and 5·10⁸ gradients."""
    small = scale("smollm2-135m")
    kept = {"llama-3-8b": 10**9, "llama-3.1-405b": 128256 * 16384, "smollm2-135m": 134_515_008 + small.trained_params}
    for name, params in kept.items():
        assert scale(name).memory("ZeRO-3", 64).buffers == 2 * (params + 5 * 10**8)


def test_the_workspace_of_recomputed_layers() -> None:
    """A layer that is recomputed by full fine-tuning, or the logits' two gradients: never both."""
    d, f, heads, length = 16384, 53248, 128, 1024
    frozen = 8 * d + 8 + 4 * d * 2 + 4 * heads + length * 2 + 3 * f * 2  # as docs/memory.md counts it
    layer = frozen + (4 * d + f) * 2 + 3 * f * 2 + 4 * d
    for name, expected in (("llama-3.1-405b", 4096 * layer), ("llama-3-8b", 8 * 4096 * 128256)):
        for more in ({}, {"bias_scale": True}):
            run = scale(name, full=True, checkpointed=True, **more)
            assert run.memory("FSDP2", 64).workspace == expected
    assert 4096 * layer > 8 * 4096 * 128256


@pytest.mark.parametrize(
    ("adapter", "prefix"),
    [
        ({}, 17),
        ({"position": "parallel-mlp"}, 16),
        ({"position": "attention"}, 16),
        ({"bias_scale": True}, 16),
    ],
    ids=str,
)
def test_the_prefix_cache_ends_where_an_adapter_changes_something(adapter: dict[str, Any], prefix: int) -> None:
    """A layer's own output is cached if its adapter follows the layer, and not if it adds to it."""
    run = scale("llama-3-8b", layers=[16], **adapter)
    assert run.cached_layers == prefix
    one = Cluster(1)
    saved = step(run, "DDP", one).compute - step(run._replace(cached=True), "DDP", one).compute
    layer = 2 * 4096 * (4096 * 4096 * 2 + 2 * 1024 * 4096 + 3 * 14336 * 4096) + 2 * 4096 * 1024 * 4096
    assert saved == pytest.approx(prefix * layer / (0.4 * 989e12))


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
        ("--gpus 8,64,8 --memory 80GB", "--gpus: expected each number once, got 8,64,8"),
        ("--gpus 8 --memory 0GB", "--memory: expected a size > 0, got 0"),
        (
            "--gpus 1 --memory 1GB",
            f"--memory: expected at least {LEAST} GB for --batch-size 16 with --gpus 1, got 1.00",
        ),
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


def test_what_transformers_makes_of_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Tied embeddings are a family's default; what a LLaMA does not have is named; quantized weights are refused."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500}
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64

    def said(**more: Any) -> tuple[int, str]:
        caplog.clear()
        (tmp_path / "config.json").write_text(json.dumps(sizes | more))
        status = cli.main(["budget", "--model-config", str(tmp_path), "--gpus", "2", "--memory", "1GB"])
        return status, "".join(capsys.readouterr()) + caplog.text

    for model_type, tables in (("gemma2", 1), ("llama", 2)):
        status, text = said(model_type=model_type)
        params = 2 * layer + 64 + tables * 500 * 64
        assert status == 0
        assert f": {params:,} parameters in bf16" in text
        # two norms more in each of its layers
        named = f"Gemma2ForCausalLM of {tmp_path / 'config.json'} has {params + 2 * 128:,} parameters"
        assert (named in text) == (model_type == "gemma2")
    status, text = said(attention_bias=True, mlp_bias=True)
    assert f"has {2 * layer + 64 + 2 * 500 * 64 + 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64):,} parameters" in text
    assert status == 0
    status, text = said(quantization_config={"quant_method": "gptq", "bits": 4})
    assert (status, "expected weights that are not quantized, got quantization_config in" in text) == (1, True)
    status, text = said(model_type="nosuch")
    assert (status, "--model-config: expected a causal language model, got" in text) == (1, True)


def test_the_peak_is_that_of_the_dtype_and_columns_are_under_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    command = "budget --model-config smollm2-135m --gpus 1,1048576 --memory 80GB --batch-size 1"
    for more, peak in (("", "989"), ("--dtype fp32", "67"), ("--dtype fp32 --flops 5e14", "500")):
        assert cli.main(f"{command} {more}".split()) == 0
        out = capsys.readouterr().out
        assert f"derived at {peak} TFLOP/s" in out
        for table in out.split("\n\n")[1:]:
            head, *lines = (line for line in table.splitlines() if re.match(r" *(GPUs|\d)", line))
            assert lines
            assert {re.search("adapter|full", line).start() for line in lines} == {head.index("run")}
            assert {re.search(r"one|DDP|cache|FSDP2|ZeRO-3", line).start() for line in lines} == {head.index("engine")}
