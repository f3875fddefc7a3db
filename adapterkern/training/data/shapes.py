"""The shapes that a causal-lm row may have: which columns are read, and as what.

    text                          a text, or chat messages
    prompt, completion            two texts, or two lists of chat messages
    messages                      chat messages: {"role": ..., "content": ...}
    conversations                 the same, or ShareGPT's: {"from": ..., "value": ...}
    instruction, input, output    Alpaca's; rows may lack an input

``TrainConfig`` names the columns of the first two, which go before the others. A file has rows of one shape.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from adapterkern.training.config import TrainConfig
from adapterkern.training.data.chat import (
    Conversation,
    conversation,
    is_sharegpt,
    listed_messages,
    messages_of,
    question,
    tools_of,
)
from adapterkern.training.data.given import is_given
from adapterkern.training.data.rows import (
    BadRows,
    Row,
    columns,
    listed,
    problem,
    scalar,
    shown,
    source_name,
    warn,
    warn_once,
)


class Shape(NamedTuple):
    """What is read of a file's rows."""

    columns: dict[str, str]  # each must be there, and what chooses it: the name of a setting, or ""
    chat: bool = False  # lists of messages, not texts

    @property
    def more(self) -> tuple[str, ...]:
        """The columns that are read where there are any."""
        return ("input",) if self.columns == ALPACA.columns else ("tools",) if self.chat else ()


_MESSAGES, _CONVERSATIONS = (Shape({name: ""}, chat=True) for name in ("messages", "conversations"))
ALPACA = Shape({"instruction": "", "output": ""})
_KNOWN = (_MESSAGES, _CONVERSATIONS, ALPACA)
_SETTINGS = ("text_column", "prompt_column", "completion_column")
# As Alpaca's rows are commonly shown to a model without a chat template
_OPENING = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_FURTHER = ", paired with an input that provides further context"


def choose_shape(rows: list[Row], config: TrainConfig, source: str, named: bool) -> Shape:
    """The shape of the rows that are not tokenized already; that of texts if there is none.

    A column that was asked for goes before the default names. With ``named``, a warning if none of those that were
    asked for is there.
    """
    of_text = [row for row in rows if not is_given(row)]
    found = columns(of_text)
    asked = [name for name in _SETTINGS if getattr(config, name) != getattr(TrainConfig, name)]
    text, pair = _of_settings(config)
    shape = text
    pairs = config.prompt_column in found or (config.completion_column in found and config.text_column not in found)
    if pairs and not (asked == ["text_column"] and all(_has(row, config.text_column) for row in of_text)):
        shape = pair
    lacking = [name for name in asked if getattr(config, name) not in found]
    first = next((row for row in of_text if _has_all(row, shape)), None)
    if first is None and len(lacking) == len(asked):
        there = [other for other in (shape, *_KNOWN) if other.columns.keys() <= set(found)]
        whole = ((row, other) for other in there for row in of_text if _has_all(row, other))
        first, shape = next(whole, (None, there[0] if there else shape))
    if named and found and lacking and len(lacking) == len(asked) and shape.columns.keys() <= set(found):
        names = ", ".join(f"{shown(getattr(config, name))} ({name})" for name in lacking)
        warn("%s: there is no column %s; read are %s", source, names, listed(shape.columns))
    if first is not None and all(listed_messages(first.values[name]) is not None for name in shape.columns):
        shape = shape._replace(chat=True)
    return shape


def _of_settings(config: TrainConfig) -> tuple[Shape, Shape]:
    """The shapes whose columns the settings name: of texts, and of prompts and completions."""
    pair = {config.prompt_column: "prompt_column", config.completion_column: "completion_column"}
    return Shape({config.text_column: "text_column"}), Shape(pair)


def of_one_shape(rows: list[Row], shape: Shape, config: TrainConfig, bad: BadRows) -> list[Row]:
    """The rows without those of another shape."""
    shapes = (shape, *(other for other in (*_of_settings(config), *_KNOWN) if other.columns != shape.columns))
    kinds = ["" if is_given(row) else _kind(row, shapes) for row in rows]
    first = next((number for number, row in enumerate(rows) if kinds[number] and _has_all(row, shape)), None)
    good = []
    for row, kind in zip(rows, kinds, strict=True):
        if first is None or kind in ("", kinds[first]):
            good.append(row)
        else:
            expected = f"{kinds[first]}, which {rows[first].place} has"
            bad.add(row.place, f"expected {expected}, got {kind}: a file has one kind of row")
    return good


def _kind(row: Row, shapes: Sequence[Shape]) -> str:
    """Which of the shapes the row has, in words; "" for none, or a part of the first."""
    for shape in shapes:
        if _has_all(row, shape):
            messages = listed_messages(row.values[next(reversed(shape.columns))])
            form = " of from and value" if is_sharegpt(messages) else " of role and content"
            return " and ".join(map(shown, shape.columns)) + (form if messages is not None else "")
        if shape is shapes[0] and any(_has(row, name) for name in shape.columns):
            return ""
    return ""


def _has_all(row: Row, shape: Shape) -> bool:
    return all(_has(row, name) for name in shape.columns)


def _has(row: Row, column: str) -> bool:
    """Whether the column is not blank."""
    value = row.values.get(column)
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def say_shape(rows: list[Row], shape: Shape, templated: bool, source: str) -> None:
    """Name a shape that no setting chose and that is not as it is learned, in one line; of a file, once per process."""
    first = next((row for row in rows if not is_given(row)), None)
    form = ""
    if first is not None and shape.columns == ALPACA.columns:
        form = "Alpaca's form (instruction, input, output)"
    elif first is not None and shape.chat and is_sharegpt(listed_messages(first.values.get(next(iter(shape.columns))))):
        form = "ShareGPT's form (from, value)"
    if form:
        read = "chat messages" if shape.chat or templated else "prompt and completion"
        line = f"{source}: rows of {form}; read as {read}"
        warn("%s", line) if source == source_name(None) else warn_once(line)


def read_row(row: Row, shape: Shape, templated: bool) -> tuple[str, str] | Conversation:
    """A prompt, "" for none, and the text to learn; or the conversation to learn.

    Args:
        templated: there is a chat template, which Alpaca's rows are then learned in.

    Raises:
        ValueError: a value is not of its type, or has nothing to learn.
    """
    if shape.chat:
        parts = [messages_of(row, name) for name in shape.columns]
        learned_from = len(parts[0]) if len(parts) > 1 else 0
        return conversation([message for part in parts for message in part], learned_from, tools_of(row))
    texts = [scalar(row.values.get(name)) for name in shape.columns]
    if wrong := [n for n, t in zip(shape.columns, texts, strict=True) if not isinstance(t, str) or not t.strip()]:
        raise ValueError("; ".join(problem(row, name, "a non-empty string") for name in wrong))
    if shape.columns != ALPACA.columns:
        return (texts[0], texts[1]) if len(texts) > 1 else ("", texts[0])
    asked = _instruction(row, texts[0], templated)
    return (
        (asked, texts[1])
        if isinstance(asked, str)
        else conversation([asked, {"role": "assistant", "content": texts[1]}])
    )


def read_prompt(row: Row, config: TrainConfig, templated: bool) -> str | Conversation:
    """What a row asks, of any of the shapes: a prompt, or the messages up to the one to answer; answers are not read.

    Args:
        templated: as for ``read_row``.

    Raises:
        ValueError: it asks nothing, or a value is not of its type.
    """
    values = row.values
    for name in _of_messages(config):
        if listed_messages(values.get(name)) is not None:
            return question(messages_of(row, name), tools_of(row))
    name = "instruction" if "instruction" in values and config.prompt_column not in values else config.prompt_column
    text = scalar(values.get(name))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(problem(row, name, "a non-empty string"))
    if name == config.prompt_column:
        return text
    asked = _instruction(row, text, templated)
    return asked if isinstance(asked, str) else question([asked])


def asks(rows: list[Row], config: TrainConfig) -> bool:
    """Whether the rows have any of the columns that ``read_prompt`` reads."""
    *names, text = _of_messages(config)
    known = {*names, "instruction"} & set(columns(rows))
    return bool(known) or any(listed_messages(row.values.get(text)) is not None for row in rows)


def _of_messages(config: TrainConfig) -> list[str]:
    """The columns that may have messages."""
    known = [name for shape in (_MESSAGES, _CONVERSATIONS) for name in shape.columns]
    return list(dict.fromkeys((config.prompt_column, *known, config.text_column)))


def _instruction(row: Row, instruction: str, templated: bool) -> str | dict[str, Any]:
    """The prompt of Alpaca's row; ``templated``: the message."""
    given = scalar(row.values.get("input"))
    if given is not None and not isinstance(given, str):
        raise ValueError(problem(row, "input", "a string"))
    parts_of_prompt = [instruction, given] if given and given.strip() else [instruction]
    if templated:
        return {"role": "user", "content": "\n\n".join(parts_of_prompt)}
    opening = _OPENING.format(_FURTHER if len(parts_of_prompt) > 1 else "")
    headed = [f"### {name}:\n{part}" for name, part in zip(("Instruction", "Input"), parts_of_prompt, strict=False)]
    return "\n\n".join([opening, *headed, "### Response:\n"])
