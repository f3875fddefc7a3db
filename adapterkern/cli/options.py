"""Options of several commands: made from dataclasses, and turned back into them."""

import argparse
import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

from adapterkern import checks
from adapterkern.cli.dtype import CHOICES
from adapterkern.cli.words import AFTER, BEFORE, setting
from adapterkern.model import attention, config, quantized
from adapterkern.model.config import AdapterConfig
from adapterkern.training import config as training
from adapterkern.training.config import TrainConfig

T = TypeVar("T")


class UsageError(Exception):
    """What the user typed does not fit the options of ``parser``; one line that names the option."""

    def __init__(self, message: str, parser: "Parser") -> None:
        super().__init__(message)
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """Raises ``UsageError`` where argparse prints the usage, of a parser that may be another, and exits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_defaults(parser=self)
        self.typed: set[str] = set()  # the fields whose options the last command line had
        self.repeated: set[str] = set()  # the options that it had twice, of which the last counts
        self.words: set[str] = set()  # and their values

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("the following arguments are required:", "missing")
        message = message.replace(": expected one argument", ": expected a value, got none")
        if found := _VALUE_OF_FLAG.fullmatch(message):
            message = _no_value(found[1], found[2])
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help", self)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.dest in self.typed and action.option_strings and not isinstance(action, argparse._AppendAction):
            option = action.option_strings[0]
            if option in _FILES:
                raise argparse.ArgumentError(action, "expected one file, got two: write all rows into one")
            self.repeated.add(option)
        self.typed.add(action.dest)  # argparse calls this for what is there, and not for defaults
        self.words |= set(arg_strings)
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            hint = _mean([c for c in choices if str(value).startswith(c)] or checks.near(str(value), choices))
            raise argparse.ArgumentError(
                action, f"expected one of {', '.join(map(str, action.choices))}, got {value!r}{hint}"
            )

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments; ``parser`` among them is the innermost command's. Raises ``UsageError``."""
        try:
            arguments, unknown = self.parse_known_args(_with_values(argv))
        except UsageError as error:  # --modle is unknown, rather than --model missing
            error.parser._refuse([word for word in argv if word.startswith("--")])
            error.parser._miss_command(argv)
            raise
        arguments.parser._refuse(unknown)
        if unknown:
            before = list(argv)[: list(argv).index(unknown[0])] if unknown[0] in argv else []
            arguments.parser.error(arguments.parser._one_too_many(unknown[0], before) or f"unknown {unknown[0]}")
        return arguments

    def _refuse(self, words: Sequence[str]) -> None:
        """Raise for the first option that this parser does not have."""
        known = [name for action in self._actions for name in action.option_strings]
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        for option in (word.split("=")[0] for word in words):
            if option.startswith("-") and option not in known:
                hint = _hint(option, self)
                if hint or not has_commands:  # else it may be a command's
                    self.error(f"unknown {option}{hint}")

    def _miss_command(self, argv: Sequence[str]) -> None:
        """Raise if an option is where one of this parser's commands is expected."""
        rest = argv[len(self.prog.split()) - 1 :]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and rest and rest[0].startswith("-"):
                self.error(f"missing {action.metavar}: expected one of {', '.join(action.choices)} before {rest[0]}")

    def _one_too_many(self, word: str, before: Sequence[str]) -> str | None:
        """What to say of a word that no option and no argument takes; None if nothing precedes it that takes one."""
        options = {name: action for action in self._actions for name in action.option_strings}
        if (option := word.split("=")[0]) in options:
            return f"{option}: expected after {self.prog.split()[-1]}, got it before"
        last = next((other for other in reversed(before) if other.split("=")[0] in options), "")
        option, _, value = last.partition("=")
        if last and not value and last == before[-1]:
            return _no_value(option, repr(word)) if options[option].nargs == 0 else None
        arguments = [action for action in self._actions if not action.option_strings]
        if option and options[option].nargs == 0:
            option = value = ""
        action = options[option] if option else arguments[-1] if arguments else None
        if action is None or action.nargs is not None:
            return None
        expected = "folder" if action.type in (Path, folder) else {"FILE": "file"}.get(str(action.metavar), "value")
        return f"{option or action.dest}: expected one {expected}, got {value or before[-1]} and {word}"


_FILES = ("--train", "--eval", "--data", "--drift", "--keep", "--eval-keep")  # of which one given twice may mean both
_VALUE_OF_FLAG = re.compile(r"(--\S+): ignored explicit argument (.*)")


def _no_value(flag: str, value: str) -> str:
    return f"{flag}: expected no value, since the option is a flag, got {value}"


# What other libraries call an option, where it is another than the argument that ``OTHER_NAMES`` has for Python
_OTHER_NAMES = {
    "use_liger_kernel": "liger",
    "task_type": "task",
    "no_fused": "unfused",
    "attn_implementation": "attn",
    "load_in_4bit": 'load_in="4bit"',
    "load_in_8bit": 'load_in="8bit"',
    "quantization": "load_in",
}


def _hint(option: str, parser: argparse.ArgumentParser) -> str:
    """What an option that is unknown may stand for: what other libraries call one of ours, or a typing error."""
    name = option.lstrip("-").replace("-", "_")
    actions = {a.dest: a for a in parser._actions if a.option_strings}
    theirs = {name: name for name in actions} | config.OTHER_NAMES | training.OTHER_NAMES | _OTHER_NAMES
    ours = theirs.get(name) or theirs.get(name.removeprefix("lora_")) or ""
    fields = rf"{BEFORE}({'|'.join(actions) or '(?!)'})(?:=(\S+))?{AFTER}"
    meant, found = re.subn(fields, lambda m: setting(actions[m[1]], m[2] or "True"), ours)
    if found:
        return _mean([meant.rstrip(",")])
    if ours.startswith("no ") and ": " in ours:
        return f": adapters have {ours.partition(': ')[0]}"
    if "(" in ours:
        return f": there is no such option; in Python it is {ours.partition(' and ')[0]}"
    typed = (ours if ours.isidentifier() else name).replace("_", "-")
    known = [string.removeprefix("--") for action in actions.values() for string in action.option_strings]
    alike = [name for name in known if name.startswith("no-") == typed.startswith("no-")]
    likely = checks.near(typed, alike) or checks.near(typed.removeprefix("no-"), known)
    return _mean([f"--{name}" for name in likely])


def _mean(names: list[str]) -> str:
    return f" (did you mean {' or '.join(names)}?)" if names else ""


def _with_values(argv: Sequence[str]) -> list[str]:
    """``--layers -2,-1`` as ``--layers=-2,-1``, since argparse takes what begins with a dash for an option."""
    joined: list[str] = []
    for word in argv:
        if re.match(r"-[\d.]", word) and joined and re.fullmatch(r"--[^=]+", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def integer(text: str) -> int:
    """``"8000000"`` or ``"8e6"``."""
    try:
        return int(text)  # not by way of a float, which has 53 bits
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        hint = " such as 1000000 or 1e6" if re.fullmatch(r"\d[\d.,']* ?[kKmMgGbB]?", text) and value != value else ""
        raise argparse.ArgumentTypeError(f"expected an integer{hint}, got {text!r}")
    return int(value)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def layer_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layer numbers such as 0,3 or -2,-1, got {text!r}") from None


def none_or(text: str) -> str | None:
    if not text:
        raise argparse.ArgumentTypeError("expected a file, or none, got ''")
    return None if text == "none" else text


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a folder, got ''")
    return Path(text)


def name_list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def add_options(parser: Any, record: type, without: Collection[str] = (), only: Collection[str] | None = None) -> None:
    """One option for each field of a dataclass: type and default are the field's, the help is its metadata's.

    ``only`` these fields, and with the default None: what a saved run has holds.
    """
    for field in dataclasses.fields(record):
        if field.name in without or (only is not None and field.name not in only):
            continue
        option, choices = f"--{field.name.replace('_', '-')}", field.metadata.get("choices")
        default = field.default if only is None else None
        shown = field.metadata["help"] + ("" if default is None else " [%(default)s]")
        kinds = get_args(field.type) or (field.type,)
        if bool in kinds:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default, help=shown)
            continue
        parse, metavar = next(parse for kind, parse in _PARSERS if kind in kinds or (kind is str and choices))
        parser.add_argument(
            option, type=parse, choices=choices, default=default, metavar=None if choices else metavar, help=shown
        )


_PARSERS: tuple[tuple[Any, tuple[Any, str]], ...] = (
    (tuple[int, ...], (layer_list, "I,J,...")),
    (tuple[str, ...], (name_list, "A,B,...")),
    (float, (number, "X")),
    (int, (integer, "N")),
    (str, (str, "NAME")),
)


def from_options(arguments: argparse.Namespace, record: type[T]) -> T:
    """The dataclass that the options of ``add_options`` describe; its default where there was no option."""
    values, fields = vars(arguments), dataclasses.fields(record)  # type: ignore[arg-type]
    return record(**{field.name: values[field.name] for field in fields if field.name in values})


def add_backbone_options(parser: argparse.ArgumentParser, of_run: bool = False, mixes: bool = False) -> None:
    """The backbone, which a command must name; or, ``of_run``, what to use in place of a saved run's.

    ``mixes``: batches have several adapters, of which none runs with the norm that follows.
    """
    group = parser.add_argument_group("backbone", "default: the run's own" if of_run else None)
    dtype = "dtype of the backbone's weights" + ("" if of_run else "; default auto: bf16 where that is fast, else fp32")
    load_in = "quantize the backbone's matrices by bitsandbytes" + ("" if of_run else "; default none")
    group.add_argument("--model", required=not of_run, help="a .gguf file, transformers folder or hub name")
    add_layers_option(group, "keep only the first N decoder layers")
    group.add_argument("--dtype", choices=CHOICES, help=dtype)
    group.add_argument("--load-in", choices=quantized.CHOICES, help=load_in)
    group.add_argument(
        "--attn", choices=attention.CHOICES, help="implementation of attention; default: what transformers takes"
    )
    group.add_argument("--unfused", action="store_true", help="run the adapters as plain PyTorch modules")
    group.add_argument("--liger", action="store_true", help="run Liger's kernels in the backbone; on a GPU")
    if not (of_run or mixes):
        help = "run an adapter and the RMSNorm that follows as one: less memory, if the backbone is in 16 bits"
        group.add_argument("--fuse-norm", action="store_true", help=help)


LAYERS_HELP = "keep only the first N decoder layers; default 8 of SmolLM2-135M, all of --model"


def add_layers_option(parser: Any, help: str = LAYERS_HELP) -> None:
    parser.add_argument("--backbone-layers", dest="num_layers", type=integer, metavar="N", help=help)


def add_output_option(parser: Any, default: str) -> None:
    parser.add_argument(
        "--output", dest="output_dir", type=folder, default=Path(default), metavar="DIR", help="default %(default)s"
    )


def demo_layers(arguments: argparse.Namespace) -> int | None:
    """``--backbone-layers``, whose default cuts the demo's backbone and no other."""
    return 8 if arguments.num_layers is None and arguments.model is None else arguments.num_layers


def model_flags(arguments: argparse.Namespace) -> dict[str, bool]:
    """The keyword arguments of ``LlamaAdapter`` that ``add_backbone_options`` has asked for."""
    return {"fused": not arguments.unfused, "liger": arguments.liger}


def add_skip_option(parser: argparse.ArgumentParser) -> None:
    help = "skip the adapter's first N sites: less time, at little cost after a training with --adapter-drop"
    parser.add_argument("--skip-sites", type=integer, default=0, metavar="N", help=help)


FILES = "JSONL, JSON, CSV, TSV, Parquet, or a folder of .txt files"
FORMATS = f"{FILES}; or NAME:SPLIT of a dataset on the hub"


def add_data_options(parser: argparse.ArgumentParser, format: str = FORMATS) -> None:
    parser.add_argument("--train", required=True, metavar="FILE", help=f"what to learn from: {format}")
    parser.add_argument("--eval", metavar="FILE", help="the same, to evaluate on; or a share of --train: 10%%")
    add_drift_option(parser)


def add_drift_option(parser: argparse.ArgumentParser) -> None:
    help = "texts of another kind: evaluations measure how far the adapters take the model's next tokens from its own"
    help += f", in nats per token; 64 are enough; {FORMATS}; none: no texts, of a run that is resumed"
    parser.add_argument("--drift", type=none_or, metavar="FILE", help=help)


OF_PLAIN_LOSS = ("label_smoothing", "class_weights")  # which a task with a loss of its own does not have
COLUMNS = ("text_column", "label_column", "prompt_column", "completion_column")
READING = ("skip_bad_rows", "eval_batch_size")


def add_saved_options(
    parser: argparse.ArgumentParser,
    format: str = FORMATS,
    data_required: bool = False,
    columns: bool = True,
) -> None:
    """A saved run, its data and its backbone. ``columns``: the data may have columns of other names."""
    parser.add_argument("directory", type=Path, help="the --output of a training, or one of its checkpoints")
    default = "" if data_required else "; default: the run's own --eval"
    parser.add_argument("--data", required=data_required, metavar="FILE", help=format + default)
    group = parser.add_argument_group("data", "default: the run's own")
    add_options(group, TrainConfig, only=(*(COLUMNS if columns else ()), *READING))
    add_backbone_options(parser, of_run=True)
    add_skip_option(parser)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Where the report on a run with a classification head goes."""
    group = parser.add_argument_group("report", "what a classification gets wrong; default: tables on the terminal")
    group.add_argument("--report", type=folder, metavar="DIR", help="also report.json, confusion.png, wrong.jsonl, ...")
    group.add_argument(
        "--worst", type=integer, default=20, metavar="N", help="rows most confidently wrong to write [%(default)s]"
    )


def as_asked(arguments: argparse.Namespace, config: TrainConfig) -> TrainConfig:
    """A saved run's configuration with what ``add_saved_options`` was given in place of its own."""
    given = {name: getattr(arguments, name, None) for name in (*COLUMNS, *READING)}
    asked = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, progress=True, **asked)  # the training's --no-progress is not about this


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    # eps is the optimizer's on the command line.
    add_options(parser.add_argument_group("adapters", "defaults in brackets"), AdapterConfig, without={"eps"})


def adapter_fields() -> tuple[str, ...]:
    """The fields of ``AdapterConfig`` that have options."""
    return tuple(field.name for field in dataclasses.fields(AdapterConfig) if field.name != "eps")


def adapter_config(arguments: argparse.Namespace) -> AdapterConfig:
    return AdapterConfig(**{name: getattr(arguments, name) for name in adapter_fields()})


def add_training_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """One option for each field of ``TrainConfig``, except those in ``without``."""
    parser.add_argument("--config", metavar="FILE", help="options from a .yaml or .json file; those that are typed win")
    group = parser.add_argument_group("training", "defaults in brackets")
    group.add_argument("--output", dest="output_dir", required=True, metavar="DIR", help="where everything is written")
    group.add_argument(
        "--dry-run", action="store_true", help="show what is learned and what it will take, and write nothing"
    )
    add_options(group, TrainConfig, without={"output_dir", *without})
