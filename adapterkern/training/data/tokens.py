"""Tokenization: a text is tokenized as a whole, a prompt and its completion as one text.

Which tokens are learned is decided afterwards, by the characters that each one covers (fast tokenizers), or by what the
tokens have in common with those of the prompt alone. A token that covers both prompt and completion is learned.

What the tokenizer puts around a text (``<s> ... </s>``) is put there once: a text that a chat template has rendered may
begin with it already. The end-of-text token, which a language model must learn, stands at the end and nowhere else.
"""

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
