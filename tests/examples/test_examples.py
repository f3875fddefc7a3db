"""The programs in examples/, as a user runs them, on a tiny LLaMA in a folder; what they saved is then loaded here."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkern as ak
from adapterkern.model.backbone import load_backbone
from adapterkern.training import Task
from tests.support import tiny_run
from tests.support.tiny_llama import draw, tiny

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NUMBER = r"(\d+\.\d+)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough for an adapter to move the scores; the tokenizer gives what a LLaMA's does."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_run.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    tiny(initializer_range=0.2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four words, always in the same order."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("w1 w2 w3 w4 w1 w2 w3 w4 w1 w2 w3 w4 w1 w2 w3 w4\n" * 128)
    return path


def run(program: str, model: Path, *arguments: Any) -> str:
    """What ``examples/program`` prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, f"examples/{program}", "--model", str(model), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def found(pattern: str, text: str) -> list[float]:
    """The numbers in the one place where ``text`` has ``pattern``."""
    (match,) = re.finditer(pattern, text)
    return [float(number) for number in match.groups()]


def backbone(model: Path) -> tuple[Any, Any]:
    return load_backbone(model, device="cpu")


def text_loss(model: Any, tokenizer: Any, text: Path) -> float:
    """Nats per token on the first line of ``text``."""
    ids = tokenizer(text.read_text().splitlines()[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def completion(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_classify(model: Path, tmp_path: Path) -> None:
    """Better than chance, the same once loaded, and labels that the saved run gives here as well."""
    for name, count, seed in (("train.csv", 128, 0), ("test.csv", 64, 1)):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(tiny_run.rows(count, seed))
    texts = ["w0 w9 w0 w0 w5", "w1 w1 w1"]  # of different lengths: padded
    files = ["--train", tmp_path / "train.csv", "--eval", tmp_path / "test.csv", "--output", tmp_path / "run"]
    out = run("classify.py", model, *files, "--lr", "2e-2", "--texts", *texts)
    (trained,), (loaded,) = found(f"trained: accuracy {NUMBER}", out), found(f"loaded: accuracy {NUMBER}", out)
    assert trained > 0.85  # two labels: 0.5 by chance
    assert loaded == trained

    llama, tokenizer = backbone(model)
    task, _ = Task[Any].from_pretrained(llama, tmp_path / "run")
    printed = [line.split("\t") for line in out.splitlines()[-2:]]
    assert [(label, shown) for label, _, shown in printed] == [("no", texts[0]), ("yes", texts[1])]
    for label, probability, shown in printed:
        with torch.no_grad():
            (expected,) = task.predict(tokenizer(shown, return_tensors="pt"))
        assert label == expected.label
        assert float(probability) == pytest.approx(expected.probability, abs=1e-4)


def test_instruction_tune(model: Path, tmp_path: Path) -> None:
    """Two prompts and their answers; the saved adapter gives them here as well."""
    answers = {"w20 w30 w10": "w5 w6", "w21 w31 w11": "w7 w8 w9"}
    rows = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in answers.items())
    (tmp_path / "train.jsonl").write_text(96 * rows)
    (tmp_path / "test.jsonl").write_text(rows)
    files = ["--train", tmp_path / "train.jsonl", "--eval", tmp_path / "test.jsonl", "--output", tmp_path / "run"]
    out = run("instruction_tune.py", model, *files, "--lr", "1e-2", "--prompt", "w21 w31 w11")
    before, after = found(f"perplexity {NUMBER} -> {NUMBER}", out)
    assert after < 2 < 100 < before
    assert out.endswith("\nafter: w7 w8 w9\n")

    llama, tokenizer = backbone(model)
    assert f"\nbefore: {completion(llama, tokenizer, 'w21 w31 w11', 64)}\n" in out
    loaded = ak.LlamaAdapter.from_pretrained(llama, tmp_path / "run").eval()
    assert {prompt: completion(loaded, tokenizer, prompt, 64) for prompt in answers} == answers


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_own_loop(precision: str, model: Path, text: Path, tmp_path: Path) -> None:
    options = ["--precision", precision, "--length", "16", "--epochs", "3", "--lr", "2e-2", "--log-every", "12"]
    out = run("own_loop.py", model, "--train", text, "--output", tmp_path / "adapter", *options)
    logged = [(float(loss), float(norm)) for loss, norm in re.findall(f"loss {NUMBER}, grad norm {NUMBER}", out)]
    assert len(logged) == 4  # of 3 · 128 / 8 steps
    assert all(norm > 0 for _, norm in logged)

    llama, tokenizer = backbone(model)
    bare = text_loss(llama, tokenizer, text)
    loaded = text_loss(ak.LlamaAdapter.from_pretrained(llama, tmp_path / "adapter").eval(), tokenizer, text)
    assert loaded < bare / 4
    assert loaded == pytest.approx(logged[-1][0], rel=0.05)  # of the last step, whose learning rate is almost 0


@pytest.mark.parametrize("program", ["Trainer", "SFTTrainer"])
def test_trainer(program: str, model: Path, text: Path, tmp_path: Path) -> None:
    if program == "SFTTrainer" and None in map(importlib.util.find_spec, ("trl", "datasets")):
        pytest.skip("trl or datasets is not installed")
    options = ["--sft"] if program == "SFTTrainer" else []
    files = ["--train", text, "--output", tmp_path / "run"]
    out = run("trainer.py", model, *files, "--epochs", "3", "--lr", "2e-2", *options)
    (mean,) = found(f"mean loss {NUMBER}", out)
    assert not list((tmp_path / "run").glob("pytorch_model*"))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "run").iterdir()}
    assert sizes["model.safetensors"] < 1.2 * sizes["adapterkern.safetensors"]  # nothing of the backbone

    llama, tokenizer = backbone(model)
    bare = text_loss(llama, tokenizer, text)
    loaded = text_loss(ak.LlamaAdapter.from_pretrained(llama, tmp_path / "run").eval(), tokenizer, text)
    assert loaded < mean < bare
    assert loaded < bare / 4


def test_many_adapters(model: Path, tmp_path: Path) -> None:
    """Every row's answer is its adapter's alone, without padding; the blend is that of a mixture here."""
    llama, tokenizer = backbone(model)
    configs = {"one": ak.AdapterConfig(4, layers=[1, 3]), "two": ak.AdapterConfig(4, "attention", layers=[2])}
    for name, config in configs.items():
        saved = ak.LlamaAdapter(llama, config)
        draw(saved)
        saved.save_pretrained(tmp_path / name)
        llama = saved.unload()
    prompts = ["w5 w6 w7 w8", "w9"]
    folders = [tmp_path / "one", tmp_path / "two"]
    out = run("many_adapters.py", model, "--adapters", *folders, "--prompts", *prompts, "--tokens", "8")
    differences = re.findall(r"^(\w+): logits differ by at most (\S+)$", out, re.MULTILINE)
    assert [name for name, _ in differences] == ["one", "two"]
    assert all(float(difference) < 1e-4 for _, difference in differences)

    expected: dict[tuple[str, str], str] = {}
    for name in ("one", "two", "__base__"):
        alone = llama if name == "__base__" else ak.LlamaAdapter.from_pretrained(llama, tmp_path / name).eval()
        expected |= {(name, prompt): completion(alone, tokenizer, prompt, 8) for prompt in prompts}
        llama = alone if alone is llama else alone.unload()
    both = ak.LlamaAdapter.from_pretrained(llama, tmp_path / "one").eval()
    both.load_adapter(tmp_path / "two", "two")
    with both.mixing(["default", "two"], torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])):
        expected["blend", prompts[0]] = completion(both, tokenizer, prompts[0], 8)
    assert len({answer for (_, prompt), answer in expected.items() if prompt == prompts[0]}) == 4
    answers = re.findall(r"^(\w+): (.*) -> ?(.*)$", out, re.MULTILINE)
    assert {(name, prompt): answer for name, prompt, answer in answers} == expected
