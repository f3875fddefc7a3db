"""A conversation with one or several adapters on one backbone, in a terminal or by a script of lines.

With a chat template the model sees the conversation so far. Without one, each message is a prompt by itself, as in a
training on prompts and completions.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adapterkern.files import replacing
from adapterkern.inference.generate import NO_ADAPTER, check_generates, continued, encode
from adapterkern.inference.runs import Opened, SavedRun, tokens_digest
from adapterkern.inference.settings import GenerationSettings
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.recipes.routing.task import RoutedTask
from adapterkern.training.data.chat import Conversation, Message
from adapterkern.training.data.padding import context_length
from adapterkern.training.data.rows import HALF_A_PAIR, is_unicode, warn

HELP = """\
/adapter          the adapters
/adapter NAME     answer with this one from now on; none is the bare backbone
/off              show the bare backbone's answer beside each answer; the conversation goes on with the adapter's
/on               end that
/system TEXT      the system message from now on; without TEXT none
/clear            begin a new conversation
/save FILE        write the conversation as a row that `adapterkern train` reads
/help             this
/quit             end, as Ctrl-D does; Ctrl-C stops an answer
A line with a space before its / is a message."""
_BARE = "backbone"


class Voice(NamedTuple):
    """What answers: a model, and the adapter of it."""

    model: Any
    adapter: str | None


def run_names(sources: Sequence[str | os.PathLike[str]], runs: Sequence[SavedRun]) -> list[list[str]]:
    """The names of each run's adapters: its folder's, or of a run of several tasks the tasks'.

    Raises:
        ValueError: a run generates no text, is routed and not the first, or has a name of another.
    """
    names: list[list[str]] = []
    for source, run in zip(sources, runs, strict=True):
        check_generates(run, NO_ADAPTER)
        if names and not (
            issubclass(run.kind, MultiTask) or (run.config.train_adapters and run.kind is not RoutedTask)
        ):
            got = "experts with a router, which can be the first" if run.kind is RoutedTask else "a run without any"
            raise ValueError(f"{source}: expected adapters to load beside those of {sources[0]}, got {got}")
        several = issubclass(run.kind, MultiTask)
        names.append(MultiTask.saved_names(run.directory) if several else [Path(os.path.abspath(source)).name])
    flat = [name for found in names for name in found]
    if twice := [name for name in flat if flat.count(name) > 1 or name == NO_ADAPTER]:
        raise ValueError(
            f"{sources[-1]}: expected adapters of different names, got {twice[0]!r} twice; rename a folder"
        )
    return names


def voices(opened: Opened, runs: Sequence[SavedRun], names: Sequence[Sequence[str]]) -> dict[str, Voice]:
    """Each adapter by its name, those of further runs loaded onto the backbone of the first, which is ``opened``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an adapter is damaged, or was trained on another backbone.
    """
    task, model = opened.task, opened.task.model
    if isinstance(task, MultiTask):
        found = {name: Voice(task, name) for name in names[0]}
    else:
        found = {names[0][0]: Voice(task, None)}
    for run, of_run in zip(runs[1:], names[1:], strict=True):
        known = None if run.sources is None else run.sources.tokenizer
        if known not in (None, tokens_digest(opened.tokenizer)):
            warn("%s: was trained with other tokens than %s", run.directory, runs[0].directory)
        for name in of_run:
            folder = MultiTask.folder(run.directory, name) if issubclass(run.kind, MultiTask) else run.directory
            inside = f"run-{len(found)}"  # a folder may have a name that no adapter can have
            model.load_adapter(folder, inside, strict=True)
            found[name] = Voice(model, inside)
    return found


class Chat:
    """A conversation.

    Args:
        voices: from ``voices``; the first answers.
        templated: the tokenizer's chat template renders the conversation; else each message is a prompt by itself.
        show: prints an answer's name, ``note`` what is to be known about the conversation.
    """

    def __init__(
        self,
        voices: dict[str, Voice],
        tokenizer: Any,
        settings: GenerationSettings,
        *,
        templated: bool,
        show: Callable[[str], object],
        note: Callable[[str], object],
    ) -> None:
        self.voices, self.tokenizer, self.settings, self.templated = voices, tokenizer, settings, templated
        self.show, self.note = show, note
        self.name = next(iter(voices))
        self.beside = False  # the backbone's answers, too
        self.system = ""
        self.messages: list[Message] = []  # by user and assistant in turn
        self.start = 0  # the first that the model still sees
        first = voices[self.name].model
        self.bare = Voice(first, NO_ADAPTER)
        self.most = context_length(getattr(first, "model", first).config)

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line, until they or the user end."""
        for line in lines:
            if line.startswith("/"):
                if line.split()[0] in ("/quit", "/exit"):
                    return
                self._command(*line[1:].partition(" ")[::2])
            elif line.strip():
                self.say(line)

    def say(self, text: str) -> None:
        """Answer a message: with the adapter, and beside it with the backbone after ``/off``."""
        self.messages.append({"role": "user", "content": text})
        speakers = [(self.name, self.voices.get(self.name, self.bare))]
        if self.beside and self.name != NO_ADAPTER:
            speakers.append((_BARE, self.bare))
        try:
            ids = self._prompt()
        except ValueError as error:
            self.messages.pop()
            self.note(str(error))
            return
        answers = []
        for name, voice in speakers:
            if len(speakers) > 1:
                self.show(name)
            answer, stopped = self._answer(ids, voice)
            answers.append(answer)
            if stopped:
                self.note("stopped")
                break
        if answers[0].strip():
            self.messages.append({"role": "assistant", "content": answers[0]})
        else:
            self.messages.pop()  # a template may refuse two messages of a user in a row
            self.note("no answer, so the message is not kept")

    def _prompt(self) -> list[int]:
        """The tokens of the conversation, without its oldest turns if they leave no room for an answer."""
        if not self.templated:
            return encode(self.tokenizer, self.messages[-1]["content"], self.bare.model)
        last, start = len(self.messages) - 1, self.start
        room = self.most - min(self.settings.new_tokens, self.most // 2)
        first = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            seen = Conversation([*first, *self.messages[start:]], [], None)
            ids = encode(self.tokenizer, seen, None)
            if len(ids) <= room or start == last:
                break
            start += 2
        if len(ids) >= self.most:
            encode(self.tokenizer, seen, self.bare.model)  # which says so
        if start > self.start:
            self.note(
                f"the oldest {start} messages are left out from here on: the model was made for {self.most:g} tokens"
            )
            self.start = start
        return ids

    def _answer(self, ids: list[int], voice: Voice) -> tuple[str, bool]:
        """The answer, printed as it comes, and whether Ctrl-C has stopped it."""
        streamer = _streamer(self.tokenizer) if self.settings.streams else None
        try:
            (text,) = continued(
                voice.model,
                self.tokenizer,
                [ids],
                self.settings,
                adapter=voice.adapter,
                chat=self.templated,
                streamer=streamer,
            )
        except KeyboardInterrupt:
            print(flush=True)
            return "" if streamer is None else "".join(streamer.parts), True
        if streamer is None:
            print(text, flush=True)
        return text, False

    # Commands

    def _command(self, name: str, text: str) -> None:
        text = text.strip()
        known = {"adapter": self._adapter, "system": self._system, "save": self._save}
        known |= {"off": self._off, "on": self._on, "clear": self._clear, "help": lambda _: print(HELP, flush=True)}
        if name not in known:
            self.note(f"/{name}: no such command; /help names them. A message that begins with / needs a space before")
        elif text and name in ("off", "on", "clear", "help"):
            self.note(f"/{name}: expected nothing after it, got {text!r}")
        else:
            known[name](text)

    def _adapter(self, name: str) -> None:
        if not name:
            for each in (*self.voices, NO_ADAPTER):
                print(f"{'*' if each == self.name else ' '} {each}", flush=True)
        elif name in (*self.voices, NO_ADAPTER):
            self.name = name
            self.note(f"{name} answers")
        else:
            self.note(f"/adapter: expected one of {', '.join((*self.voices, NO_ADAPTER))}, got {name!r}")

    def _off(self, _: str) -> None:
        self.beside = True
        self.note("each answer is given twice: with the adapter, and by the bare backbone, which reads the same turns")

    def _on(self, _: str) -> None:
        self.beside = False
        self.note("answers are given with the adapter alone")

    def _clear(self, _: str) -> None:
        self.messages, self.start = [], 0
        self.note("a new conversation")

    def _system(self, text: str) -> None:
        if not self.templated:
            self.note("/system: has no effect: each message is a prompt by itself")
            return
        if not is_unicode(text):
            self.note(f"/system: the message has {HALF_A_PAIR}")
            return
        self.system = text
        self.note("the system message is set" if text else "no system message")

    def _save(self, name: str) -> None:
        if not name or not self.messages:
            self.note("/save: expected " + ("a conversation, got none yet" if name else "the name of a file"))
            return
        try:
            path = Path(name).expanduser()
        except RuntimeError as error:  # there is no such user
            self.note(f"/save: {error}")
            return
        if path.exists():
            self.note(f"/save: {path} exists; name another file")
            return
        rows: list[dict[str, Any]]
        if self.templated:
            first = [{"role": "system", "content": self.system}] if self.system else []
            rows = [{"messages": [*first, *self.messages]}]
        else:
            contents = [message["content"] for message in self.messages]
            pairs = zip(contents[::2], contents[1::2], strict=True)
            rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        try:
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            self.note(f"/save: {error}")
            return
        self.note(f"saved in {path}")


def typed_lines() -> Iterator[str]:
    """The lines of stdin, after a prompt and with a history if it is a terminal; Ctrl-C at the prompt ends them."""
    if sys.stdin is None or not sys.stdin.isatty():
        for line in sys.stdin or ():
            yield line.rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 from here on, `input` has a history
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        yield line


def _streamer(tokenizer: Any) -> Any:
    """transformers' ``TextStreamer``, which keeps what it has printed in ``parts``."""
    from transformers import TextStreamer

    class Kept(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.parts: list[str] = []

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.parts.append(text)
            super().on_finalized_text(text, stream_end)

    return Kept()
