"""Commands under torchrun: every line is printed once, by rank 0."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterkern import cli
from tests.support import pair, tiny_qa

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

COMMANDS = ["train", "route train", "distill", "qa train", "multitask"]


@pytest.fixture(scope="module")
def printed(
    model_folder: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """What two processes print of a command: the first under torchrun, the others in one pair, started once."""
    folder = tmp_path_factory.mktemp("ranks")
    spans = folder / "spans"
    tiny_qa.TOKENIZER.save_pretrained(spans)
    tiny_qa.model().unload().save_pretrained(spans)
    texts = [str(path) for path in files]
    data = {command: ["--train", texts[0], "--eval", texts[1]] for command in COMMANDS}
    data["multitask"] = ["--data", "a", *texts, "--data", "b", *texts]
    data["distill"] = [*data["distill"], "--task", "classification", "--keep", texts[1]]
    data["qa train"] = ["--train", str(tiny_qa.EXAMPLES), "--eval", str(tiny_qa.EXAMPLES)]
    asked = {}
    for command, read in data.items():
        model = spans if command == "qa train" else model_folder
        asked[command] = [*command.split(), "--model", str(model), *read, "--output", str(folder / command)]
        asked[command] += ["--adapter-dim", "4", "--max-steps", "2", "--max-length", "128"]
        asked[command] += ["--no-progress", "--no-plot"]
    (folder / "asked.json").write_text(json.dumps({name: words for name, words in asked.items() if name != "train"}))
    pair.start(_run_all, folder)
    ranks = [pair.found(folder, rank) for rank in range(2)]

    def of(command: str) -> str:
        if command != "train":
            assert [rank[command][0] for rank in ranks] == [0, 0]
            return "".join(rank[command][1] for rank in ranks)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "adapterkern"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        started = [sys.executable, *launcher, *asked[command]]
        done = subprocess.run(started, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return of


def _run_all(rank: int, folder: Path) -> dict[str, tuple[int, str]]:
    """Each command's status and what it prints, in one of two processes."""
    found = {}
    for name, words in json.loads((folder / "asked.json").read_text()).items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            found[name] = cli.main(words), out.getvalue()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_print_what_one_does(command: str, printed: Callable[[str], str]) -> None:
    lines = Counter(printed(command).splitlines())
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
