"""Fixtures of the interpreted tests: memory that is NaN until it is written, and a recording without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from adapterkern.ops import graphs
from tests.support.interpreted import Recording


@pytest.fixture
def nan_in_empty_tensors() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    @contextmanager
    def begin() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "recording", lambda device: True)
            yield

    return begin


Recording = Recording
