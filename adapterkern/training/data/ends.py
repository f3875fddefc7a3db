"""Which tokens end a text that a model generates."""

from typing import Any

from adapterkern.training.data.chat import render
from adapterkern.training.data.tokens import added_tokens

_PROBE = "4711"  # an answer, of which a template changes nothing


def end_tokens(config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of a ``GenerationConfig``."""
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [token for token in dict.fromkeys((tokenizer.eos_token_id, *known)) if token is not None]


def turn_end(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends the assistant's turn; None if it has none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        _, found, after = render(tokenizer, messages, prompt=False).rpartition(_PROBE)
    except ValueError:
        return None
    after = after.lstrip()
    tokens = added_tokens(tokenizer)
    first = max((token for token in tokens if after.startswith(token)), key=len, default="")
    return tokens[first] if found and first else None
