"""Which implementation runs, and that it is logged once."""

import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch

from adapterkern.ops import choice, native

HERE = "avx2 is the best that this machine and this build have; small inputs run as eager PyTorch"


@pytest.fixture
def _undecided() -> Iterator[None]:
    choice.runs_triton.cache_clear()
    yield
    choice.runs_triton.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "interpreted", "triton", "expected"),
    [
        ("cpu", torch.float32, False, True, ("native CPU kernels", HERE)),
        ("cpu", torch.float32, True, True, ("Triton kernels in the interpreter", "TRITON_INTERPRET=1 is set")),
        ("cpu", torch.float64, True, True, ("closed form in PyTorch operations", "the kernels have no fp64")),
        ("cuda:0", torch.bfloat16, False, True, ("Triton kernels", "it is a GPU")),
        ("cuda", torch.bfloat16, False, False, ("closed form in PyTorch operations", "triton is not installed")),
        ("cuda", torch.float64, False, True, ("closed form in PyTorch operations", "the kernels have no fp64")),
    ],
)
@pytest.mark.usefixtures("_undecided")
def test_the_choice_and_its_log_line(
    device: str,
    dtype: torch.dtype,
    interpreted: bool,
    triton: bool,
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("ADAPTERKERN_FUSED", raising=False)
    monkeypatch.setattr(choice, "INTERPRETED", interpreted)
    monkeypatch.setattr(native, "instruction_set", lambda: ("avx2", "the best that this machine and this build have"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    assert choice.backend(device, dtype) == expected
    kind = torch.device(device).type
    with caplog.at_level(logging.INFO, "adapterkern.ops.choice"):
        for _ in range(2):
            assert choice.runs_triton(kind, dtype) == expected[0].startswith("Triton")
    name, reason = expected
    assert [r.message for r in caplog.records] == [f"fused adapters on {kind} in {dtype} run as {name}: {reason}"]


def test_the_environment_turns_fused_adapters_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKERN_FUSED", "0")
    assert choice.backend("cuda", torch.float64) == ("eager PyTorch", "ADAPTERKERN_FUSED=0 is set")


def test_without_kernels_the_closed_form_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "INTERPRETED", False)
    monkeypatch.setattr(native, "instruction_set", lambda: (None, "the extension is not built"))
    reason = "the extension is not built; small inputs run as eager PyTorch"
    assert choice.backend("cpu") == ("closed form in PyTorch operations", reason)
