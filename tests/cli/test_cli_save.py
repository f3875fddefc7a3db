"""The command line writes into no folder of others, and trains modules of the backbone by name."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adapterkern import cli
from adapterkern.model.files.folder import CONFIG_NAME, WEIGHTS_NAME
from tests.cli.test_cli import train_arguments


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_the_backbone_s_folder_is_no_output(
    model_folder: Path, files: tuple[Path, Path], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in model_folder.iterdir()}
    assert cli.main([*train_arguments(model_folder, files, model_folder), *more]) != 0
    assert (
        f"train: --output: expected a folder without a model, got {model_folder}, which holds one (config.json): "
        "saving there would damage it; name another folder\n"
    ) in capsys.readouterr().err
    assert {path: path.read_bytes() for path in model_folder.iterdir()} == before


def test_modules_to_save(
    model_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [*train_arguments(model_folder, files, tmp_path), "--epochs", "1"]
    assert cli.main([*arguments, "--modules-to-save", "embed_tokens,norm"]) == 0
    saved = {key for key in load_file(tmp_path / WEIGHTS_NAME) if key.startswith("modules_to_save")}
    assert saved == {"modules_to_save.model.embed_tokens.weight", "modules_to_save.model.norm.weight"}
    config = json.loads((tmp_path / CONFIG_NAME).read_text())["adapter"]
    assert sorted(config["modules_to_save"]) == ["model.embed_tokens", "model.norm"]
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert f"{files[1]}  32 texts; 224 tokens; a text has 7 (median), 7 (longest)\n" in said
    assert "  2 labels: 'fruit' 16, 'metal' 16\n" in said
    assert cli.main([*arguments, "--resume"]) == 0  # with the modules that it was begun with
    assert {key for key in load_file(tmp_path / WEIGHTS_NAME) if key.startswith("modules_to_save")} == saved
    capsys.readouterr()
    assert cli.main([*arguments, "--modules-to-save", "norm", "--resume"]) == 1
    problem = "begun with --modules-to-save model.embed_tokens,model.norm, not model.norm: resume with the same value"
    assert problem in capsys.readouterr().err
    modules = ["--modules-to-save", "embed_tokens,norm"]
    for more, problem in (
        (["--backbone-layers", "2"], "begun with a backbone of num_hidden_layers=4, not 2: resume w"),
        (
            ["--dtype", "bf16"],
            "begun with other backbone weights (another model, or dtype of its weights): resume with",
        ),
    ):
        assert cli.main([*arguments, *modules, "--resume", *more]) == 1
        assert problem in capsys.readouterr().err
    swapped = [*train_arguments(model_folder, (files[1], files[1]), tmp_path), "--epochs", "1", *modules, "--resume"]
    assert cli.main(swapped) == 1
    problem = "begun with other training data or another tokenizer: resume with the same, or b"
    assert problem in capsys.readouterr().err
    monkeypatch.setattr("adapterkern.model.backbone.load_backbone", None)  # the others are told before it
    for more, problem in (
        (["--adapter-dim", "8"], "begun with --adapter-dim 4, not 8: resume with the same value"),
        (["--layers", "0"], "begun with --layers 2,3, not 0: resume with the same value"),
        (["--task", "causal-lm"], "begun with --task classification, not causal-lm: resume with the same value"),
        (["--lr", "0.5"], "begun with --lr 0.02, not 0.5: resume with the same value"),
        (["--layers", "9"], "--layers: expected numbers from -4 to 3, got 9"),
    ):
        assert cli.main([*arguments, "--resume", *more]) == 1
        assert problem in capsys.readouterr().err


def test_of_an_option_given_twice_the_last_counts(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cli.main([*train_arguments(model_folder, files, tmp_path), "--epochs", "1"]) == 0  # after 4
    assert "--epochs: given more than once; the last one counts" in caplog.messages
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000008"]
