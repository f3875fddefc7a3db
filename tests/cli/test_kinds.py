"""Adapters of another kind than bottlenecks, by the commands."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adapterkern import cli
from adapterkern.recipes.ablation.kinds import KINDS
from adapterkern.recipes.ablation.runs import read_results
from tests.support.commands import accuracy


def test_trains_evaluates_and_compares_gated_prompts(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--model", str(model_folder), "--train", str(files[0]), "--eval", str(files[1])]
    training = ["--kind", "prompt", "--prompt-length", "4", "--layers=-2,-1", "--max-length", "16", "--lr", "0.05"]
    assert cli.main(["train", *data, *training, "--output", str(tmp_path / "run"), "--no-plot"]) == 0
    trained = capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "adapterkern.json").read_text())["adapter"]
    assert (saved["kind"], saved["prompt_length"], saved["layers"]) == ("prompt", 4, [2, 3])
    assert "# Gated prompts for" in (tmp_path / "run" / "README.md").read_text()
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    assert accuracy(capsys.readouterr().out) == accuracy(trained)

    study = ["--vary", "kind=bottleneck,prompt", "--set", "adapter_dim=8", "--set", "max_steps=2", "--seeds", "1"]
    assert cli.main(["ablate", *data, *study, "--no-head-alone", "--output", str(tmp_path / "study")]) == 0
    header, *rows = [line.split(",") for line in (tmp_path / "study" / "ablation.csv").read_text().splitlines()]
    shown = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(r["kind"], r["adapter_dim"], r["prompt_length"]) for r in shown] == [
        ("bottleneck", "8", ""),
        ("prompt", "", "10"),
    ]
    # What a study of an earlier version has, is not computed again.
    new = [header.index(name) for name in ("kind", "prompt_length")]
    old = [[cell for place, cell in enumerate(row) if place not in new] for row in (header, *rows)]
    (tmp_path / "study" / "ablation.csv").write_text("".join(f"{','.join(row)}\n" for row in old))
    capsys.readouterr()
    assert cli.main(["ablate", *data, *study, "--no-head-alone", "--output", str(tmp_path / "study")]) == 0
    assert "2 runs, 2 of them already in" in capsys.readouterr().err


def test_compares_all_kinds_at_one_budget(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--model", str(model_folder), "--train", str(files[0]), "--eval", str(files[1])]
    study = ["--vary", f"kind={','.join(KINDS)}", "--set", "max_params=3000", "--set", "max_steps=1", "--seeds", "1"]
    command = ["ablate", *data, *study, "--no-head-alone", "--output", str(tmp_path)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert all(f"kind {name} " in printed for name in list(KINDS)[1:])
    path = tmp_path / "ablation.csv"
    fields = ("kind", "position", "scale", "layer_norm", "learned_scale", "prompt_gate")
    rows = list(read_results(path).values())
    assert len({tuple(row[name] for name in fields) for row in rows}) == len(rows) == len(KINDS)
    sizes = [int(row["trainable_parameters"]) for row in rows]
    assert max(sizes) - min(sizes) < 2 * (2 * 32 + 1)  # less than one dimension at each of 2 sites


def test_trains_llama_adapter_v2(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And resumes it, evaluates it and goes on from it; a server, whose batches mix adapters, takes none."""
    run, texts = tmp_path / "run", tmp_path / "texts.jsonl"
    texts.write_text('{"text": "apple and the cherry"}\n{"text": "iron and the silver"}\n' * 4)
    train = ["train", "--train", str(texts), "--task", "causal-lm", "--max-length", "16", "--no-plot"]
    train += ["--max-steps", "2", "--checkpoint-every", "1", "--model", str(model_folder)]
    v2 = "--kind prompt --prompt-length 4 --prompt-gate head --bias-scale --layers=-2,-1 --modules-to-save norm"
    assert cli.main([*train, *v2.split(), "--output", str(run)]) == 0
    tensors = load_file(run / "adapterkern.safetensors")
    assert tensors["3.gate"].shape == (4,)
    assert tensors["bias_scale.2.mlp.up_proj.scale"].ne(1).any()
    assert len(tensors) == 2 * (2 + 7 * 2) + 1
    capsys.readouterr()
    assert cli.main([*train, "--output", str(run), "--resume", "--no-bias-scale"]) == 1
    assert "the run was begun with --bias-scale, not --no-bias-scale" in capsys.readouterr().err
    assert cli.main([*train, "--output", str(run), "--resume", "--max-steps", "3"]) == 0
    assert cli.main(["eval", str(run), "--data", str(texts)]) == 0
    assert cli.main(["generate", str(run), "apple and", "--max-new-tokens", "3"]) == 0
    assert cli.main([*train, "--from", str(run), "--output", str(tmp_path / "on")]) == 0
    capsys.readouterr()
    saved = json.loads((run / "adapterkern.json").read_text())
    saved["adapter"]["modules_to_save"] = None
    (run / "adapterkern.json").write_text(json.dumps(saved))
    assert cli.main(["serve", str(run)]) == 1
    assert "run: expected an adapter without bias and scale of the backbone's linear layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--adapter-dim 64", "--adapter-dim: has no effect with --kind prompt: expected no --adapter-dim, got 64"),
        ("--unfused", "--unfused: has no effect with --kind prompt, which runs inside the layers"),
        ("--compile", "--compile: has no effect with --kind prompt, which runs inside the layers"),
        ("--max-params 9000 --prompt-length 2", "--max-params: expected --max-params or --prompt-length, not both"),
        ("--kind bottleneck --prompt-length 2", "--prompt-length: has no effect with --kind bottleneck"),
        ("--prompt-length 1025", "--prompt-length: expected an integer from 1 to 1024, got 1025"),
        ("--kind bottleneck --prompt-gate head", "--prompt-gate: has no effect with --kind bottleneck"),
        ("--w-bias", "unknown --w-bias (did you mean --bias-scale?)"),
        ("--kind bottleneck --bias-scale --compile", "--compile: has no effect with --bias-scale, which runs inside"),
        ("--kind bottleneck --bias-scale --text-only", "--bias-scale: expected --no-bias-scale with --text-only"),
        ("--adapter-len 3", "unknown --adapter-len (did you mean --prompt-length?)"),
    ],
)
def test_options_of_another_kind_are_refused(typed: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the backbone is looked for."""
    data = ["--model", "nowhere", "--train", "no.csv", "--output", "none"]
    assert cli.main(["train", *data, "--kind", "prompt", *typed.split()]) != 0
    assert message in capsys.readouterr().err


def test_a_router_takes_no_prompts(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--model", str(model_folder), "--train", str(files[0]), "--output", str(tmp_path / "run")]
    assert cli.main(["route", "train", *data, "--kind", "prompt"]) != 0
    assert (
        "--kind: expected 'bottleneck' for adapters that a router chooses among, got 'prompt'"
        in capsys.readouterr().err
    )


def test_budget_lists_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["budget", "--model-config", "llama-7b", "--max-params", "8e6", "--kind", "prompt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["every", "prompts", "prompt_length", "parameters", "of", "budget"]
    assert lines[2].split() == ["1", "32", "61", f"{32 * (61 * 4096 + 1):,}", "99.9%"]
    v2 = ["--kind", "prompt", "--prompt-gate", "head", "--bias-scale"]
    assert cli.main(["budget", "--model-config", "llama-7b", "--max-params", "8e6", *v2]) == 0
    beside = 2 * (5 * 4096 + 2 * 11008)  # bias and scale of seven linear layers
    assert f"{32 * (40 * 4096 + 32 + beside):,}" in capsys.readouterr().out.splitlines()[2].split()
