"""Completions of prompts, rendered as in training: a text as it is, messages through the chat template.

Prompts of like length run in one batch, padded on the left, and each completion is what its prompt gets by itself.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkern import checks
from adapterkern.files import read_json
from adapterkern.inference.runs import SavedRun
from adapterkern.inference.settings import GenerationSettings, reads_padding
from adapterkern.model.pretrained import configured
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.recipes.routing.task import RoutedTask
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.chat import Conversation, Message, check_template, question, render
from adapterkern.training.data.ends import turn_end
from adapterkern.training.data.examples import Rows
from adapterkern.training.data.padding import context_length
from adapterkern.training.data.rows import (
    HALF_A_PAIR,
    BadRows,
    DataError,
    Row,
    check_columns,
    columns,
    is_unicode,
    iter_rows,
    source_name,
    warn,
)
from adapterkern.training.data.shapes import asks, read_prompt
from adapterkern.training.data.tokens import tokenize
from adapterkern.training.prediction import chunks
from adapterkern.training.run.lock import in_one_thread
from adapterkern.training.run.report import DATA_NAME
from adapterkern.training.saved import CHECKPOINTS
from adapterkern.training.task import Task

NO_ADAPTER = "none"  # the name that stands for the bare backbone

Prompt = str | Conversation


class Completion(NamedTuple):
    """The text that follows a row's prompt, and the name of its column in a table."""

    text: str
    column: str = "completion"

    def columns(self) -> dict[str, Any]:
        """What a table has of it."""
        return {self.column: self.text}


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message]],
    settings: GenerationSettings | None = None,
    *,
    adapter: str | None = None,
    chat: bool = False,
    batch_size: int = 8,
    streamer: Any = None,
) -> list[str]:
    """The completion of each prompt, without special tokens, in their order.

    Args:
        model: a ``LlamaAdapter``, or a causal-lm task, as ``load`` returns them.
        tokenizer: the backbone's.
        prompts: texts; or lists of chat messages, of which the last is to be answered, and which need a chat template.
        settings: default: at most 256 tokens, the likeliest each.
        adapter: the one to run; ``"none"`` for the bare backbone. Default the active one, or a router's choice.
        chat: a text is a user's message.
        batch_size: prompts that run together. Which of them do changes no completion, except for tokens that are
            drawn, and for rounding.
        streamer: transformers'; for one prompt.

    Raises:
        ValueError: a prompt has no tokens, or more than the model was made for; there is no such adapter, or several
            among which ``adapter`` is to choose; the chat template refuses the messages.
        RuntimeError: another thread uses the model, whose adapter and settings would become this one's.
    """
    settings = settings or GenerationSettings()
    checks.integer("batch_size", batch_size, 1)
    asked = [
        prompt if isinstance(prompt, str) else question([dict(message) for message in prompt]) for prompt in prompts
    ]
    encoded = []
    for number, prompt in enumerate(asked):
        try:
            encoded.append(encode(tokenizer, prompt, model, chat=chat))
        except ValueError as error:
            raise ValueError(f"prompts[{number}]: {error}") from error
    templated = chat or any(isinstance(prompt, Conversation) for prompt in asked)
    return continued(
        model, tokenizer, encoded, settings, adapter=adapter, chat=templated, batch_size=batch_size, streamer=streamer
    )


def completions(
    model: Any,
    tokenizer: Any,
    data: Rows,
    config: TrainConfig,
    settings: GenerationSettings,
    *,
    adapter: str | None = None,
    chat: bool = False,
    batch_size: int = 8,
    column: str | None = "completion",
    streamer: Any = None,
) -> Iterator[tuple[Row, Completion | None]]:
    """Each row of ``data`` and its completion, in their order; arguments as for ``complete``.

    Args:
        data: rows with ``config.prompt_column``, chat messages or Alpaca's instruction; read as they are needed.
        column: the name of the completions' column, which no row may have; None if they get none.

    Yields:
        the row, and its completion. None for a bad row with ``config.skip_bad_rows``.

    Raises:
        DataError: bad rows, each named by file and line.
    """
    bad, templated = BadRows(source_name(data)), chat or bool(getattr(tokenizer, "chat_template", None))
    for rows in chunks(iter_rows(data, bad)):
        encoded: dict[int, list[int]] = {}
        messages = chat
        for number, prompt in _prompts(rows, config, templated, column, bad).items():
            try:
                encoded[number] = encode(tokenizer, prompt, model, chat=chat)
                messages = messages or isinstance(prompt, Conversation)
            except ValueError as error:
                bad.add(rows[number].place, str(error))
        if not config.skip_bad_rows:
            bad.settle(False)
        texts = continued(
            model,
            tokenizer,
            list(encoded.values()),
            settings,
            adapter=adapter,
            chat=messages,
            batch_size=batch_size,
            streamer=streamer,
        )
        found = dict(zip(encoded, texts, strict=True))
        for number, row in enumerate(rows):
            yield row, Completion(found[number], column or "completion") if number in found else None
    bad.settle(config.skip_bad_rows)


def check_prompts(data: Rows, config: TrainConfig, column: str | None = "completion") -> int:
    """The number of rows. Raises what ``completions`` would, as far as it can be known without a tokenizer."""
    bad, count, good = BadRows(source_name(data)), 0, 0
    for rows in chunks(iter_rows(data, bad)):
        good += len(_prompts(rows, config, False, column, bad))
        count += len(rows)
    if not (config.skip_bad_rows and good):
        bad.settle(False)
    if not count:
        raise DataError(f"{bad.source}: no rows")
    return count


def _prompts(
    rows: list[Row], config: TrainConfig, templated: bool, column: str | None, bad: BadRows
) -> dict[int, Prompt]:
    """The prompts of the good rows, by their numbers."""
    there = columns(rows)
    if column in there:
        raise DataError(
            f"{bad.source}: column {column!r}: expected rows without the column that the completions are to have; "
            "output_column names another"
        )
    if not asks(rows, config):
        check_columns(rows, {config.prompt_column: "prompt_column"}, bad.source)
    found: dict[int, Prompt] = {}
    for number, row in enumerate(rows):
        try:
            found[number] = read_prompt(row, config, templated)
        except ValueError as error:
            bad.add(row.place, str(error))
    return found


# One prompt


def encode(tokenizer: Any, prompt: Prompt, model: Any = None, *, chat: bool = False) -> list[int]:
    """The tokens of a prompt as in training: what is put before a text is there once. ``chat``: a text is a message.

    Raises:
        ValueError: it has no tokens, or has as many as ``model``, if given, was made for; it is not Unicode.
    """
    if isinstance(prompt, str) and chat:
        prompt = question([{"role": "user", "content": prompt}])
    if isinstance(prompt, str):
        if not is_unicode(prompt):
            raise ValueError(f"the prompt has {HALF_A_PAIR}")
        (tokens,) = tokenize(tokenizer, [(prompt, "")])
        ids = tokens.ids[: tokens.prompt]
    else:
        check_template(tokenizer, "chat messages")
        text = render(tokenizer, prompt.messages, prompt.tools, prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise ValueError("expected a prompt with tokens, got none")
    most = math.inf if model is None else context_length(_adapted(model).config)
    if len(ids) >= most:
        raise ValueError(f"expected a prompt of fewer than the model's {most:g} tokens, got one of {len(ids):,}")
    return ids


# Batches


def continued(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    adapter: str | None = None,
    chat: bool = False,
    batch_size: int = 8,
    streamer: Any = None,
) -> list[str]:
    """The completions of tokenized prompts; the other arguments are those of ``complete``.

    Args:
        chat: the token that ends the assistant's turn ends a completion, too.
    """
    adapted = _adapted(model)
    end = turn_end(tokenizer) if chat else None
    config = settings.config(adapted, tokenizer, [] if end is None else [end])
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    most, wanted = context_length(adapted.config), config.max_new_tokens
    more: dict[str, Any] = {"tokenizer": tokenizer} if config.stop_strings else {}
    if cut := sum(len(ids) + wanted > most for ids in encoded):
        warn(
            "%d of %d prompts leave room for fewer than %d new tokens in the %d that the model was made for",
            *(cut, len(encoded), wanted, most),
        )
    found: dict[int, str] = {}
    with in_one_thread(adapted), configured(adapted, config), answering(model, adapter) as generate, torch.no_grad():
        for batch in _batches([len(ids) for ids in encoded], batch_size, most - wanted, reads_padding(config)):
            inputs = padded([encoded[number] for number in batch], config.pad_token_id, adapted.device)
            length = inputs["input_ids"].shape[1]
            config.max_new_tokens = int(min(wanted, most - length))
            output = generate(**inputs, **more, **({} if streamer is None else {"streamer": streamer}))
            for number, ids in zip(batch, output[:, length:].tolist(), strict=True):
                stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
                found[number] = tokenizer.decode(ids[:stop], skip_special_tokens=True)
    return [found[number] for number in range(len(encoded))]


def _batches(lengths: Sequence[int], size: int, room: float, alike: bool) -> Iterator[list[int]]:
    """The numbers of the prompts of each batch, the longest first: what does not fit in memory fails at once.

    Args:
        room: prompts that are longer have room for fewer new tokens, and run with those of their own length.
        alike: all do.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        longest = lengths[batch[0]] if batch else 0
        if batch and (len(batch) == size or ((alike or longest > room) and lengths[number] != longest)):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """Token ids and attention mask (B, L), int64, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in prompts])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


# Which adapter


@contextlib.contextmanager
def answering(model: Any, adapter: str | None = None) -> Iterator[Callable[..., Tensor]]:
    """``generate`` with an adapter: see ``complete``."""
    adapted = _adapted(model)
    if adapter is None:
        if isinstance(model, MultiTask):
            raise ValueError(f"adapter: expected one of {', '.join((*model.names, NO_ADAPTER))}, got no name")
        yield model.generate if isinstance(model, RoutedTask) else adapted.generate
    elif adapter == NO_ADAPTER and adapter not in adapted.adapters:
        with adapted.disable_adapter():
            yield adapted.generate
    else:
        before = adapted.active_adapters()
        if adapter not in adapted.adapters:
            raise ValueError(f"adapter: expected one of {', '.join((*adapted.adapters, NO_ADAPTER))}, got {adapter!r}")
        adapted.set_adapter(adapter)
        try:
            yield adapted.generate
        finally:
            if before:
                adapted.set_adapter(before)


def _adapted(model: Any) -> Any:
    """The ``LlamaAdapter``."""
    return model.model if isinstance(model, Task) else model


# Of a saved run


def check_generates(saved: SavedRun, adapter: str | None = None) -> None:
    """Raise ``ValueError`` for a run that generates no text, or one of several adapters of which none is chosen."""
    if (task := saved.config.task) != "causal-lm":
        raise ValueError(
            f"{saved.directory}: expected a run of causal-lm, got one of {task}, which answers by `adapterkern predict`"
        )
    if issubclass(saved.kind, MultiTask):
        names = MultiTask.saved_names(saved.directory)
        if adapter not in (*names, NO_ADAPTER):
            raise ValueError(
                f"adapter: expected one of {', '.join(names)} of {saved.directory}, or {NO_ADAPTER} for the bare "
                f"backbone; got {'no name' if adapter is None else repr(adapter)}"
            )


def learned_chats(saved: SavedRun, adapter: str | None = None) -> bool | None:
    """Whether a run has learned chat messages; None where nothing says it, as of an adapter alone.

    Args:
        adapter: of a run of several tasks the one that is asked. Default: all of them.
    """
    folder, task = saved.directory.absolute(), adapter if issubclass(saved.kind, MultiTask) else None
    # A folder of the user's may have such a name, too
    while not (folder / DATA_NAME).exists() and folder.parent.name in (CHECKPOINTS, "tasks"):
        task = folder.name if folder.parent.name == "tasks" else task
        folder = folder.parent.parent
    try:
        summaries: Mapping[str, Any] = read_json(folder / DATA_NAME)
    except FileNotFoundError:
        return None
    of_train = {name: s for name, s in summaries.items() if name.split()[:1] == ["train"] and isinstance(s, dict)}
    name = f"train {task}"
    counts = [s.get("chats") for s in ([of_train[name]] if name in of_train else of_train.values())]
    return None if None in counts or not counts else any(counts)
