"""README's performance section is what the newest saved results say."""

from pathlib import Path

import pytest

from bench import report

README = Path(__file__).parent.parent / "README.md"


def test_readme_agrees_with_the_newest_results() -> None:
    text = README.read_text()
    section = report.readme_section(report.newest())
    assert report.update_readme(text, section) == text, "README is out of date: run python -m bench readme"


def test_only_what_is_between_the_markers_changes() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.update_readme(text, "new") == "before\nnew\nafter\n"


def test_missing_markers_are_named() -> None:
    with pytest.raises(ValueError, match="bench:end"):
        report.update_readme(f"{report.BEGIN} and no end", "new")
