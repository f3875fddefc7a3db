"""``adapterkern train --scale X --learned-scale --no-layer-norm --dropout P``."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adapterkern import cli

pytestmark = pytest.mark.slow


def test_a_run_learns_its_scale_and_is_resumed_with_it(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train", "--model", str(model_folder), "--train", str(files[0]), "--output", str(run)]
    command += ["--adapter-dim", "4", "--layers=-1", "--init", "xavier", "--lr", "1e-2", "--no-progress", "--no-plot"]
    command += ["--max-steps", "2", "--checkpoint-every", "1", "--no-layer-norm", "--learned-scale"]
    assert cli.main([*command, "--scale", "4", "--dropout", "0.2"]) == 0
    tensors = load_file(run / "adapterkern.safetensors")
    assert sorted(tensors) == [f"3.0.{name}" for name in ("down.bias", "down.weight", "scale", "up.bias", "up.weight")]
    assert json.loads((run / "adapterkern.json").read_text())["adapter"]["dropout"] == 0.2
    assert 0 < abs(tensors["3.0.scale"].item() - 4) < 0.1
    assert cli.main(["eval", str(run), "--data", str(files[1]), "--model", str(model_folder)]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--scale", "2", "--dropout", "0.2", "--resume"]) == 1
    assert "the run was begun with --scale 4.0, not 2.0" in capsys.readouterr().err
    assert cli.main([*command, "--scale", "4", "--dropout", "1"]) == 1
    assert "--dropout: expected a number in [0, 1), got 1" in capsys.readouterr().err
    assert cli.main([*command, "--scale", "nan"]) == 2
    assert "--scale: expected a number, got 'nan'" in capsys.readouterr().err
