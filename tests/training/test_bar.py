"""The progress bar in terminals of several widths."""

import functools
import importlib.util
import io
import re
import sys
import types
from typing import Any

import pytest
import rich.console
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


class Output:
    """ipywidgets' context manager, in which what is displayed goes to the widget."""

    inside = False

    def __enter__(self) -> None:
        Output.inside = True

    def __exit__(self, *exc: object) -> None:
        Output.inside = False

    def clear_output(self, wait: bool) -> None:
        assert wait


@pytest.mark.parametrize("widgets", [True, False])
def test_in_a_notebook_the_bar_is_a_widget(
    widgets: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ipywidgets, in which rich draws the bar, there are lines."""
    shown: list[tuple[bool, Any]] = []
    display, output = types.ModuleType("IPython.display"), types.ModuleType("ipywidgets")
    display.display = lambda value: shown.append((Output.inside, value))  # type: ignore[attr-defined]
    output.Output = Output  # type: ignore[attr-defined]
    for module in (types.ModuleType("IPython"), display, output):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if widgets else None)
    record = {"step": 3, "loss": 0.1234, "lr": 1e-3, "grad_norm": 12.34, "tokens_per_second": 123456}
    with report.Reporter(None, 10) as reporter:
        reporter.step(3)
        reporter.train(record | {"skipped_steps": 0})
        reporter.say("a line")
    drawn, printed = ("".join(getattr(v, "text", "") for inside, v in shown if inside == where) for where in (1, 0))
    assert any(isinstance(value, Output) for _, value in shown) == widgets
    assert (" 3/10" in re.sub(r"\x1b\[[\d;]*m", "", drawn)) == widgets
    assert ("step 3/10  loss 0.1234" in printed) != widgets
    assert "a line" in printed
    assert capsys.readouterr() == ("", "")
