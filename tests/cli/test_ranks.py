"""Commands under torchrun: every line is printed once, by rank 0."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from adapterkern import cli
from tests.support import tiny_qa

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


@pytest.mark.parametrize("command", ["train", "route train", "distill", "qa train", "multitask"])
def test_two_processes_print_what_one_does(
    command: str, model_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    model, texts = model_folder, [str(path) for path in files]
    data = ["--train", texts[0], "--eval", texts[1]]
    if command == "multitask":
        data = ["--data", "a", *texts, "--data", "b", *texts]
    elif command == "distill":
        data += ["--task", "classification", "--keep", texts[1]]
    elif command == "qa train":
        model = tmp_path / "model"
        tiny_qa.TOKENIZER.save_pretrained(model)
        tiny_qa.model().unload().save_pretrained(model)
        data = ["--train", str(tiny_qa.EXAMPLES), "--eval", str(tiny_qa.EXAMPLES)]
    arguments = [*command.split(), "--model", str(model), *data, "--output", str(tmp_path / "run")]
    arguments += ["--adapter-dim", "4", "--max-steps", "2", "--no-progress", "--no-plot", "--max-length", "128"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "adapterkern"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = Counter(done.stdout.splitlines())
    assert max(lines.values()) == 1, lines
    assert sum(line.startswith("saved in ") for line in lines) == 1
    assert sum(line.startswith("loss ") for line in lines) == 1
    assert sum("param" in line and "saved" not in line for line in lines) == {"multitask": 2, "route train": 0}.get(
        command, 1
    )


def test_an_ablation_has_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["ablate", "--output", str(tmp_path / "study")]) == 1
    assert "ablate: expected one process, got several" in capsys.readouterr().err
