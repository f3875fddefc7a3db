"""For all tests: few threads, no network, seeded draws."""

import atexit
import os
import shutil
import tempfile

# A folder for extensions that torch compiles (DeepSpeed's), of this session and all of its workers: a killed run of
# anybody's leaves a lock in the usual one, for which every later run waits.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="adapterkern-extensions-")
    atexit.register(shutil.rmtree, os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)

# One thread per xdist worker. Idle OpenMP threads sleep: spinning, they take the cores of the other processes, and half
# of the suite took 35 minutes on a machine under load.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
