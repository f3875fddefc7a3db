"""Chat messages: the text that the tokenizer's chat template makes of a conversation, and what of it is learned.

The assistant's turns are learned, each with the token that ends it. Where they are, the template's own marks say
(``{% generation %}``), if it has them. Else a turn begins where the text of the messages before it ends, with the
generation prompt, and ends where the text of the messages up to it ends. Both must be how the whole text begins. A
template that renders a turn otherwise once others follow it, as Qwen 3's, would have the model learn what it never sees
when it generates: each turn is then learned from a text of its own, which ends with it. White space after the token
that ends a turn is not learned: nothing generates it.

The text is tokenized as the template has made it, as ``apply_chat_template`` does: nothing is put around it.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adapterkern.training.data.given import IGNORE, Text
from adapterkern.training.data.rows import (
    HALF_A_PAIR,
    BadRows,
    JsonObject,
    Row,
    check_keys,
    is_unicode,
    kind,
    listed,
    problem,
    shown,
    warn,
)
from adapterkern.training.data.tokens import added_tokens, tokenize_parts

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT = {"human": "user", "gpt": "assistant", "model": "assistant"} | {role: role for role in ROLES}
_WEIGHT = "weight"  # OpenAI's: 0 on an assistant's message that is not to be learned

Message = dict[str, Any]


class Conversation(NamedTuple):
    """Messages as a chat template takes them."""

    messages: list[Message]
    turns: list[int]  # the numbers of the messages to learn
    tools: list[Any] | None


# From rows


def listed_messages(value: Any) -> list[Any] | None:
    """The items of a list, a tuple or an array; None of anything else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else None


def is_sharegpt(messages: list[Any] | None) -> bool:
    """Whether the first message has ShareGPT's keys."""
    first = messages[0] if messages else None
    return isinstance(first, Mapping) and "from" in first and "role" not in first


def messages_of(row: Row, column: str) -> list[Message]:
    """The messages in a column, without the keys in which they have None.

    Raises:
        ValueError: it has no list of them, or one has another role or no content.
    """
    found = listed_messages(row.values.get(column))
    if not found:
        raise ValueError(problem(row, column, "a non-empty list of messages"))
    return [_message(row, value, f"column {shown(column)}[{number}]") for number, value in enumerate(found)]


def _message(row: Row, value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected an object with role and content, got {kind(row, value)}")
    check_keys(value, where)
    message = {key: found for key, found in value.items() if found is not None}
    names, roles = ("role", "content"), {role: role for role in ROLES}
    if is_sharegpt([message]):
        names, roles = ("from", "value"), _SHAREGPT
    role, content = (message.pop(name, None) for name in names)
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"{where}: expected {names[0]} to be one of {listed(roles)}, got {shown(role)}")
    if message.get(_WEIGHT, 1) not in (0, 1):
        raise ValueError(f"{where}: expected {_WEIGHT} to be 0 or 1, got {shown(message[_WEIGHT])}")
    if content is None and roles[role] == "assistant" and message.get("tool_calls"):
        return {"role": roles[role], **message}
    if not isinstance(content, str):
        raise ValueError(f"{where}: expected {names[1]} to be a string, got {kind(row, content)}")
    if roles[role] in ("user", "assistant") and not content.strip() and not message.get("tool_calls"):
        raise ValueError(f"{where}: expected {names[1]} to be a non-empty string, got an empty one")
    if not is_unicode(content):
        raise ValueError(f"{where}: {names[1]} has {HALF_A_PAIR}")
    return {"role": roles[role], "content": content, **message}


def tools_of(row: Row) -> list[Any] | None:
    """The tools in a row's column of that name: a list, or one that is written as JSON. None for none.

    Raises:
        ValueError: it has something else.
    """
    value = row.values.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value, object_pairs_hook=JsonObject)
        except ValueError as error:
            raise ValueError(f"column 'tools': expected a list of objects, or one as JSON: {error}") from error
    tools = listed_messages(value) if value else []
    check_keys(tools, "column 'tools'")
    if tools is None or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"column 'tools': expected a list of objects, or one as JSON, got {shown(value)}")
    return tools or None


def conversation(messages: list[Message], first: int = 0, tools: list[Any] | None = None) -> Conversation:
    """The assistant's messages from number ``first`` on are learned, but for those whose weight is 0.

    Raises:
        ValueError: there is none.
    """
    turns = [n for n, m in enumerate(messages) if n >= first and m["role"] == "assistant" and m.get(_WEIGHT, 1)]
    if not turns:
        where = " in the completion" if first else ""
        raise ValueError(f"expected a message of the assistant to learn{where}, got {listed(_roles(messages[first:]))}")
    return Conversation(_unweighted(messages), turns, tools)


def question(messages: list[Message], tools: list[Any] | None = None) -> Conversation:
    """The messages as one asks for the next of the assistant: without one that answers the last question already.

    Raises:
        ValueError: nothing is left to answer.
    """
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise ValueError(f"expected a message to answer, got {listed(_roles(messages))}")
    return Conversation(_unweighted(asked), [], tools)


def _unweighted(messages: Sequence[Message]) -> list[Message]:
    return [{k: v for k, v in message.items() if k != _WEIGHT} for message in messages]


def _roles(messages: Sequence[Message]) -> list[str]:
    return list(dict.fromkeys(message["role"] for message in messages))


# To tokens


def tokenize_chats(chats: Mapping[str, Conversation], tokenizer: Any, bad: BadRows) -> dict[str, list[Text]]:
    """The texts of the conversations, and what is learned of each, by the place of their row. Bad ones go to ``bad``.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not chats:
        return {}
    check_template(tokenizer, f"rows of chat messages ({next(iter(chats))})")
    template = _Template(tokenizer)
    rendered: list[tuple[str, str, list[tuple[int, int]]]] = []
    for place, chat in chats.items():
        try:
            rendered += [(place, *one) for one in template.render(place, chat)]
        except ValueError as error:
            bad.add(place, str(error))
    template.warn(bad.source, len({place for place, *_ in rendered}))
    made: dict[str, list[Text]] = {}
    broken = set()
    tokenized = tokenize_parts(tokenizer, [text for _, text, _ in rendered], [parts for _, _, parts in rendered])
    for (place, text, _), found in zip(rendered, tokenized, strict=True):
        if found.broken is not None:
            around = text[max(found.broken - 20, 0) : found.broken + 20]
            bad.add(
                place,
                f"a token covers the border of an assistant's turn, in {shown(around)}, so the model would not learn "
                "what it sees when it generates. Expected no white space in the message there",
            )
            broken.add(place)
        labels = np.full(len(found.ids), IGNORE, dtype=np.int64)
        ids = np.array(found.ids, dtype=np.int64)
        for start, end in found.parts:
            labels[start:end] = ids[start:end]
        made.setdefault(place, []).append(Text(ids, labels))
    return {place: texts for place, texts in made.items() if place not in broken}


class _RenderedOtherwiseError(ValueError):
    """The template renders a turn, or what is before it, otherwise once other messages follow."""


def check_template(tokenizer: Any, of: str) -> None:
    """Raise ``ValueError`` if the tokenizer has no chat template for what is named."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer: expected one with a chat template for {of}, got none; "
            "set tokenizer.chat_template, or add a file chat_template.jinja to the tokenizer's folder"
        )


def render(tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None = None, *, prompt: bool) -> str:
    """The text that the chat template makes of messages. ``prompt``: with the generation prompt.

    Raises:
        ValueError: the template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # jinja2's errors, and whatever the template's own expressions raise
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    if not is_unicode(text):
        raise ValueError(f"the messages have {HALF_A_PAIR}")
    return text


class _Template:
    """A tokenizer's chat template, and what is to be said of it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ends = tuple(added_tokens(tokenizer))
        self._prompted: set[str] = set()  # roles after which a generation prompt is there, or none is needed
        self._seen: set[str] = set()  # keys of messages, and the tools
        self._unread: list[str] = []  # those of them that change no text
        self._changed: list[str] = []  # places of rows
        self._endless: list[str] = []
        self._apart: list[str] = []

    def render(self, place: str, chat: Conversation) -> list[tuple[str, list[tuple[int, int]]]]:
        """The text of a conversation, and the characters to learn, from one to another; several where turns need them.

        Raises:
            ValueError: the template refuses the messages, or it cannot be known what to learn.
        """
        try:
            return [self._render(place, chat)]
        except _RenderedOtherwiseError:
            alone = [chat._replace(messages=chat.messages[: turn + 1], turns=[turn]) for turn in chat.turns]
            if alone == [chat]:
                raise
            found = [self._render(place, turn) for turn in alone]
            self._apart.append(place)
            return found

    def _render(self, place: str, chat: Conversation) -> tuple[str, list[tuple[int, int]]]:
        text = self._text(chat, len(chat.messages))
        every = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
        parts = (self._marked(chat, text) if chat.turns == every else None) or self._by_turns(chat, text)
        parts = [(start, self._end(text, start, end)) for start, end in parts]
        self._note(place, chat, text, parts)
        return text, parts

    def _text(self, chat: Conversation, count: int, *more: Message, prompt: bool = False) -> str:
        """The first ``count`` messages and ``more`` as a text. ``prompt``: with the generation prompt."""
        return render(self.tokenizer, [*chat.messages[:count], *more], chat.tools, prompt=prompt)

    def _marked(self, chat: Conversation, text: str) -> list[tuple[int, int]] | None:
        """What the template marks as generated; None if it has no marks."""
        source = self.tokenizer.get_chat_template(tools=chat.tools)
        if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source):
            return None
        encoded = _characters().apply_chat_template(
            chat.messages,
            tools=chat.tools,
            chat_template=source,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        mask = np.array(encoded["assistant_masks"], dtype=np.int8)
        if len(mask) != len(text) or not mask.any():
            raise ValueError("the chat template marks no token of it as generated ({% generation %})")
        edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    def _by_turns(self, chat: Conversation, text: str) -> list[tuple[int, int]]:
        parts = []
        for turn in chat.turns:
            where = f"messages[{turn}]: the chat template"
            if not turn:
                raise ValueError(f"{where} has no generation prompt for it: expected a message before the assistant's")
            before = self._text(chat, turn, prompt=True)
            until = text if turn + 1 == len(chat.messages) else self._text(chat, turn + 1)
            if not until.startswith(before) or until == before:
                raise ValueError(
                    f"{where} begins it otherwise than with the generation prompt, or leaves it out, so the model "
                    "would not learn what it is to generate. Expected a template that has both, or {% generation %}"
                )
            end = self._end_within(text, until, len(before))
            if end is None:
                raise _RenderedOtherwiseError(
                    f"{where} renders it, or what is before it, otherwise once other messages follow, so the model "
                    "would learn what it never sees when it generates. Expected a template with {% generation %}"
                )
            self._check_prompt(chat, turn, before)
            parts.append((len(before), end))
        return parts

    def _end_within(self, text: str, until: str, start: int) -> int | None:
        """Where a turn ends in the whole text that begins at ``start`` and, with nothing after it, ends ``until``.

        Special tokens that a template puts at the end of every conversation may be missing; None if more is.
        """
        if text.startswith(until):
            return len(until)
        if not self.ends:
            return None
        same = _same(text, until)
        special = re.compile("|".join(map(re.escape, self.ends)))
        end = max((start + found.end() for found in special.finditer(text[start:same])), default=start)
        return None if end == start or special.sub("", until[end:]).strip() else end

    def _check_prompt(self, chat: Conversation, turn: int, before: str) -> None:
        """Raise ``ValueError`` if no generation prompt is there where the template begins a turn with something."""
        role = chat.messages[turn - 1]["role"]
        if role in self._prompted:
            return
        if before == self._text(chat, turn):
            probes = [self._text(chat, turn, {"role": "assistant", "content": content}) for content in "ab"]
            if header := probes[0][len(before) : _same(*probes)].strip():
                raise ValueError(
                    f"messages[{turn}]: expected a chat template with a generation prompt (add_generation_prompt), "
                    f"got one without, which begins the assistant's turn with {shown(header)}"
                )
        self._prompted.add(role)

    def _end(self, text: str, start: int, end: int) -> int:
        """Where a part ends without white space after the token that ends a turn."""
        kept = text[start:end].rstrip()
        return start + len(kept) if kept.endswith(self.ends) else end

    # What is not learned

    def _note(self, place: str, chat: Conversation, text: str, parts: list[tuple[int, int]]) -> None:
        for key in dict.fromkeys(key for message in chat.messages for key in message):
            if key not in ("role", "content"):
                bare = [{k: v for k, v in message.items() if k != key} for message in chat.messages]
                self._note_unread(f"{shown(key)} of messages", place, chat._replace(messages=bare), text)
        if chat.tools:
            self._note_unread("'tools'", place, chat._replace(tools=None), text)
        contents = [content.strip() for message in chat.messages if (content := message.get("content"))]
        there = [content in text for content in contents]
        if contents and not any(there):
            raise ValueError("the chat template renders no message's content as it is: is it for images and texts?")
        if not all(there):
            self._changed.append(place)
        if not text[slice(*parts[-1])].endswith(self.ends):
            self._endless.append(place)

    def _note_unread(self, name: str, place: str, without: Conversation, text: str) -> None:
        """Whether the template reads something: once, by leaving it out."""
        if name in self._seen:
            return
        self._seen.add(name)
        try:
            if self._text(without, len(without.messages)) == text:
                self._unread.append(f"{name} ({place})")
        except ValueError:
            pass  # it is missed

    def warn(self, source: str, count: int) -> None:
        """Name what is not learned."""
        if self._unread:
            warn("%s: not used by the chat template: %s", source, ", ".join(self._unread))
        for places, what in (
            (self._changed, "messages that the chat template leaves out or changes"),
            (
                self._apart,
                "turns that are rendered otherwise once others follow: each is learned from a text of its own",
            ),
            (self._endless, "no special token at the end of the assistant's turn, so nothing teaches where to stop"),
        ):
            if places:
                warn("%s: %d of %d conversations have %s (%s)", source, len(set(places)), count, what, places[0])


def _same(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    shorter = min(len(a), len(b))
    return next((n for n in range(shorter) if a[n] != b[n]), shorter)


@functools.cache
def _characters() -> Any:
    """A tokenizer of which each character is a token, whose mask is one of characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core)
