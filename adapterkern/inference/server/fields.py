"""The fields of a request's body. One that is not supported is refused by name, never ignored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from adapterkern import checks
from adapterkern.inference.generate import encode
from adapterkern.inference.server.batching import Sampling
from adapterkern.inference.server.models import Models
from adapterkern.training.data.chat import Conversation, Message
from adapterkern.training.data.rows import HALF_A_PAIR, is_unicode

ROLES = ("system", "developer", "user", "assistant")
_COMMON = ("model", "temperature", "top_p", "seed", "max_tokens", "stop", "stream", "stream_options")
# Nothing that is generated depends on them.
_NO_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Fields that are not supported, and the values with which they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
_GREEDY = 1e-5  # a lower temperature is greedy: logits divided by it may be no fp32 numbers
_OF_COMPLETIONS = 16  # max_tokens of a completion that does not say, as in OpenAI's
_AFTER = 8  # tokens of a prompt that a completion is decoded after


class RefusedError(Exception):
    """A request that is answered by an error.

    Args:
        status: HTTP's.
        param: the field, if it is one's fault.
        code: OpenAI's, where it has one.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Prompt(NamedTuple):
    """Tokens to answer, those that the answer's text follows on, and the most tokens of the answer."""

    ids: list[int]
    after: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Asked:
    """What a request asks for. ``ends`` as of ``batching.Request``."""

    model: str
    adapter: str
    prompts: list[Prompt]
    ends: frozenset[int]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_chat(body: object, models: Models, limit: int) -> Asked:
    """A body of /v1/chat/completions. ``limit``: the most ``max_tokens``. Raises ``RefusedError``."""
    fields = _fields(body, ("messages", "max_completion_tokens"), models)
    if not getattr(models.tokenizer, "chat_template", None):
        raise RefusedError(
            400,
            "messages: the tokenizer has no chat template; use /v1/completions with a prompt",
            "messages",
        )
    messages = _messages(fields.get("messages"))
    ids = _encoded(models, Conversation(messages, [], None), "messages")
    name = "max_tokens"
    if "max_completion_tokens" in fields:
        name = "max_completion_tokens"
        if fields.get("max_tokens", fields[name]) != fields[name]:
            raise RefusedError(400, "max_tokens: expected none beside max_completion_tokens, got both", "max_tokens")
    prompts = [Prompt(ids, [], _max_tokens(fields, name, len(ids), models.context, limit, limit))]
    return _asked(fields, prompts, models, models.chat_ends)


def read_completion(body: object, models: Models, limit: int) -> Asked:
    """A body of /v1/completions. Arguments as of ``read_chat``."""
    fields = _fields(body, ("prompt",), models)
    given = fields.get("prompt")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise RefusedError(400, f"prompt: expected a non-empty string or a list of them, got {given!r:.80}", "prompt")
    prompts = []
    for text in texts:
        _check_unicode("prompt", text)
        ids = _encoded(models, text, "prompt")
        tokens = _max_tokens(fields, "max_tokens", len(ids), models.context, limit, min(limit, _OF_COMPLETIONS))
        prompts.append(Prompt(ids, ids[-_AFTER:], tokens))
    return _asked(fields, prompts, models, models.ends)


def _fields(body: object, own: tuple[str, ...], models: Models) -> dict[str, Any]:
    """Those that are not null, and known."""
    if not isinstance(body, dict):
        raise RefusedError(400, f"expected a JSON object, got {type(body).__name__}")
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name in _NEUTRAL:
            neutral = _NEUTRAL[name]
            if not any(type(value) is type(one) and value == one for one in neutral):
                raise RefusedError(
                    400, f"{name}: not supported; expected none or {neutral[0]!r}, got {value!r:.80}", name
                )
        elif name not in (*own, *_COMMON, *_NO_EFFECT):
            raise RefusedError(400, f"{name:.80}: not supported; expected no such field", name)
    model = fields.get("model")
    if not isinstance(model, str):
        raise RefusedError(400, f"model: expected the name of a model, got {model!r:.80}", "model")
    if model not in models.adapters:
        known = ", ".join(models.adapters)
        raise RefusedError(404, f"model: expected one of {known}, got {model!r:.80}", "model", "model_not_found")
    return fields


def _asked(
    fields: Mapping[str, Any],
    prompts: list[Prompt],
    models: Models,
    ends: frozenset[int],
) -> Asked:
    temperature = _checked("temperature", lambda name: checks.number(name, fields.get(name, 1.0), "[0, 2]"))
    top_p = _checked("top_p", lambda name: checks.number(name, fields.get(name, 1.0), "(0, 1]"))
    seed = fields.get("seed")
    if seed is not None:
        _checked("seed", lambda name: checks.integer(name, seed, 0, 2**63 - 1))
    temperature = 0.0 if temperature < _GREEDY else float(temperature)
    stream = _checked("stream", lambda name: checks.flag(name, fields.get(name, False)))
    return Asked(
        model=fields["model"],
        adapter=models.adapters[fields["model"]],
        prompts=prompts,
        ends=ends,
        sampling=Sampling(temperature, float(top_p), seed),
        stop=_stop(fields.get("stop", [])),
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options"), stream),
    )


def _checked(name: str, check: Callable[[str], Any]) -> Any:
    try:
        return check(name)
    except (TypeError, ValueError) as error:
        raise RefusedError(400, str(error), name) from error


def _encoded(models: Models, prompt: str | Conversation, param: str) -> list[int]:
    try:
        return encode(models.tokenizer, prompt)
    except ValueError as error:
        raise RefusedError(400, f"{param}: {error}", param) from error


def _max_tokens(fields: Mapping[str, Any], name: str, prompt: int, context: float, limit: int, default: int) -> int:
    room = int(min(context - prompt, limit))
    if room < 1:
        raise RefusedError(
            400,
            f"the prompt has {prompt} tokens: expected fewer than the model's context of {context:g}",
            "messages" if "messages" in fields else "prompt",
            "context_length_exceeded",
        )
    if name not in fields:
        return min(default, room)
    tokens: int = _checked(name, lambda name: checks.integer(name, fields[name], 1, limit))
    if tokens > room:
        raise RefusedError(
            400,
            f"{name}: expected at most {room}, since the prompt has {prompt} of the model's context of {context:g} "
            f"tokens, got {tokens}",
            name,
            "context_length_exceeded",
        )
    return tokens


def _stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise RefusedError(400, f"stop: expected a non-empty string or a list of them, got {value!r:.80}", "stop")
    return tuple(stops)


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not stream or not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise RefusedError(
            400, f"stream_options: expected include_usage alone, beside stream, got {options!r:.80}", "stream_options"
        )
    value = options.get("include_usage", False)
    return bool(_checked("stream_options", lambda name: checks.flag(f"{name}.include_usage", value)))


# Messages


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RefusedError(400, f"messages: expected a non-empty list, got {value!r:.80}", "messages")
    return [_message(f"messages[{number}]", message) for number, message in enumerate(value)]


def _message(where: str, value: object) -> Message:
    message = {key: found for key, found in value.items() if found is not None} if isinstance(value, dict) else {}
    if message.get("role") not in ROLES:
        expected = f"an object with a role of {', '.join(ROLES)}"
        raise RefusedError(400, f"{where}: expected {expected}, got {value!r:.80}", where)
    if unknown := sorted(message.keys() - {"role", "content"}):
        raise RefusedError(400, f"{where}.{unknown[0]:.80}: not supported; expected role and content", where)
    content = message.get("content")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RefusedError(400, f"{where}.content: expected a string or parts of type text, got {content!r:.80}", where)
    _check_unicode(where, content)
    return {"role": message["role"], "content": content}


def _is_text(part: object) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def _check_unicode(where: str, text: str) -> None:
    if not is_unicode(text):
        raise RefusedError(400, f"{where}: the text has {HALF_A_PAIR}", where.partition("[")[0])
