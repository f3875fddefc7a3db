"""From rows of text to examples: tokenization, labels, prompt masking.

An example is its token ids, its targets, and the positions of the states that predict them. A classification example
has one target, its label. A causal-lm example has one target per token to learn, and the state at t − 1 predicts token
t. Prompt tokens, padding and the first token carry no loss.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import TypeVar  # torch needs it, too; typing has a default from Python 3.13

from adapterkern.training.config import TrainConfig
from adapterkern.training.data.rows import BadRows, DataError, Row, read_rows, source_name

_INTEGER = re.compile(r"-?\d{1,18}")

Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenized row. Subclasses may add fields."""

    input_ids: np.ndarray  # (n,) int64
    targets: np.ndarray  # (1,) the label's index, or (k,) token ids
    positions: np.ndarray  # (k,) positions of the states that predict the targets; empty for classification
    row: int = dataclasses.field(default=-1, kw_only=True)  # its number within a run, see `numbered`

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays that ``fingerprint`` covers."""
        return self.input_ids, self.targets, self.positions


E = TypeVar("E", bound=Example, default=Example)


def numbered(examples: Iterable[E], start: int = 0) -> list[E]:
    """Copies of the examples with ``row`` counting up from ``start``."""
    return [dataclasses.replace(example, row=row) for row, example in enumerate(examples, start)]


def label_names(rows: Iterable[Row], config: TrainConfig) -> list[str]:
    """The distinct labels of the rows: in numerical order if all are integers, else in alphabetical order."""
    names = {_label(row.values.get(config.label_column)) for row in rows} - {None}
    labels = sorted(n for n in names if n is not None)
    if all(_INTEGER.fullmatch(name) for name in labels):
        labels.sort(key=int)
    return labels


def load_examples(
    data: Rows, config: TrainConfig, tokenizer: Any = None, labels: Sequence[str] | None = None
) -> tuple[list[Example], list[str]]:
    """Read and tokenize data for ``config.task``.

    Args:
        data: a ``.jsonl``, ``.csv``, ``.tsv`` or ``.tab`` file, or an iterable of mappings. Rows have the columns that
            ``config`` names; ``input_ids`` (a list of token ids) instead of the text column needs no tokenizer.
        tokenizer: a transformers tokenizer.
        labels: the label names of a classification head; by default those in the data.

    Returns:
        the examples, and the label names (none for causal-lm).

    Raises:
        DataError: bad rows, each named by file and line, unless ``config.skip_bad_rows``; no rows left; or only one
            label.
        TypeError: rows of text without a tokenizer.
    """
    bad = BadRows(source_name(data))
    rows = read_rows(data, bad)
    if config.task == "classification":
        names = list(labels) if labels is not None else label_names(rows, config)
        examples = _classification(rows, config, tokenizer, names, bad)
    else:
        names = []
        examples = _causal_lm(rows, config, tokenizer, bad)
    bad.settle(config.skip_bad_rows)
    if not examples:
        raise DataError(f"{source_name(data)}: no rows")
    if config.task == "classification" and labels is None and len(names) < 2:
        raise DataError(
            f"{source_name(data)}: column {config.label_column!r}: expected at least two different labels, got {names}"
        )
    return examples, names


def _label(value: Any) -> str | None:
    """The name of a label; None if ``value`` cannot be one."""
    if isinstance(value, int):
        return str(value)
    return value if isinstance(value, str) and value else None


def _classification(
    rows: list[Row], config: TrainConfig, tokenizer: Any, names: list[str], bad: BadRows
) -> list[Example]:
    numbers = {name: number for number, name in enumerate(names)}
    good = []
    for row in rows:
        label = _label(row.values.get(config.label_column))
        if label is None:
            bad.add(row.place, _problem(row, config.label_column, "a non-empty string or an integer"))
        elif label not in numbers:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            bad.add(row.place, f"label {label!r} is not one of {shown}")
        else:
            good.append((row, numbers[label]))
    ids = _tokenize([row for row, _ in good], config.text_column, config, tokenizer, bad)
    none = np.empty(0, dtype=np.int64)
    return [
        Example(tokens[: config.max_length], np.array([number]), none)
        for tokens, (_, number) in zip(ids, good, strict=True)
        if tokens is not None
    ]


def _causal_lm(rows: list[Row], config: TrainConfig, tokenizer: Any, bad: BadRows) -> list[Example]:
    with_prompt = bool(rows) and config.prompt_column in rows[0].values
    if not with_prompt:
        prompts: list[np.ndarray | None] = [np.empty(0, dtype=np.int64) for _ in rows]
        texts = _tokenize(rows, config.text_column, config, tokenizer, bad, end=True)
    else:
        prompts = _tokenize(rows, config.prompt_column, config, tokenizer, bad)
        texts = _tokenize(rows, config.completion_column, config, tokenizer, bad, special=False, end=True)
    examples = []
    for row, prompt, text in zip(rows, prompts, texts, strict=True):
        if prompt is None or text is None:
            continue
        ids = np.concatenate([prompt, text])[: config.max_length]
        first = max(len(prompt), 1)  # nothing predicts the first token
        if len(ids) <= first:
            bad.add(row.place, f"no token to learn: the prompt has {len(prompt)}, max_length is {config.max_length}")
            continue
        examples.append(Example(ids, ids[first:], np.arange(first - 1, len(ids) - 1)))
    return examples


def _tokenize(
    rows: list[Row],
    column: str,
    config: TrainConfig,
    tokenizer: Any,
    bad: BadRows,
    *,
    special: bool = True,
    end: bool = False,
) -> list[np.ndarray | None]:
    """Token ids of a column, None for a bad row. ``special``: add special tokens; ``end``: add an end-of-text token."""
    ids: list[np.ndarray | None] = [None] * len(rows)
    texts: list[str] = []
    where: list[int] = []
    for index, row in enumerate(rows):
        value = row.values.get(column)
        if "input_ids" in row.values and column == config.text_column:
            ids[index] = _given_ids(row, bad)
        elif not isinstance(value, str) or not value.strip():
            bad.add(row.place, _problem(row, column, "a non-empty string"))
        else:
            texts.append(value)
            where.append(index)
    if texts and tokenizer is None:
        raise TypeError("tokenizer: expected a transformers tokenizer for rows of text, got None")
    if texts:
        encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        final = getattr(tokenizer, "eos_token_id", None) if end else None
        for index, tokens in zip(where, encoded, strict=True):
            if final is not None and (not tokens or tokens[-1] != final):
                tokens = [*tokens, final]
            if tokens:
                ids[index] = np.array(tokens, dtype=np.int64)
            else:
                bad.add(
                    rows[index].place,
                    f"column {column!r}: the tokenizer returns no tokens for it",
                )
    return ids


def _problem(row: Row, column: str, expected: str) -> str:
    """What is wrong with a value that was expected to be a non-empty string."""
    if column not in row.values:
        return f"column {column!r} is missing"
    value = row.values[column]
    got = "an empty one" if isinstance(value, str) else type(value).__name__
    return f"column {column!r}: expected {expected}, got {got}"


def _given_ids(row: Row, bad: BadRows) -> np.ndarray | None:
    ids = row.values["input_ids"]
    good = isinstance(ids, list | tuple) and ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    if not good:
        bad.add(row.place, "column 'input_ids': expected a non-empty list of integers from 0 to 2**31 - 1")
        return None
    return np.array(ids, dtype=np.int64)


def check_vocabulary(examples: Sequence[Example], vocabulary: int) -> None:
    """Raise ``ValueError`` if a token id is beyond the model's embedding, as with another model's tokenizer."""
    largest = max(int(example.input_ids.max()) for example in examples)
    if largest >= vocabulary:
        raise ValueError(f"tokenizer: expected token ids below the model's {vocabulary}, got {largest}")
