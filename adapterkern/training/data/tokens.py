"""Tokenization: a text is tokenized as a whole, a prompt and its completion as one text.

Which tokens are learned is decided afterwards, by the characters that each one covers (fast tokenizers), or by what the
tokens have in common with those of the prompt alone. A token that covers both prompt and completion is learned.

What the tokenizer puts around a text (``<s> ... </s>``) is put there once: a text that a chat template has rendered may
begin with it already. The end-of-text token, which a language model must learn, stands at the end and nowhere else.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

_PROBES = ("a", "0", "the")  # texts without special tokens, of which a tokenizer makes at least one token


class Tokens(NamedTuple):
    """A tokenized text."""

    ids: list[int]
    prompt: int  # how many of them belong to the prompt, what the tokenizer puts before it included
    shared: bool  # whether the prompt alone is tokenized otherwise
    empty: bool  # whether the text, or what follows the prompt, has no token


def tokenize(tokenizer: Any, texts: Sequence[tuple[str, str]], *, end: bool = False) -> list[Tokens]:
    """Tokenize pairs of a prompt, "" for none, and the text that follows it.

    Args:
        tokenizer: a transformers tokenizer.
        end: add an end-of-text token where the text does not end with one.
    """
    fast = bool(getattr(tokenizer, "is_fast", False)) and any(prompt for prompt, _ in texts)
    before, after = _around(tokenizer)
    final = getattr(tokenizer, "eos_token_id", None) if end else None
    encoded = _encode(tokenizer, [prompt + text for prompt, text in texts], offsets=fast)
    alone = _prompts(tokenizer, texts)
    made = []
    for number, (prompt, text) in enumerate(texts):
        ids: list[int] = list(encoded["input_ids"][number])
        mine, split, shared = alone[prompt], 0, False
        if prompt:
            common = next((i for i, pair in enumerate(zip(mine, ids, strict=False)) if len(set(pair)) > 1), None)
            common = min(len(mine), len(ids)) if common is None else common
            shared = common < len(mine)
            split = common
            if fast:
                ends = [stop for _, stop in encoded["offset_mapping"][number]]
                split = next((i for i, stop in enumerate(ends) if stop > len(prompt)), len(ids))
            if shared and ids[split : split + 1] == [getattr(tokenizer, "unk_token_id", None)]:
                # A tokenizer of whole words does not know what prompt and completion make together.
                ids, split, shared = mine + _encode(tokenizer, [text])["input_ids"][0], len(mine), False
        first = [] if ids[: len(before)] == before else before
        last = [] if ids[len(ids) - len(after) :] == after else after
        whole = [*first, *ids, *last]
        if final is not None and whole[-1:] != [final]:
            whole.append(final)
        made.append(Tokens(whole, len(first) + split if prompt else 0, shared, split == len(ids)))
    return made


class Parts(NamedTuple):
    """A tokenized text, and parts of it."""

    ids: list[int]
    parts: list[tuple[int, int]]  # from one token to another
    broken: int | None  # a border of a part, as the number of characters before it, that is within a token


def tokenize_parts(tokenizer: Any, texts: Sequence[str], parts: Sequence[Sequence[tuple[int, int]]]) -> list[Parts]:
    """Tokenize texts as they are, nothing put around them, and find parts of them.

    A border is where the tokens end that the text before it has by itself, as a model reads it that is to go on there.

    Args:
        parts: of each text, from one character to another.
    """
    if not texts:
        return []
    fast, added = bool(getattr(tokenizer, "is_fast", False)), set(added_tokens(tokenizer).values())
    encoded = _encode(tokenizer, list(texts), offsets=fast)
    made = []
    for number, (text, borders) in enumerate(zip(texts, parts, strict=True)):
        ids = list(encoded["input_ids"][number])
        stops = [stop for _, stop in encoded["offset_mapping"][number]] if fast else []
        places: dict[int, int] = {}
        broken = None
        for border in dict.fromkeys(border for part in borders for border in part):
            place = bisect_right(stops, border)
            # Nothing is joined across an added token, nor across the end of white space that is a token's end.
            apart = place and stops[place - 1] == border and (ids[place - 1] in added or text[border - 1].isspace())
            if not apart and border < len(text):
                alone = list(_encode(tokenizer, [text[:border]])["input_ids"][0])
                place = len(alone)
                broken = border if ids[:place] != alone and broken is None else broken
            places[border] = place if border < len(text) else len(ids)
        made.append(Parts(ids, [(places[start], places[end]) for start, end in borders], broken))
    return made


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokenizer's special and added tokens, and their ids. No other text is joined with one of them to a token."""
    special = getattr(tokenizer, "all_special_tokens", [])
    return dict(zip(special, getattr(tokenizer, "all_special_ids", []), strict=True)) | tokenizer.get_added_vocab()


def _encode(tokenizer: Any, texts: list[str], offsets: bool = False) -> Any:
    # verbose: a text longer than the model's context is cut and counted here.
    more = {"return_offsets_mapping": True} if offsets else {}
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **more)


def _prompts(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> dict[str, list[int]]:
    """The tokens of each different prompt by itself."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in texts if prompt))
    found = _encode(tokenizer, prompts)["input_ids"] if prompts else []
    return {"": []} | {prompt: list(ids) for prompt, ids in zip(prompts, found, strict=True)}


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    for probe in _PROBES:
        plain, full = (list(tokenizer(probe, add_special_tokens=special)["input_ids"]) for special in (False, True))
        for start in range(len(full) - len(plain) + 1 if plain else 0):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
    raise ValueError(
        f"tokenizer: expected one that puts special tokens around a text, got {type(tokenizer).__name__}, "
        f"which makes {full} of {probe!r}, and {plain} without special tokens"
    )
