"""Messages about Python's arguments, in the words of the command line."""

import argparse
import os
import re


def in_options(message: str, parser: argparse.ArgumentParser) -> str:
    """A message about the fields of our dataclasses, and arguments of our functions, as one about the options.

    A field's option is the one that sets it. At the message's beginning any field is replaced, as in ``seed: expected
    ...``; further on ``seed=1``, and names that cannot be other words, as ``batch_size``.
    """
    typed = [
        word for word in getattr(parser, "words", ()) if re.search("[a-z0-9]=", word)
    ]  # max_length=5.csv is a file
    typed = sorted({*typed, *map(os.path.normpath, typed)}, key=len, reverse=True)
    for number, word in enumerate(typed):
        message = message.replace(word, f"{_KEPT}{number}{_KEPT}")
    message = _in_options(message, parser)
    return re.sub(rf"{_KEPT}(\d+){_KEPT}", lambda m: typed[int(m[1])], message)


_KEPT = "\ue000"  # a character of nobody's, around the number of what the user typed


def _in_options(message: str, parser: argparse.ArgumentParser) -> str:
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "version", "config")}
    actions |= {f"{name}_data": actions[name] for name in ("eval", "drift") if name in actions}
    options = {name: action.option_strings[0] for name, action in actions.items()}
    message = re.sub(r" \(in Python: (?:[^()]|\([^()]*\))*\)", "", message)

    head, colon, rest = message.partition(": ")
    names = head.split(", ")
    if colon and all(name in options for name in names):
        head = ", ".join(options[name] for name in names)
        if len(names) == 1 and actions[names[0]].nargs == 0:
            rest = re.sub(r"(?<![=\w])(True|False)\b", lambda m: setting(actions[names[0]], m[1]), rest)
        rest = re.sub(r"(?<![=\w])None\b", "none", rest)
        rest = re.sub(r"(?<=got )[\[(](-?\d+(?:, -?\d+)*),?[\])]", lambda m: m[1].replace(" ", ""), rest)
    known = "|".join(sorted(options, key=len, reverse=True)) or "(?!)"
    message = re.sub(
        rf"{BEFORE}({known})={_VALUE}(?:((?: in trained adapter \d+)?, not ){_VALUE})?",
        lambda m: setting(actions[m[1]], m[2]) + (f"{m[3]}{_value(actions[m[1]], m[4])}" if m[3] else ""),
        head + colon + rest,
    )
    message = re.sub(r"(?<=another task: )(\w+), not (\w+)", lambda m: f"{command(m[1])}, not {command(m[2])}", message)
    message = re.sub(
        rf"{BEFORE}(?<!, )({known})(?!,){AFTER}", lambda m: options[m[1]] if "_" in m[1] else m[1], message
    )
    return re.sub(_ADVICE, "", message)


def setting(action: argparse.Action, value: str) -> str:
    """``name=value``, with the value as Python writes it, as the option of ``name`` with its value."""
    option, shown = action.option_strings[0], _value(action, value)
    if (action.nargs == 0 and value in ("True", "False")) or value == "True":
        return option if value == "True" else shown
    return f"no {option}" if value in ("False", "None") else f"{option} {shown}"


def _value(action: argparse.Action, value: str) -> str:
    """A value as Python writes it, as it is typed: of a flag the flag itself."""
    option = action.option_strings[0]
    if action.nargs == 0 and value in ("True", "False"):
        negative = action.option_strings[-1] if isinstance(action, argparse.BooleanOptionalAction) else f"no {option}"
        return option if value == "True" else negative
    if value[0] in "[(":
        return ",".join(part.strip(" '") for part in value[1:-1].split(","))
    return "none" if value == "None" else value.strip(_QUOTES)


# The command that trains a task of this class
_COMMANDS = {"Task": "train", "RoutedTask": "route train", "MultiTask": "multitask", "QuestionAnswering": "qa train"}
_COMMANDS |= dict.fromkeys(("Distillation", "KeepBehaviour"), "distill")


def command(kind: str) -> str:
    """A run whose task is of this class, by the command that trains it; of another class its name."""
    return f"one of `adapterkern {_COMMANDS[kind]}`" if kind in _COMMANDS else kind


_QUOTES = "'\""
# Of which a command has no option
_ADVICE = (
    r"; [a-z]+_column(?: and [a-z]+_column)* names? (?:another|others)(?:, or \w+ and \w+ a pair)?"
    r"|\nset skip_bad_rows=True to skip them|\. prompt and completion are for task='causal-lm'"
)
BEFORE, AFTER = r"(?<![\w./'\"=-])", r"(?![\w/'\"=]|\.\w)"  # not within a path, a quoted value or another name
_VALUE = r"('[^']*'|\[[^\]]*\]|\([^)]*\)|-?\w(?:[\w.,/+-]*\w)?)"
