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
    assert "expected a folder without a model" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in model_folder.iterdir()} == before


def test_modules_to_save(model_folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = [*train_arguments(model_folder, files, tmp_path), "--modules-to-save", "embed_tokens,norm"]
    assert cli.main([*arguments, "--max-steps", "2"]) == 0
    saved = {key for key in load_file(tmp_path / WEIGHTS_NAME) if key.startswith("modules_to_save")}
    assert saved == {"modules_to_save.model.embed_tokens.weight", "modules_to_save.model.norm.weight"}
    config = json.loads((tmp_path / CONFIG_NAME).read_text())["adapter"]
    assert sorted(config["modules_to_save"]) == ["model.embed_tokens", "model.norm"]
    assert cli.main(["eval", str(tmp_path)]) == 0
