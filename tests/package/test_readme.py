"""README's performance section is what the newest saved results say, and its code runs."""

import json
import re
from pathlib import Path

import pytest
import torch

from bench import report
from tests.support import tiny_run

README = Path(__file__).parents[2] / "README.md"


def test_readme_agrees_with_the_newest_results() -> None:
    text = README.read_text()
    section = report.readme_section(report.newest())
    assert report.update_readme(text, section) == text, "README is out of date: run python -m bench readme"


def test_only_what_is_between_the_markers_changes() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.update_readme(text, "new") == "before\nnew\nafter\n"


def test_missing_markers_are_named() -> None:
    with pytest.raises(ValueError, match="bench:end"):
        report.update_readme(f"{report.BEGIN} and no end", "new")


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "import adapterkern" in b)
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in tiny_run.rows(16)))
    given = {"llama": tiny_run.model().unload(), "tokenizer": tiny_run.tokenizer()}
    given["inputs"] = {"input_ids": torch.ones(1, 4, dtype=torch.long), "max_new_tokens": 2, "pad_token_id": 0}
    exec(code, given)
    assert {p.name for p in Path("other").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert given["result"].metrics["accuracy"] >= 0
