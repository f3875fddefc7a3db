"""The demo under torchrun; tests/cli/test_cli.py has it in one process."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import tiny_run


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_print_once(tmp_path: Path) -> None:
    tiny_run.model().unload().save_pretrained(tmp_path / "model")
    tiny_run.tokenizer().save_pretrained(tmp_path / "model")
    for name, count in (("train", 32), ("eval", 16)):
        rows = tiny_run.rows(count, seed=count)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["demo", "--model", "model", "--train", "train.jsonl", "--eval", "eval.jsonl", "--backbone-layers", "4"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "adapterkern"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = Counter(line.strip() for line in done.stdout.splitlines() if line.strip())
    for start in ("LlamaForCausalLM: 4 layers", "32 training texts", "head alone", "head + adapters", "saved in "):
        assert sum(count for line, count in lines.items() if line.startswith(start)) == 1, done.stdout
    assert (tmp_path / "adapterkern-demo" / "adapters" / "adapterkern.safetensors").exists()
