"""The Triton kernels without a GPU: the interpreted tests, in processes of their own.

TRITON_INTERPRET=1 has to be set before Triton is imported and forbids compilation afterwards, which test_aot.py needs.
Imports and first calls take 5 s of a process, so files share one; each has to end within pytest's timeout.
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
    "files",
    [
        "ops/interpreted_kernels.py ops/interpreted_variants.py ops/interpreted_routing.py ops/interpreted_traffic.py",
        "ops/interpreted_preparation.py ops/interpreted_index.py ops/test_operator.py ops/test_variants.py "
        "model/test_low_rank.py",
        "model/interpreted_liger.py",
    ],
    ids=["kernels", "operators", "liger"],
)
def test_interpreted(files: str) -> None:
    given = [TESTS / file for file in files.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *map(str, given)]
    command += [f"--deselect={file.relative_to(TESTS.parent)}::{name}" for file in given for name in NOT_INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert child.returncode == 0, f"in the interpreter:\n{child.stdout}\n{child.stderr}"
