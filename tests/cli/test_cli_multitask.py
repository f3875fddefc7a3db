"""``adapterkern multitask``: resumed with adapters of its own."""

from pathlib import Path

import pytest

from adapterkern import cli


@pytest.mark.parametrize("tasks", ["a", "ab"])
def test_tasks_with_adapters_of_their_own_are_resumed(
    tasks: str, model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["multitask", "--model", str(model_folder), "--output", str(tmp_path), "--no-progress", "--no-plot"]
    for task in tasks:
        arguments += ["--data", task, *map(str, files)]
    arguments += ["--max-steps", "2", "--adapters", "a"]
    assert cli.main([*arguments, '{"adapter_dim": 4}']) == 0
    assert cli.main([*arguments, '{"adapter_dim": 4}', "--resume"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, '{"adapter_dim": 8}', "--resume"]) == 1
    assert "begun with --adapter-dim 4" in capsys.readouterr().err
