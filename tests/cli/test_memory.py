"""Options about memory: quantized weights, attention, recomputed activations, and what ``budget --memory`` says."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkern as ak
from adapterkern import cli
from adapterkern.cli.budget import SHAPES, size
from adapterkern.inference.runs import find_run
from adapterkern.model import attention, quantized

BUDGET = "budget --model-config llama-2-7b --memory 24GB --task causal-lm --batch-size 4 --max-length 1024"


def train(model: Path, files: tuple[Path, Path], output: Path, more: str) -> list[str]:
    command = f"train --model {model} --train {files[0]} --eval {files[1]} --output {output} --adapter-dim 4 --every 2"
    return f"{command} --max-steps 4 --batch-size 8 --max-length 16 --no-progress --no-plot {more}".split()


def metric(text: str, name: str) -> float:
    return float(re.search(rf"^{name} +([\d.]+)$", text, re.MULTILINE)[1])


def test_a_quantized_run_is_evaluated_loaded_and_resumed_on_quantized_weights(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = tmp_path / "run"
    more = "--load-in 4bit --checkpoint-activations --attn eager --checkpoint-every 2"
    assert cli.main(train(model_folder, files, run, more)) == 0
    loss = metric(capsys.readouterr().out, "loss")
    saved = json.loads((run / "sources.json").read_text())
    assert saved["load_in"] == "4bit"
    assert saved["options"]["attn"] == "eager"
    for how, same in (([], True), (["--load-in", "none"], False)):
        assert cli.main(["eval", str(run), *how]) == 0
        assert (metric(capsys.readouterr().out, "loss") == pytest.approx(loss, abs=2e-4)) == same
    model, _ = ak.load(run)
    assert {p.dtype for p in model.task.model.layers.parameters()} == {torch.float32, torch.uint8}
    whole = find_run(run).open(load_in="none").task.model
    assert {p.dtype for p in whole.layers.parameters()} == {torch.float32}
    for path in (run / "checkpoints").glob("step-*4"):
        path.rename(tmp_path / "last")
    assert cli.main(["train", "--resume", "--output", str(run)]) == 0  # with the options that the run has
    assert metric(capsys.readouterr().out, "loss") == pytest.approx(loss, abs=1e-4)
    del saved["load_in"]  # as 0.1.0 has written it
    (run / "sources.json").write_text(json.dumps(saved))
    assert find_run(run).sources.load_in is None


def test_a_checkpoint_that_is_quantized_already(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from adapterkern.model.backbone import load_backbone

    llama, tokenizer = load_backbone(model_folder, load_in="4bit", attn="eager")
    assert llama.config._attn_implementation == "eager"
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^load_in: expected none for .*, whose weights are quantized already"):
        load_backbone(tmp_path, load_in="8bit")
    again, _ = load_backbone(tmp_path, attn="eager")
    ids = torch.arange(1, 9)[None]
    # With gradients: without, bitsandbytes packs the weights anew where it finds AVX512-BF16, from 64 columns on.
    assert torch.equal(again(ids).logits, llama(ids).logits)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--load-in 4bit --shard", "--load-in: expected none with --shard, which cuts plain tensors alone, got 4bit"),
        ("--offload-activations", "--offload-activations: expected a backbone on a GPU, got one on the CPU, in whose"),
        (
            "--attn flash_attention_2",
            "--attn: expected one of sdpa, eager on a CPU, got flash_attention_2, which needs",
        ),
        ("--attn flex_attention", "--attn: expected one of sdpa, eager on a CPU, got flex_attention, which needs"),
        (
            "--model {tmp}/m.gguf --load-in 8bit",
            "--load-in: expected none for {tmp}/m.gguf, whose weights are packed",
        ),
        (
            "--load-in 4bit --modules-to-save gate_proj",
            "--modules-to-save: expected a module that is not quantized",
        ),
    ],
)
def test_what_is_refused(
    more: str,
    message: str,
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    (tmp_path / "m.gguf").touch()
    if "modules" not in more:  # all others before anything is loaded
        monkeypatch.setattr("adapterkern.model.backbone.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    output = tmp_path / "run"
    assert cli.main(train(model_folder, files, output, more.format(tmp=tmp_path))) == 1
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    assert not (output / "task.json").exists()


def test_a_machine_without_the_package_or_a_device_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = torch.device("cuda", 0)
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ValueError, match=r"^load_in: expected a device of bitsandbytes \(cuda\), got cpu$"):
        quantized.check_load_in("4bit", tmp_path, torch.device("cpu"))
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    with pytest.raises(
        ValueError, match=r"^attn: expected sdpa, eager or flex_attention in fp32, got flash_attention_2"
    ):
        attention.check_attn("flash_attention_2", gpu, ("fp32", "fp32"))
    attention.check_attn("flash_attention_2", gpu, ("fp32", "bf16"))
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ImportError, match=r"^attn: expected flash-attn for flash_attention_2"):
        attention.check_attn("flash_attention_2", gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^load_in: expected bitsandbytes, which is not installed: pip install"):
        quantized.check_load_in("8bit", tmp_path, gpu)


def test_the_budget_of_a_7b_model_in_24_gb() -> None:
    done = subprocess.run([sys.executable, "-m", "adapterkern", *BUDGET.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(as it is|8bit|4bit|checkpoint|.*offload) {2,}(\d.*)$", done.stdout, re.MULTILINE))
    assert max(map(len, done.stdout.splitlines())) <= 80
    # By hand: 6,738,415,616 weights of 2 bytes, 32 adapters of 64·(2·4096 + 1) + 3·4096 parameters with 16 bytes
    assert rows["as it is"].split()[:2] == ["13.48", "0.27"]
    assert rows["as it is"].endswith("  no    2")
    # 32 inputs of 4·1024 × 4096 in bf16, the final norm's in fp32, 4096 × 32,000 logarithms in fp32
    assert rows["checkpoint"].split()[2] == f"{(32 * 2**25 + 2**26 + 4 * 4096 + 2**14 * 32_000) / 1e9:.2f}"
    assert "\nfits with --checkpoint-activations: 16.47 GB of 24.00\n" in done.stdout
    assert done.stdout.endswith("or, with the same steps, --batch-size 2 --accumulation 2\n")


def test_a_budget_of_memory_says_what_is_missing_or_without_effect(
    model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    def said(arguments: str, status: int) -> str:
        assert cli.main(["budget", "--model-config", *arguments.split()]) == status
        return "".join(capsys.readouterr())

    assert "fits as it is: 0.0" in said(f"{model_folder} --memory 1GiB", 0)
    assert "--memory: expected at least 4." in said("llama-7b --memory 1GB --batch-size 1", 1)
    assert "expected a size such as 24GB or 80GiB, got '24'" in said("llama-7b --memory 24", 2)
    assert "--batch-size: has no effect without --memory" in said("llama-7b --max-params 8e6 --batch-size 2", 1)
    assert "--max-params, --memory: expected at least one of them, got none" in said("llama-7b", 1)
    assert "--layers: expected numbers from -32 to 31, got 99" in said("llama-7b --memory 24GB --layers 99", 1)
    assert said("llama-7b --memory 80GB --max-params 8e6", 0).count("llama-7b: ") == 2
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    assert "--memory: expected a decoder without experts, got num_local_experts=8" in said(
        f"{tmp_path} --memory 1GB", 1
    )
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = "expected integers intermediate_size, num_attention_heads and vocab_size: 'vocab_size'"
    assert expected in said(f"{tmp_path} --memory 1GB", 1)
    assert (size("24GB"), size("1.5 GiB"), size("80g" + "b")) == (24 * 10**9, 3 << 29, 80 * 10**9)


def test_known_shapes_have_the_size_that_they_are_named_after() -> None:
    billions = {name: shape.num_params / 1e9 for name, shape in SHAPES.items()}
    published = {
        "llama-7b": 6.738,
        "llama-13b": 13.016,
        "llama-33b": 32.529,
        "llama-65b": 65.286,
        "llama-2-70b": 68.977,
    }
    published |= {
        "llama-3-8b": 8.030,
        "llama-3-70b": 70.554,
        "llama-3.1-405b": 405.853,
        "llama-3.2-1b": 1.236,
        "llama-3.2-3b": 3.213,
    }
    published |= {"mistral-7b": 7.242, "smollm2-135m": 0.1345, "smollm2-1.7b": 1.711}
    for name, count in published.items():
        assert billions[name] == pytest.approx(count, abs=1e-3), name
