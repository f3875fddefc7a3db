"""``adapterkern train --stack-on``: a new adapter on top of saved ones; and what is saved so, wherever it is loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import adapterkern as ak
from adapterkern import cli
from adapterkern.inference.server.models import find_models, load_models
from tests.support.commands import accuracy
from tests.support.tiny_llama import adapted
from tests.support.tiny_served import alone, prompt, save_runs

pytestmark = pytest.mark.slow

SHORT = ["--no-progress", "--no-plot", "--lr", "0.02", "--batch-size", "8", "--dtype", "fp32"]


def options(model: Path, files: tuple[Path, Path], output: Path, *more: object) -> list[str]:
    command = ["train", "--model", model, "--train", files[0], "--eval", files[1], "--output", output]
    of_new = [] if {"--from", "--no-train-adapters"} & set(more) else ["--adapter-dim", 4]  # which are refused there
    return list(map(str, [*command, *SHORT, *of_new, *more]))


def test_the_real_command(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options(model_folder, files, tmp_path / "domain", "--layers=1,3", "--max-steps", 4)) == 0
    first = load_file(tmp_path / "domain" / "adapterkern.safetensors")
    on = ["--stack-on", tmp_path / "domain", "--layers=-1", "--epochs", 4, "--checkpoint-every", 16]
    command = [sys.executable, "-m", "adapterkern", *options(model_folder, files, tmp_path / "task", *on)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\non top of domain, frozen\n" in f"\n{done.stdout}"
    (lower,) = (tmp_path / "task" / "below").iterdir()
    got = load_file(lower / "adapterkern.safetensors")
    assert all(torch.equal(got[key], tensor) for key, tensor in first.items())

    trained = accuracy(done.stdout)
    assert trained > 0.9  # by chance 0.5
    for saved in (tmp_path / "task", tmp_path / "task" / "checkpoints" / "step-00000032"):
        capsys.readouterr()
        assert cli.main(["eval", str(saved)]) == 0
        assert accuracy(capsys.readouterr().out) == pytest.approx(trained, abs=5e-5)

    shutil.rmtree(tmp_path / "task" / "checkpoints" / "step-00000032")
    before = load_file(tmp_path / "task" / "adapterkern.safetensors")
    assert cli.main(["train", "--output", str(tmp_path / "task"), "--resume", "--checkpoint-every", "16"]) == 0
    after = load_file(tmp_path / "task" / "adapterkern.safetensors")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())

    capsys.readouterr()
    more = ["--from", tmp_path / "task", "--max-steps", 1, "--train-stack"]
    assert cli.main(options(model_folder, files, tmp_path / "more", *more)) == 0
    said = capsys.readouterr().out
    assert "on top of domain, trained too" in said
    sites = json.loads((tmp_path / "more" / "adapterkern.json").read_text())["adapter"]["layers"]
    assert sites == [3]
    one = 2 * 4 * 32 + 4 + 3 * 32
    assert f"trainable params: {3 * one:,} || " in said
    (lower,) = (tmp_path / "more" / "below").iterdir()
    got = load_file(lower / "adapterkern.safetensors")
    assert not any(torch.equal(got[key], tensor) for key, tensor in first.items())

    missing = tmp_path / "missing"
    shutil.copytree(tmp_path / "task", missing)
    shutil.rmtree(missing / "below")
    assert cli.main(["eval", str(missing)]) == 1
    assert "expected 'domain', which the adapter was saved on, got no " in capsys.readouterr().err


def test_refused_before_the_backbone(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/run", "b/run", "default", "dotted.run"):
        adapted().save_pretrained(tmp_path / name)
    run = tmp_path / "a" / "run"
    for more, message in (
        (["--stack-on", tmp_path / "none"], "none: no such folder"),
        (["--stack-on", run, "--stack-on", tmp_path / "b" / "run"], "--stack-on: expected folders of different names"),
        (["--stack-on", tmp_path / "default"], "--stack-on: expected folders of different names, other than default"),
        (["--stack-on", tmp_path / "dotted.run"], "--stack-on: expected a non-empty name without dots"),
        (["--stack-on", run, "--from", run], "--stack-on: expected a new adapter to run on"),
        (["--stack-on", run, "--no-train-adapters"], "--stack-on: expected an adapter to train on"),
        (["--stack-on", run, "--output", run], "--output: expected another folder than that of --stack-on"),
    ):
        assert cli.main(options(tmp_path / "no-model", files, tmp_path / "out", *more)) == 1
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_stack_among_the_models_of_a_server(tmp_path: Path) -> None:
    """One batch of a stack, the adapter below it alone, and the backbone: each answers as it does by itself."""
    run, top = save_runs(tmp_path, 2)
    model = ak.LlamaAdapter.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), top)
    model.load_adapter(run, "run0")
    model.set_adapter(["run0", "default"])
    model.save_pretrained(tmp_path / "stack")
    served = load_models(find_models([str(run), str(tmp_path / "stack")]), model=str(tmp_path / "llama"), dtype="fp32")
    names = [served.adapters["run0"], served.adapters["stack"], "__base__"]
    ids = served.tokenizer([prompt(5)] * 3, return_tensors="pt")
    with torch.no_grad():
        made = served.model.generate(**ids, adapter_names=names, max_new_tokens=8, do_sample=False)
    got = made[:, ids["input_ids"].shape[1] :].tolist()
    assert got == [alone(tmp_path, folder, prompt(5), 8) for folder in (run, tmp_path / "stack", None)]
    assert got[0] != got[1]
