"""The map in a room's ``__init__.py`` names every module of the room, and no other."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adapterkern"


@pytest.mark.parametrize("room", ["ops", "optim", "model", "training", "inference"])
def test_the_map_is_complete(room: str) -> None:
    modules = {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in (PACKAGE / room).glob("*/__init__.py")}
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert text is not None
    named = set(re.findall(r"\w+(?:\.py|/)", text))
    assert (modules | folders) - named == set()
    assert {name for name in named if name.endswith(".py")} - modules == set()
