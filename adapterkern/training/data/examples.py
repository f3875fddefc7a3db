"""From rows to examples: tokenization, labels, prompt masking. What rows may be is in shapes.py, chat.py and given.py.

An example is its token ids, its targets, and the positions of the states that predict them. The targets of a labeled
example are those of its label, see targets.py. A causal-lm example has one target per token to learn, and the state at
t − 1 predicts token t. Prompt tokens, padding and the first token carry no loss.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import TypeVar  # torch needs it, too; typing has a default from Python 3.13

from adapterkern.training.config import TrainConfig
from adapterkern.training.data.chat import Conversation, tokenize_chats
from adapterkern.training.data.given import IDS, IGNORE, LABELS, Text, given_columns, given_texts, is_given
from adapterkern.training.data.labels import label_name, label_number, unknown_label, written_in_two_ways
from adapterkern.training.data.rows import (
    BadRows,
    DataError,
    Row,
    check_columns,
    columns,
    read_rows,
    shown,
    source_name,
    warn,
    warn_unused,
)
from adapterkern.training.data.shapes import ALPACA, Shape, choose_shape, of_one_shape, read_row, say_shape
from adapterkern.training.data.targets import TARGETS
from adapterkern.training.data.tokens import tokenize

_LOOKED_AT = 10  # unknown labels, for what they may have meant: more are not shown

Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Mapping[str, Any]  # the last by column


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenized row. Subclasses may add fields."""

    input_ids: np.ndarray  # (n,) int64
    targets: np.ndarray  # what targets.py makes of a label, or (k,) token ids
    positions: np.ndarray  # (k,) positions of the states that predict token ids; empty beside a label
    row: int = dataclasses.field(default=-1, kw_only=True)  # its number within a run, see `numbered`
    place: str = dataclasses.field(default="", kw_only=True)  # of its row: file and line
    starts: tuple[int, ...] = dataclasses.field(default=(0,), kw_only=True)  # where its packed texts begin
    cuts: tuple[int, ...] = dataclasses.field(default=(0,), kw_only=True)  # the tokens of each beyond max_length
    # hashes of these tokens with and without their last one, in this process
    beyond: tuple[tuple[int, int], ...] = dataclasses.field(default=((0, 0),), kw_only=True)
    given: bool = dataclasses.field(default=False, kw_only=True)  # whether its row was tokenized already
    chat: bool = dataclasses.field(default=False, kw_only=True)  # whether the chat template has made its text

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays that ``fingerprint`` covers."""
        return self.input_ids, self.targets, self.positions

    def text(self) -> bytes | None:
        """What examples of one text have in common, which no split parts; None for one that is always learned."""
        return self.input_ids.tobytes()


E = TypeVar("E", bound=Example, default=Example)


def numbered(examples: Iterable[E], start: int = 0) -> list[E]:
    """Copies of the examples, one per text, with ``row`` counting up from ``start``."""
    return [dataclasses.replace(example, row=row) for row, example in enumerate(unpacked(examples), start)]


def unpacked(examples: Iterable[E]) -> Iterator[E]:
    """The examples, those of several packed texts as one example per text: no text attends to another."""
    for example in examples:
        ends = (*example.starts[1:], len(example.input_ids))
        parts = zip(example.starts, ends, example.cuts, example.beyond, strict=True)
        for start, end, cut, beyond in parts if len(ends) > 1 else ():
            inside = (example.positions >= start) & (example.positions < end)
            yield dataclasses.replace(
                example,
                input_ids=example.input_ids[start:end],
                targets=example.targets[inside],
                positions=example.positions[inside] - start,
                starts=(0,),
                cuts=(cut,),
                beyond=(beyond,),
            )
        if len(ends) == 1:
            yield example


def load_examples(
    data: Rows,
    config: TrainConfig,
    tokenizer: Any = None,
    labels: Sequence[str] | None = None,
    *,
    named: bool = False,
) -> tuple[list[Example], list[str]]:
    """Read and tokenize data for ``config.task``.

    Args:
        data: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.tab`` file, also compressed (``.gz``), or a
            ``.parquet`` file; a folder of ``.txt`` files, where the names of subfolders are labels; ``NAME``,
            ``NAME:SPLIT`` or ``NAME:CONFIGURATION:SPLIT`` of a dataset on the hub, by default its split ``train``; an
            iterable of mappings; a mapping of columns to lists or arrays; a pandas ``DataFrame``; or an Arrow table.
            Rows have the columns that ``config`` names; of causal-lm also chat messages, ShareGPT's or Alpaca's, see
            shapes.py. Rows with ``input_ids`` (a list of token ids) are tokenized already, see given.py, and need no
            tokenizer. A column that is not read is named in a warning.
        tokenizer: a transformers tokenizer.
        labels: the label names of a head; by default those in the data.
        named: ``config`` names the columns of these rows, and of no others: causal-lm warns if they have none of them.

    Returns:
        the examples, and the label names (none for regression and causal-lm).

    Raises:
        DataError: a column that all rows lack; bad rows, each named by file and line, unless ``config.skip_bad_rows``;
            no rows left; or labels that leave nothing to learn, as only one.
        ImportError: a package that reads the data is not installed: pyarrow for Parquet, datasets for the hub.
        OSError: there is no such file, folder or dataset, or it cannot be read.
        TypeError: rows of text without a tokenizer; or ``data`` holds no rows.
        ValueError: rows of chat messages, and the tokenizer has no chat template.
    """
    bad = BadRows(source_name(data))
    examples, names = _load(data, config, tokenizer, labels, bad, named)
    bad.settle(config.skip_bad_rows)
    _check_some(examples, names, config, labels, bad)
    return examples, names


def check_data(data: Rows, config: TrainConfig, labels: Sequence[str] | None = None) -> list[str]:
    """Raise what ``load_examples`` would raise, as far as it can be known without a tokenizer; the label names.

    Rows that would be skipped are named only if no others are left.
    """
    bad = BadRows(source_name(data))
    examples, names = _load(data, config, UNREAD, labels, bad)
    if not (config.skip_bad_rows and examples):
        bad.settle(config.skip_bad_rows)
    _check_some(examples, names, config, labels, bad)
    return names


UNREAD = object()  # stands for a tokenizer: of a text there is a token or two, whatever they are


def _load(
    data: Rows,
    config: TrainConfig,
    tokenizer: Any,
    labels: Sequence[str] | None,
    bad: BadRows,
    named: bool = False,
) -> tuple[list[Example], list[str]]:
    rows = read_rows(data, bad)
    if config.labeled:
        return _labeled(rows, config, tokenizer, labels, bad)
    return _causal_lm(rows, config, tokenizer, bad, named), [] if labels is None else list(labels)


def _check_some(
    examples: list[Example], names: list[str], config: TrainConfig, labels: Sequence[str] | None, bad: BadRows
) -> None:
    """Raise ``DataError`` if no example is left, or nothing to tell apart."""
    if not examples:
        raise DataError(f"{bad.source}: no rows" + (f" are left of {len(bad.found)}" if bad.found else ""))
    targets = [example.targets for example in examples]
    if config.labeled and labels is None and (wrong := TARGETS[config.task].too_few(names, targets)):
        raise DataError(f"{bad.source}: column {shown(config.label_column)}: {wrong}")


def _labeled(
    rows: list[Row], config: TrainConfig, tokenizer: Any, labels: Sequence[str] | None, bad: BadRows
) -> tuple[list[Example], list[str]]:
    column, kind = config.label_column, TARGETS[config.task]
    _check_columns(rows, config, {column}, {config.text_column: "text_column", column: "label_column"}, bad.source)
    good = []
    for row, texts in zip(rows, _texts_of_column(rows, config, tokenizer, bad), strict=True):
        value, wrong = kind.read(row, column)
        if wrong:
            bad.add(row.place, wrong)
        elif len(texts) > 1:
            bad.add(row.place, f"expected one text for one label, got {len(texts)} that are packed into the row")
        elif texts:
            good.append((row, texts[0], value))
    names = list(labels) if labels is not None else kind.names(value for _, _, value in good)
    numbers = {name: number for number, name in enumerate(names)}
    found = (one for _, _, value in good for one in kind.labels(value))
    if tokenizer is not UNREAD and (both := written_in_two_ways(found)):
        warn("%s: column %s: the same label as a string and as another value: %s", *(bad.source, shown(column), both))
    examples, unknown = [], dict[str, str]()
    for row, text, value in good:
        others = [label_name(one) or "" for one in kind.labels(value) if label_number(one, numbers) is None]
        for label in others:
            if label not in unknown:
                unknown[label] = unknown_label(label, names, look=len(unknown) < _LOOKED_AT)
            bad.add(row.place, f"column {shown(column)}: {unknown[label]}")
        if not others:
            examples.append(_of_text(row, text, kind.targets(value, numbers), config))
    return examples, names


def _of_text(row: Row, text: Text, targets: np.ndarray, config: TrainConfig) -> Example:
    """The example of a row with one text, cut to the maximum length, and its targets."""
    ids = text.ids[: config.max_length]
    none, cuts = np.empty(0, dtype=np.int64), (len(text.ids) - len(ids),)
    beyond = (_beyond(text, config),)
    return Example(ids, targets, none, cuts=cuts, beyond=beyond, place=row.place, given=is_given(row))


def _beyond(text: Text, config: TrainConfig) -> tuple[int, int]:
    gone = np.asarray(text.ids[config.max_length :], dtype=np.int64)
    return hash(gone.tobytes()), hash(gone[:-1].tobytes())  # of none 0


def _causal_lm(
    rows: list[Row], config: TrainConfig, tokenizer: Any, bad: BadRows, named: bool = False
) -> list[Example]:
    shape = choose_shape(rows, config, bad.source, named)
    rows = of_one_shape(rows, shape, config, bad)
    _check_columns(rows, config, set(), shape.columns, bad.source, shape.more)
    templated = bool(getattr(tokenizer, "chat_template", None))
    if tokenizer is not UNREAD:
        say_shape(rows, shape, templated, bad.source)
    *_, column = shape.columns
    read = functools.partial(read_row, shape=shape, templated=templated)
    made = _texts(rows, read, column, config, tokenizer, bad)
    examples, lost = [], []
    for row, texts in zip(rows, made, strict=True):
        learned_from = [part for part in texts if (part.labels[1:] != IGNORE).any()]  # nothing predicts the first token
        parts = [part for part in learned_from if (part.labels[1 : config.max_length] != IGNORE).any()]
        if parts:
            lost += [row.place] * (len(learned_from) - len(parts))
            cuts = tuple(max(len(part.ids) - config.max_length, 0) for part in parts)
            beyond = tuple(_beyond(part, config) for part in parts)
            parts = [Text(part.ids[: config.max_length], part.labels[: config.max_length]) for part in parts]
            ends = np.cumsum([len(part.ids) for part in parts])
            starts = (0, *ends[:-1].tolist())
            labels = np.concatenate([part.labels for part in parts])
            labels[list(starts)] = IGNORE
            learned = np.flatnonzero(labels != IGNORE)
            ids = np.concatenate([part.ids for part in parts])
            more: Any = {"place": row.place, "starts": starts, "cuts": cuts, "beyond": beyond}
            more["given"] = is_given(row)
            more["chat"] = not more["given"] and (shape.chat or (templated and shape.columns == ALPACA.columns))
            examples.append(Example(ids, labels[learned], learned - 1, **more))
        elif texts:
            learned = np.flatnonzero(texts[0].labels != IGNORE)
            why = f"the prompt has {learned[0]}" if len(learned) and learned[0] else "nothing predicts the first"
            why = why if len(learned) else "labels and masks leave none"
            bad.add(row.place, f"no token to learn: {why} and max_length is {config.max_length}")
    if lost and tokenizer is not UNREAD:
        warn(
            "%s: %d packed texts are left out: all that they learn is beyond the maximum length of %d tokens (%s)",
            *(bad.source, len(lost), config.max_length, lost[0]),
        )
    return examples


def _check_columns(
    rows: list[Row],
    config: TrainConfig,
    always: set[str],
    needed: dict[str, str],
    source: str,
    more: Sequence[str] = (),
) -> None:
    """Raise ``DataError`` for a needed column that all rows lack, and name the columns that are read from none.

    ``always`` are the needed columns of rows that are tokenized already; ``more`` are read from others, if they are
    there.
    """
    if not rows:
        return
    learned = not config.labeled
    of_text = [row for row in rows if not is_given(row)]
    names = needed if of_text else {name: needed[name] for name in always}
    pair = "prompt_column and completion_column" if learned and len(names) == 1 else ""
    check_columns(of_text or rows, names, source, pair)
    read = {*needed, *more} if of_text else set(always)
    for row in rows:
        if is_given(row):
            read |= given_columns(row.values, learned)
    unused = [name for name in columns(rows) if name not in read]
    hint = " by causal-lm, which learns texts and no labels" if learned and config.label_column in unused else ""
    warn_unused(source, unused, hint)


def _texts(
    rows: list[Row],
    read: Callable[[Row], tuple[str, str] | Conversation],
    column: str,
    config: TrainConfig,
    tokenizer: Any,
    bad: BadRows,
) -> list[list[Text]]:
    """The tokenized texts of each row, none of a bad one.

    Args:
        read: what a row has that is not tokenized already: prompt and text, or a conversation.
        column: of the texts, for a message.
    """
    made: list[list[Text]] = [[] for _ in rows]
    pairs: dict[int, tuple[str, str]] = {}
    chats: dict[int, Conversation] = {}
    learned = not config.labeled
    for number, row in enumerate(rows):
        try:
            if is_given(row):
                made[number] = given_texts(row.values, learned)
            elif isinstance(found := read(row), Conversation):
                chats[number] = found
            else:
                pairs[number] = found
        except ValueError as error:
            bad.add(row.place, str(error))
    if (pairs or chats) and tokenizer is None:
        raise TypeError("tokenizer: expected a transformers tokenizer for rows of text, got None")
    if tokenizer is UNREAD:
        for number in (*pairs, *chats):
            made[number] = [Text(np.zeros(2, np.int64), np.zeros(2, np.int64))]
        return made
    if pairs and learned and getattr(tokenizer, "eos_token_id", None) is None:
        warn("%s: the tokenizer has no end-of-text token (eos_token), so no text teaches where to stop", bad.source)
    shared = []
    encoded = tokenize(tokenizer, list(pairs.values()), end=learned) if pairs else []
    for number, tokens in zip(pairs, encoded, strict=True):
        if tokens.empty:
            bad.add(rows[number].place, f"column {shown(column)}: the tokenizer returns no tokens for it")
            continue
        ids = np.array(tokens.ids, dtype=np.int64)
        made[number] = [Text(ids, np.where(np.arange(len(ids)) < tokens.prompt, IGNORE, ids))]
        shared += [rows[number].place] * tokens.shared
    if shared:
        warn(
            "%s: %d of %d prompts end within a token (%s): that token is learned. Let the completion, not the prompt, "
            "have the space between them",
            *(bad.source, len(shared), len(pairs), shared[0]),
        )
    said = tokenize_chats({rows[number].place: chat for number, chat in chats.items()}, tokenizer, bad)
    for number in chats:
        made[number] = said.get(rows[number].place, [])
    return made


def _texts_of_column(rows: list[Row], config: TrainConfig, tokenizer: Any, bad: BadRows) -> list[list[Text]]:
    """``_texts`` of ``text_column``, which has no messages."""
    read = functools.partial(read_row, shape=Shape({config.text_column: "text_column"}), templated=False)
    return _texts(rows, read, config.text_column, config, tokenizer, bad)


def unlabeled(rows: list[Row], config: TrainConfig, tokenizer: Any, bad: BadRows) -> list[Example | None]:
    """The example of each row for a prediction: its text is read, its label is not. None for a bad row.

    Raises ``ColumnError`` if no row has the column of the texts.
    """
    if of_text := [row for row in rows if not is_given(row)]:
        check_columns(of_text, {config.text_column: "text_column"}, bad.source)
    made: list[Example | None] = []
    for row, texts in zip(rows, _texts_of_column(rows, config, tokenizer, bad), strict=True):
        if len(texts) > 1:
            bad.add(row.place, f"expected one text, got {len(texts)} that are packed into the row")
        made.append(_of_text(row, texts[0], np.array([0]), config) if len(texts) == 1 else None)
    return made


def check_vocabulary(examples: Sequence[Example], vocabulary: int) -> None:
    """Raise ``ValueError`` if a token id is beyond the model's embedding, as with another model's tokenizer."""
    _check_ids(examples, vocabulary, IDS, lambda example: example.input_ids)


def check_targets(examples: Sequence[Example], vocabulary: int) -> None:
    """The same of tokens to learn, which ``labels`` may give."""
    _check_ids(examples, vocabulary, LABELS, lambda example: example.targets)


def _check_ids(examples: Sequence[Example], vocabulary: int, column: str, ids: Callable[[Example], np.ndarray]) -> None:
    worst = max(examples, key=lambda example: int(ids(example).max()))
    if (largest := int(ids(worst).max())) >= vocabulary:
        where = f"{worst.place}: column {shown(column)}" if worst.given else "tokenizer"
        raise ValueError(f"{where}: expected token ids below the model's {vocabulary}, got {largest}")
