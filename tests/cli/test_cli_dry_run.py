"""``--dry-run`` as a user types it: what it shows, and that it leaves no file."""

import json
import shlex
from pathlib import Path

import pytest

from adapterkern import cli
from tests.support import tiny_chat, tiny_qa, tiny_run
from tests.support.runs import records, trained

pytestmark = pytest.mark.slow

SMALL = "--dtype fp32 --batch-size 8 --adapter-dim 4 --layers=-2,-1 --epochs 2 --no-plot"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_run.model().unload().save_pretrained("llama")
    tiny_chat.tokenizer().save_pretrained("llama")
    tiny_qa.model().unload().save_pretrained("qa")
    tiny_qa.TOKENIZER.save_pretrained("qa")
    chats = [{"messages": tiny_chat.said(f"w{n}", f"w{n + 1} w2", system="w9")} for n in range(12)]
    for name, rows in (("reviews", tiny_run.rows(40)), ("chat", chats)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --model llama --train reviews.jsonl --eval 20%", "  label: ⟦"),
        ("train --model llama --train chat.jsonl --task causal-lm", "<|im_start|> <unk>⟦ w1 w2 <|im_end|>⟧"),
        ("route train --model llama --train reviews.jsonl --experts 2 --eval 20%", "  label: ⟦"),
        ("distill --model llama --train chat.jsonl --teacher itself", "<|im_start|> <unk>⟦ w1 w2 <|im_end|>⟧"),
        ("multitask --model llama --data a reviews.jsonl --data b reviews.jsonl", "  label: ⟦a: "),
        (f"qa train --model qa --train {tiny_qa.EXAMPLES} --eval 40% --null-threshold 0", "Question: "),
    ],
)
def test_no_file_is_left(line: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert cli.main(shlex.split(f"{line} --output run {SMALL} --dry-run")) == 0
    err = capsys.readouterr().err
    assert said in err
    for part in ("parameters  ", "steps       ", "memory      ", "time        about "):
        assert f"\n{part}" in err
    assert "dry run: 3 steps were taken and undone, and nothing was written" in err
    assert sorted(here.rglob("*")) == before


def test_the_run_after_it_has_the_same_bits(here: Path) -> None:
    line = f"train --model llama --train reviews.jsonl --eval 20% {SMALL} --no-progress"
    assert cli.main(shlex.split(f"{line} --output plain")) == 0
    assert cli.main(shlex.split(f"{line} --output run --dry-run")) == 0
    assert not Path("run").exists()
    assert cli.main(shlex.split(f"{line} --output run")) == 0
    one, other = trained(Path("plain")), trained(Path("run"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    losses = [[record["loss"] for record in records(Path(name))] for name in ("plain", "run")]
    assert losses[0] == losses[1]


def test_what_a_run_refuses_a_dry_run_refuses(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train --model llama --train reviews.jsonl --output run {SMALL}"
    assert cli.main(shlex.split(line)) == 0
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert cli.main(shlex.split(f"{line} --dry-run")) == 1
    assert "--output: run holds an earlier run" in capsys.readouterr().err
    assert cli.main(shlex.split(f"{line} --dry-run --overwrite")) == 0
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
