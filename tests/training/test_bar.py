"""The progress bar in terminals of several widths."""

import functools
import io
import re

import pytest
from rich.console import Console

from adapterkern.training.run import report


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_count_and_times_are_kept(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = functools.partial(Console, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    monkeypatch.setattr(report, "Console", lambda **options: terminal(file=shown, quiet=options["quiet"]))
    record = {"step": 1234, "loss": 0.1234, "lr": 1e-3, "grad_norm": 12.34, "tokens_per_second": 123456}
    with report.Reporter(None, 12345) as reporter:
        reporter.step(1234)
        reporter.train(record | {"skipped_steps": 0})
    lines = [line for line in re.split(r"[\r\n]|\x1b\[2K", shown.getvalue()) if line.startswith("train")]
    last = lines[-1]
    assert len(last) == width
    assert " 1234/12345 " in last
    assert re.search(r"0:00:0\d -:--:-- loss 0\.1234", last)
    assert ("123,456 tokens/s" in last) == (width >= 120)
