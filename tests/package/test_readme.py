"""README is short, its numbers are those of the saved results, and its code runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.measure import paired_ratio
from tests.support import tiny_run

README = Path(__file__).parents[2] / "README.md"


def test_the_results_page_is_of_the_newest_results() -> None:
    page = report.results_page(report.newest())
    assert report.PAGE.read_text(encoding="utf-8") == page, "out of date: run python -m bench results"


def test_readme_is_short_and_its_numbers_are_in_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    cited = {
        run.machine["cuda"] is not None: run
        for run in report.newest()
        if f"/{run.path.parent.name}/{run.path.name}" in text
    }
    assert set(cited) == {False, True}, "one run on a CPU and one on a GPU"
    of_both = [entries for key, entries in cited[True].groups.items() if key[1].startswith("both")]
    adapter = {e.variant: e for entries in of_both for e in entries}
    for variant in ("ours", "eager autocast", "torch.compile"):
        assert f"{1000 * adapter[variant].median:.2f} ms" in text, variant
    of_steps = [entries for key, entries in cited[True].groups.items() if key[0] == "step" and "4×1024" in key[1]]
    gpu = {e.variant: e.times for e in of_steps[0]}
    for variant in ("ours", "eager adapters", "PEFT LoRA"):
        tax = 100 * (paired_ratio(gpu[variant], gpu["frozen backbone"]) - 1)
        assert re.search(rf"\D{tax:.1f}\s%", text), variant
    groups = cited[False].groups
    for dtype in ("float32", "bfloat16"):
        (step,) = (
            entries for key, entries in groups.items() if key[0] == "step" and f"16×48 tokens, {dtype}" in key[1]
        )
        medians = {e.variant: e.median for e in step}
        for variant in ("frozen backbone", "eager adapters", "ours", "PEFT LoRA", "ours + prefix cache"):
            assert f"{1000 * medians[variant]:.0f} ms" in text, variant
    shapes = "T=2048, d=4096", "T=768, d=576"
    wide, narrow = (_against_the_fastest(groups, shape) for shape in shapes)
    assert f"{wide:.2f} of the faster" in text
    assert f"{narrow:.2f} at SmolLM2's" in text
    on_cpus = (run for run in report.newest() if run.machine["cuda"] is None)
    (amx,) = (run for run in on_cpus if "amx_bf16" in run.machine["cpu"]["flags"])
    wide, narrow = (_against_the_fastest(amx.groups, shape) for shape in shapes)
    assert f"with AMX {wide:.2f} and {narrow:.2f}" in text


def _against_the_fastest(groups: dict[tuple[str, str], Any], shape: str) -> float:
    one = {e.variant: e.times for e in groups["adapter", f"both, {shape}, r=64, bfloat16"]}
    return max(paired_ratio(one["ours"], one[name]) for name in ("eager autocast", "eager pure", "torch.compile"))


def test_the_python_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "import adapterkern" in b)
    monkeypatch.chdir(tmp_path)
    tiny_run.model().unload().save_pretrained("llama")
    tiny_run.tokenizer().save_pretrained("llama")
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 40}"} for i in range(12)]
    for name in ("train.jsonl", "test.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {}
    exec(code, given)
    assert given["result"].metrics["accuracy"] >= 0
    assert {path.name for path in Path("mine").iterdir()} >= {"adapterkern.safetensors", "adapterkern.json"}
    for p, q in zip(given["again"].adapter_parameters(), given["model"].adapters["default"].parameters(), strict=True):
        assert torch.equal(p, q)
