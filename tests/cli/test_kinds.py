"""Adapters of another kind than bottlenecks, by the commands."""

import json
from pathlib import Path

import pytest

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
    study = ["--vary", f"kind={','.join(KINDS)}", "--set", "max_params=1500", "--set", "max_steps=1", "--seeds", "1"]
    command = ["ablate", *data, *study, "--no-head-alone", "--output", str(tmp_path)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert all(f"kind {name} " in printed for name in list(KINDS)[1:])
    path = tmp_path / "ablation.csv"
    fields = ("kind", "position", "scale", "layer_norm", "learned_scale")
    rows = list(read_results(path).values())
    assert len({tuple(row[name] for name in fields) for row in rows}) == len(rows) == len(KINDS)
    sizes = [int(row["trainable_parameters"]) for row in rows]
    assert max(sizes) - min(sizes) < 2 * (2 * 32 + 1)  # less than one dimension at each of 2 sites


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--adapter-dim 64", "--adapter-dim: has no effect with --kind prompt: expected no --adapter-dim, got 64"),
        ("--unfused", "--unfused: has no effect with --kind prompt, which runs inside the layers"),
        ("--compile", "--compile: has no effect with --kind prompt, which runs inside the layers"),
        ("--max-params 9000 --prompt-length 2", "--max-params: expected --max-params or --prompt-length, not both"),
        ("--kind bottleneck --prompt-length 2", "--prompt-length: has no effect with --kind bottleneck"),
        ("--prompt-length 1025", "--prompt-length: expected an integer from 1 to 1024, got 1025"),
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
