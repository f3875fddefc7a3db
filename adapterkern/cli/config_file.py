"""``--config FILE``: options from a file, in front of those that are typed, which win.

A YAML or JSON file of option names and values (``lr: 2e-3``, ``layers: [-2, -1]``, ``prefix-cache: false``), a run's
``sources.json``, which has the options that were typed, or its ``task.json``, which has the settings of its training.
``--resume`` reads those of the run in ``--output``.
"""

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterkern import checks
from adapterkern.training.config import TrainConfig

OPTION = "--config"
_UNSAID = ("output_dir", "resume", "overwrite")  # of a task.json: about its run, and not about the training
_OF_ONE_CALL = ("output_dir", "resume", "overwrite", "dry_run")
_INSTEAD = {"--epochs": "max_steps", "--max-steps": "epochs"}  # of a run that is resumed to be longer


def with_file(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The command line with the options of its ``--config``, or of the run that it resumes.

    Raises:
        ValueError: the file is not YAML or JSON, or has an option that the command does not have.
        OSError: it cannot be read.
    """
    before, command, rest = _innermost(argv, parser)
    places = [n for n, word in enumerate(rest) if word == OPTION or word.startswith(f"{OPTION}=")]
    if not places or OPTION not in command._option_string_actions:
        return [*before, *_of_resumed(rest, command), *rest]
    at = places[-1]
    value = rest[at].partition("=")[2] if "=" in rest[at] else next(iter(rest[at + 1 :]), "")
    if not value or len(places) > 1:
        return list(argv)  # which the parser refuses
    rest = [*rest[:at], *rest[at + (1 if "=" in rest[at] else 2) :]]
    path = Path(value)
    return [*before, *_options(path, _read(path), command, {word.split("=")[0] for word in rest}), *rest]


def typed_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a command line as JSON, for ``sources.json``. Paths are absolute."""
    found = {}
    for action in arguments.parser._actions:
        if action.option_strings and action.dest in arguments.parser.typed and action.dest not in _OF_ONE_CALL:
            value = getattr(arguments, action.dest)
            if isinstance(action, argparse._AppendAction):
                value = [os.path.abspath(one) if isinstance(one, Path) else one for one in value]
            elif value and (action.metavar in ("FILE", "DIR") or action.dest == "model") and os.path.exists(value):
                value = os.path.abspath(value)
            found[action.dest] = str(value) if isinstance(value, Path) or value == math.inf else value
    return found


def _of_resumed(rest: Sequence[str], command: argparse.ArgumentParser) -> list[str]:
    """The options that a run was begun with, for one that ``--resume`` continues."""
    output = next((word.partition("=")[2] for word in rest if word.startswith("--output=")), "")
    if not output and "--output" in rest:
        output = next(iter(rest[rest.index("--output") + 1 :]), "")
    path = Path(output, "sources.json")
    if "--resume" not in rest or OPTION not in command._option_string_actions or not output:
        return []
    if not os.path.isdir(output) and not any(word.split("=")[0] == "--model" for word in rest):
        command.error(f"argument --output: expected the folder of a run to resume, got {output}, which is not there")
    if not path.exists():
        return []
    try:
        saved = _of_sources(json.loads(path.read_bytes()))
    except ValueError:
        saved = None  # damaged: the run's reader says how
    typed = {word.split("=")[0] for word in rest}
    other = {name for option, name in _INSTEAD.items() if option in typed}
    return [] if saved is None else _options(path, {k: v for k, v in saved.items() if k not in other}, command, typed)


def _innermost(
    argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[list[str], argparse.ArgumentParser, list[str]]:
    """The words that name a command, its parser, and the other words."""
    count = 0
    for word in argv:
        commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not commands or word not in commands[0].choices:
            break
        parser, count = commands[0].choices[word], count + 1
    return list(argv[:count]), parser, list(argv[count:])


def _options(path: Path, values: Mapping[str, Any], parser: argparse.ArgumentParser, typed: set[str]) -> list[str]:
    known = {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}
    known |= {action.dest: action for action in parser._actions if action.option_strings}
    known = {name: action for name, action in known.items() if action.dest not in ("help", "config")}
    words: list[str] = []
    keys: dict[str, str] = {}  # by option
    for key, value in values.items():
        action = known.get(key) or known.get(key.replace("_", "-"))
        if action is None:
            near = checks.near(key.replace("_", "-"), [name for name in known if "_" not in name])
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise ValueError(f"{OPTION}: {path}: expected options of {parser.prog}, got {key!r}{hint}")
        if (other := keys.setdefault(action.option_strings[0], key)) != key:
            raise ValueError(f"{OPTION}: {path}: expected each option once, got {other!r} and {key!r}")
        if value is not None and not typed & set(action.option_strings):
            words += _words(path, key, action, value)
    return words


def _words(path: Path, key: str, action: argparse.Action, value: Any) -> list[str]:
    option = action.option_strings[0]
    if action.nargs == 0:  # a flag
        if not isinstance(value, bool):
            raise ValueError(f"{OPTION}: {path}: {key}: expected true or false, got {value!r}")
        off = [name for name in action.option_strings if name.startswith("--no-")]
        return [option] if value != key.startswith("no-") else off[:1]
    if isinstance(value, bool | Mapping):
        raise ValueError(f"{OPTION}: {path}: {key}: expected a value of {option}, got {value!r}")
    if isinstance(action, argparse._AppendAction) and isinstance(value, list):
        return [f"{option}={one}" for one in value]
    return [f"{option}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{OPTION}: expected a .yaml or .json file, got {path}")
    if not path.exists():
        raise FileNotFoundError(f"{OPTION}: no file {path}")
    if path.suffix.lower() == ".json":
        from adapterkern.files import read_json

        found: Any = read_json(path)
    else:
        import yaml

        try:
            found = _unique_keys(yaml)(path.read_text(encoding="utf-8")).get_single_data()
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{OPTION}: {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{OPTION}: {path}: expected names of options and their values, got {found!r:.80}")
    if isinstance(found.get("config"), dict) and "format_version" in found:
        return _of_run(found["config"])
    return _of_sources(found) or found


def _of_sources(found: Any) -> dict[str, Any] | None:
    """The options in a ``sources.json``; None if it has none, or is something else."""
    options = found.get("options") if isinstance(found, dict) and "eval_data" in found else None
    return options if isinstance(options, dict) else None


def _unique_keys(yaml: Any) -> Any:
    """YAML's safe loader, which refuses a key that is there twice: of the two values one would be dropped."""

    from adapterkern.files import unique_keys

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            unique_keys([(str(key.value), None) for key, _ in node.value if key.value != "<<"])
            return super().construct_mapping(node, deep)

    return Loader


def _of_run(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What is said by the settings in a ``task.json``: those that are not the defaults."""
    defaults = TrainConfig().to_dict()
    said = {name: value for name, value in saved.items() if name not in _UNSAID and value != defaults.get(name)}
    return {name: "inf" if name == "max_norm" and value is None else value for name, value in said.items()}
