"""The studies import what there is, and their files say where they were made."""

import importlib
import json
from pathlib import Path

import pytest

from experiments import common

pytestmark = pytest.mark.slow

FOLDER = Path(common.__file__).parent
STUDIES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "common"))
STUDIES += [f"{p.parent.name}.__main__" for p in FOLDER.glob("*/__main__.py")]


@pytest.mark.parametrize("study", STUDIES)
def test_each_study_has_a_command_line(
    study: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [study, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"experiments.{study}").main()
    assert ended.value.code == 0
    assert f"python -m experiments.{study.removesuffix('.__main__')}" in capsys.readouterr().out


def test_a_record_says_when_where_and_at_which_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["study", "--output", str(tmp_path / "out")])
    arguments = common.parse(common.make_parser("study", "A study."))
    common.record(arguments.output / "x.json", settings={"lr": 1e-3}, rows=[1])
    made = json.loads((tmp_path / "out" / "x.json").read_text())
    assert made["settings"] == {"lr": 1e-3}
    assert made["rows"] == [1]
    assert made["commit"] == common.commit()
    assert made["datetime"].endswith("+00:00")
    assert {"device", "threads", "python", "versions"} <= made["machine"].keys()
    assert {"torch", "adapterkern"} <= made["machine"]["versions"].keys()
