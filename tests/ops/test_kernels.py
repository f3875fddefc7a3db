"""The Triton kernels without a GPU: the interpreted tests, each file in a process of its own.

TRITON_INTERPRET=1 has to be set before Triton is imported and forbids compilation afterwards, which test_aot.py needs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
# In the interpreter no input on a CPU is too small for the operator.
NOT_INTERPRETED = ["test_large_inputs_take_the_operator_and_small_ones_eager"]


@pytest.mark.parametrize(
    "file",
    [
        "ops/interpreted_kernels.py",
        "ops/interpreted_variants.py",
        "ops/interpreted_routing.py",
        "ops/interpreted_preparation.py",
        "ops/interpreted_index.py",
        "ops/interpreted_traffic.py",
        "model/interpreted_liger.py",
        "ops/test_operator.py",
        "ops/test_variants.py",
        "model/test_low_rank.py",
    ],
)
def test_interpreted(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(TESTS / file)]
    command += [f"--deselect=tests/{file}::{name}" for name in NOT_INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert child.returncode == 0, f"in the interpreter:\n{child.stdout}\n{child.stderr}"
