"""``--packing`` and ``--group-by-length`` as a user types them."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import TOPICS


def test_a_packed_run_has_the_numbers_of_a_padded_one(model_folder: Path, tmp_path: Path) -> None:
    draw, words = random.Random(0), [*TOPICS["fruit"], *TOPICS["metal"]]
    rows = [{"text": " ".join(draw.choices(words, k=draw.choice((2, 3, 5, 40))))} for _ in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, *options: str) -> tuple[list[dict[str, Any]], str]:
        command = [sys.executable, "-m", "adapterkern", "train", "--model", str(model_folder), "--task", "causal-lm"]
        command += ["--train", str(tmp_path / "texts.jsonl"), "--eval", "25%", "--output", str(tmp_path / name)]
        command += ["--layers=-1", "--max-steps", "4", "--batch-size", "6", "--log-every", "1", "--dtype", "fp32"]
        done = subprocess.run(
            [*command, "--no-plot", "--group-by-length", *options], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], done.stderr

    padded, _ = run("padded")
    packed, said = run("packed", "--packing")
    assert "; without packing and group_by_length " in said
    assert len(packed) == len(padded) > 4
    for got, expected in zip(packed, padded, strict=True):
        for key in {"loss", "grad_norm", "accuracy"} & expected.keys():
            assert got[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6)
