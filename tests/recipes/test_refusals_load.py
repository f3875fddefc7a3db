"""What the files of recipes must hold: refused by file and field, and nothing stays of what was half loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterkern.recipes.ablation.runs import COLUMNS, append_result, read_results
from adapterkern.recipes.multitask import MultiTask
from tests.support import tiny_run


def test_a_refused_load_leaves_the_backbone_bare(tmp_path: Path) -> None:
    """Else the next load says that the model has adapters."""
    model = tiny_run.model()
    MultiTask(model, ["default"]).save(tmp_path, tiny_run.quiet(task="causal-lm"))
    llama = model.unload()
    path = tmp_path / "tasks" / "default" / "task.json"
    good = path.read_text()
    path.write_text("{")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"task\.json: not a JSON file"):
            MultiTask.from_pretrained(llama, tmp_path)
    path.write_text(good)
    assert MultiTask.from_pretrained(llama, tmp_path)[0].names == ["default"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace(b"0.5", b"x"), "row 2: accuracy: expected a number or nothing, got 'x'"),
        (lambda text: text.replace(b"0.5", b"nan"), "row 2: accuracy: expected a number or nothing, got 'nan'"),
        (lambda text: text.replace(b"k2", b"k1"), "row 2: expected each key once, got 'k1' again"),
        (lambda text: text.replace(b"k2,", b"k2,x,"), "row 2: expected .* fields, got"),
        (lambda text: text.replace(b"k2", b"\xff"), "not a CSV file in UTF-8"),
        (lambda text: text.replace(b"k2", b'"k2'), "not a CSV file in UTF-8"),
        (lambda text: text.replace(b"key,", b"keys,"), "expected the columns key,"),
        (lambda _: b"", "expected the columns key,"),
    ],
)
def test_the_results_of_a_study(tmp_path: Path, change: Callable[[bytes], bytes], problem: str) -> None:
    path = tmp_path / "ablation.csv"
    for key in ("k1", "k2"):
        append_result(path, dict.fromkeys(COLUMNS, "") | {"key": key, "accuracy": 0.5 if key == "k2" else ""})
    assert [row["accuracy"] for row in read_results(path).values()] == ["", "0.5"]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"ablation\.csv: {problem}"):
        read_results(path)
