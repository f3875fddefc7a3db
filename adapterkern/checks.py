"""Checks of arguments: one wording for every refusal, ``name: expected ..., got ...``; and fields with their help.

A value of the wrong kind is a ``TypeError``, one out of its range a ``ValueError``.
"""

import dataclasses
import difflib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

T = TypeVar("T")


def integer(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """``value``, an integer from ``low`` to ``high``, both included; None is no bound."""
    bounds = "" if low is None else f" >= {low}" if high is None else f" from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer{bounds}, got {value!r:.80}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name}: expected an integer{bounds}, got {value!s:.80}")
    return value


def number(name: str, value: object, interval: str) -> float:
    """``value``, a number in ``interval``: ``"[0, 1)"``, ``"(0, inf)"`` (finite), ``"[0, inf]"``; NaN is in none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number in {interval}, got {value!r:.80}")
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    too_large = isinstance(value, int) and abs(value) > sys.float_info.max  # float(10**400) raises
    if not (above and below) or too_large:
        raise ValueError(f"{name}: expected a number in {interval}, got {value!r:.80}")
    return value


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """``value``, one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r:.80}")
    return value


def flag(name: str, value: object) -> bool:
    """``value``, True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r:.80}")
    return value


def switch(name: str) -> bool:
    """What an environment variable says: 1, and nothing, is on, 0 is off. Raises ``ValueError`` for any other word."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name}: expected 0 or 1, got {value!r:.80}")
    return value != "0"


def fields(made: Callable[..., T], values: Mapping[str, Any]) -> T:
    """An object of a dataclass from the fields of a file. Raises ``ValueError`` that names an unknown field."""
    known = [field.name for field in dataclasses.fields(cast("Any", made))]
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(f"{unknown[0]:.80}: unknown field; expected one of {', '.join(sorted(known))}")
    return made(**values)


def other_value(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = (), which: str = ""
) -> str | None:
    """What to say of the first field that a run was begun with and does not go on with; None if all are the same.

    Args:
        before, now: fields that JSON holds; a missing one is None.
        free: the fields that may differ.
        which: whose fields they are, if that needs to be said: ``" in trained adapter 1"``.
    """
    for name in sorted((before.keys() | now.keys()) - set(free)):
        if before.get(name) != now.get(name):
            return (
                f"the run was begun with {name}={before.get(name)!r:.80}{which}, not {now.get(name)!r:.80}: "
                "resume with the same value, or begin another run"
            )
    return None


def other_names(**instead: str) -> Callable[[T], T]:
    """Refuses, in calls of a function or in the making of a class, arguments that it does not have, by the right name.

    Args:
        instead: what other libraries call an argument → what to write for it.
    """

    def decorate(target: Any) -> Any:
        function = vars(target)["__init__"] if isinstance(target, type) else target

        parameters = inspect.signature(function).parameters
        own = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name not in ("self", "cls")]
        takes_any = len(own) < len(parameters.keys() - {"self", "cls"})

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name in instead or not (takes_any or name in own):
                    expected = instead.get(name) or " or ".join(near(name, own)) or f"one of {', '.join(own)}"
                    raise TypeError(
                        f"{name}: expected {expected} in {target.__name__}, got {name}={kwargs[name]!r:.80}"
                    )
            return function(*args, **kwargs)

        if not isinstance(target, type):
            return checked
        setattr(target, "__init__", checked)  # noqa: B010 as an attribute, mypy holds it for an instance's
        return target

    return decorate


_FEW = 5  # names in a suggestion
# What others write after the name of our argument
_DATA = ("data", "dataset", "file", "files", "path", "set", "name-or-path", "name_or_path")


def near(name: str, known: Sequence[str]) -> list[str]:
    """Those of ``known`` that an unknown ``name`` may stand for: none if it is like none of them, or a letter of many.

    Those that begin with it, else that end with it, else the one of which it is a typing error, or ``train`` for
    ``train_file``.
    """
    found = [other for other in known if other.startswith(name)]
    found = found or [other for other in known if other.endswith((f"-{name}", f"_{name}"))]
    found = found or difflib.get_close_matches(name, known, 1, cutoff=0.85)
    found = found or [other for other in known for end in _DATA if name in (f"{other}-{end}", f"{other}_{end}")]
    found = found or difflib.get_close_matches(name, known, 1)
    return found if len(found) <= _FEW else []


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with its help, and its choices, on the command line."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})
