"""For all tests: few threads, no network, seeded draws."""

import os
import signal
from collections import Counter
from pathlib import Path

# A shell's background job ignores Ctrl-C, and so would the processes that tests start to interrupt them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread per xdist worker. Idle OpenMP threads sleep: spinning, they take the cores of the other processes, and half
# of the suite took 35 minutes on a machine under load.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

import hypothesis
import pytest
import torch

import bench  # noqa: F401  # which quickens Triton's interpreter where that runs

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first: begun last, they would leave one worker alone with them for minutes."""
    slow, count = Counter[Path](), Counter[Path]()
    for item in items:
        count[item.path] += 1
        slow[item.path] += item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: -slow[item.path] / count[item.path])
