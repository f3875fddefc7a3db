"""The text of an answer, piece by piece: whole characters, up to a stop string."""

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"  # what bytes decode to that are no character, or not yet


class Text:
    """Tokens to text. The pieces together are the text of all tokens, without special ones.

    A tokenizer may decode a token otherwise at the beginning than after others, so each is decoded after those of the
    piece before it (as vLLM and tokenizers' ``DecodeStream`` do, of which the latter drops what is left at the end).

    Args:
        tokenizer: a transformers tokenizer.
        before: tokens that the text follows on, such as the prompt's last ones; they are not part of it.
        stop: strings before the first of which the text ends.

    Attributes:
        stopped: whether a stop string has come. What is pushed from then on is not part of the text.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(before)
        self._start, self._read = 0, len(self._tokens)  # decoded: from the first, and already given up to the second
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What a further token adds to the text, as far as it is certain."""
        self._tokens.append(token)
        whole = self._decode(len(self._tokens))
        if whole.endswith(_BROKEN):
            return ""
        return self._until_stop(self._given(whole), final=False)

    def flush(self) -> str:
        """The rest, once no token follows."""
        return self._until_stop(self._given(self._decode(len(self._tokens))), final=True)

    def _decode(self, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[self._start : end], skip_special_tokens=True)
        return text

    def _given(self, whole: str) -> str:
        new = whole[len(self._decode(self._read)) :]
        if new:  # a special token gives none, and what follows it would be decoded as at the beginning
            self._start, self._read = self._read, len(self._tokens)
        return new

    def _until_stop(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if final:
            return text
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
