"""``adapterkern train --from``: a saved adapter, and its head, trained further."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterkern import cli

pytestmark = pytest.mark.slow

SHORT = ["--max-steps", "2", "--no-progress", "--no-plot"]


def train(model: Path, data: Path, output: Path, *more: str) -> int:
    command = ["train", "--model", str(model), "--train", str(data), "--output", str(output)]
    return cli.main([*command, *SHORT, *more])


@pytest.fixture
def first(model_folder: Path, files: tuple[Path, Path], tmp_path: Path) -> Path:
    assert train(model_folder, files[0], tmp_path / "first", "--adapter-dim", "4", "--layers=-1", "--lr", "1e-2") == 0
    return tmp_path / "first"


def weights(run: Path) -> dict[str, torch.Tensor]:
    heads = {f"head.{key}": t for key, t in load_file(run / "head.safetensors").items()}
    return load_file(run / "adapterkern.safetensors") | heads


def test_adapter_and_head_go_on(
    first: Path, model_folder: Path, files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(model_folder, files[0], tmp_path / "same", "--from", str(first), "--lr", "1e-12") == 0
    torch.testing.assert_close(weights(tmp_path / "same"), weights(first), rtol=0, atol=1e-9)
    assert "head starts anew" not in caplog.text
    assert train(model_folder, files[0], tmp_path / "more", "--from", str(first), "--lr", "1e-2") == 0
    moved = [not torch.equal(t, weights(first)[key]) for key, t in weights(tmp_path / "more").items()]
    assert all(moved)


def test_a_run_that_goes_on_is_resumed_like_any_other(
    first: Path, model_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    every = ["--from", str(first), "--checkpoint-every", "1"]
    assert train(model_folder, files[0], whole, *every) == 0
    assert train(model_folder, files[0], halves, *every) == 0
    for path in (halves / "checkpoints" / "step-00000002").iterdir():
        path.unlink()
    (halves / "checkpoints" / "step-00000002").rmdir()
    assert train(model_folder, files[0], halves, *every, "--resume") == 0
    assert {k: t.tolist() for k, t in weights(halves).items()} == {k: t.tolist() for k, t in weights(whole).items()}


def test_other_labels_have_a_head_of_their_own(
    first: Path, model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "new.jsonl"
    rows = [{"text": "the apple", "label": ("fruit", "new")[n % 2]} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("WARNING"):
        assert train(model_folder, data, tmp_path / "second", "--from", str(first), "--lr", "1e-12") == 0
    assert "--from: the head starts anew" in caplog.text
    assert json.loads((tmp_path / "second" / "head_config.json").read_text())["labels"] == ["fruit", "new"]
    adapters = [load_file(run / "adapterkern.safetensors") for run in (tmp_path / "second", first)]
    torch.testing.assert_close(*adapters, rtol=0, atol=1e-9)


def test_all_labels_of_a_kept_head_may_be_evaluated_on(first: Path, model_folder: Path, tmp_path: Path) -> None:
    three, two = (tmp_path / f"{name}.jsonl" for name in ("three", "two"))
    for path, labels in ((three, "abc"), (two, "ab")):
        rows = [{"text": f"said {n}", "label": labels[n % len(labels)]} for n in range(6)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(model_folder, three, tmp_path / "known", "--from", str(first)) == 0
    assert train(model_folder, two, tmp_path / "kept", "--from", str(tmp_path / "known"), "--eval", str(three)) == 0
    assert train(model_folder, two, tmp_path / "new", "--eval", str(three), "--layers=-1") == 1


def test_refused(
    first: Path, model_folder: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Path(__file__).parents[1] / "golden" / "runs"
    for start, more, message in (
        (
            first,
            ("--layers", "0"),
            "--layers: expected --layers or --from, not both: a saved adapter is as it was made",
        ),
        (tmp_path / "no", (), "no: no such folder; expected the output folder of a training"),
        (golden / "multitask", (), "--from: expected a run of one adapter, got .*, one of `adapterkern multitask`"),
        (golden / "classification", (), "saved for a backbone of hidden_size=16"),
        *(
            (start, ("--output", str(first), "--overwrite"), "--output: expected another folder than that of --from")
            for start in (first, next((first / "checkpoints").iterdir()))
        ),
    ):
        assert train(model_folder, files[0], tmp_path / "out", "--from", str(start), *more) == 1
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert not (tmp_path / "out").exists()


def test_a_share_that_the_earlier_run_has_learned_is_named(
    model_folder: Path, files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(model_folder, files[0], tmp_path / "first", "--adapter-dim", "4", "--eval", "25%", "--seed", "3") == 0
    more = ["--from", str(tmp_path / "first"), "--dry-run", "--eval"]
    assert train(model_folder, files[0], tmp_path / "next", *more, "25%", "--seed", "3") == 0
    assert "held out" not in caplog.text
    assert train(model_folder, files[0], tmp_path / "next", *more, "25%") == 0
    assert (
        "first has held out 25% of train.jsonl with --seed 3, and may have learned what is held out now" in caplog.text
    )
