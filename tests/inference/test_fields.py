"""A request's body: what is read, and that everything else is refused by name."""

from typing import Any

import pytest

from adapterkern.inference.server.batching import Sampling
from adapterkern.inference.server.fields import Asked, RefusedError, read_chat, read_completion
from adapterkern.inference.server.models import Models, find_models, load_models
from tests.support import tiny_chat, tiny_served

CHAT = {"model": "run0", "messages": [{"role": "user", "content": "w1 w2"}]}
COMPLETION = {"model": "run0", "prompt": "w1 w2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("fields")
    tiny_served.save_runs(folder, 1)
    return load_models(find_models([str(folder / "run0")]), model=folder / "llama", dtype="fp32")


def chat(models: Models, **fields: Any) -> Asked:
    return read_chat(CHAT | fields, models, 100)


def completion(models: Models, **fields: Any) -> Asked:
    return read_completion(COMPLETION | fields, models, 100)


def refused(read: Any, models: Models, **fields: Any) -> RefusedError:
    with pytest.raises(RefusedError) as info:
        read(models, **fields)
    return info.value


def test_a_chat_is_what_the_template_makes_of_it(models: Models) -> None:
    asked = chat(models)
    text = tiny_chat.tokenizer().apply_chat_template(CHAT["messages"], tokenize=False, add_generation_prompt=True)
    ids = tiny_chat.tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert asked.prompts == [(ids, [], 100)]
    assert (asked.adapter, asked.sampling, asked.stop, asked.ends) == ("default", Sampling(), (), models.chat_ends)
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    assert chat(models, messages=[{"role": "user", "content": parts, "name": None}]) == asked


def test_completions_take_one_prompt_or_several(models: Models) -> None:
    ids = [tiny_chat.tokenizer()(text)["input_ids"] for text in ("w1 w2", "w3 w4 w5")]
    assert completion(models).prompts == [(ids[0], ids[0], 16)]
    asked = completion(models, prompt=["w1 w2", "w3 w4 w5"], max_tokens=7)
    assert asked.prompts == [(one, one, 7) for one in ids]
    assert asked.ends == models.ends


def test_what_is_asked_for(models: Models) -> None:
    asked = completion(
        models, temperature=0.5, top_p=0.9, seed=3, stop="w9", stream=True, stream_options={"include_usage": True}
    )
    assert asked.sampling == Sampling(0.5, 0.9, 3)
    assert (asked.stop, asked.stream, asked.include_usage) == (("w9",), True, True)
    assert completion(models, stop=["a", "b"]).stop == ("a", "b")
    assert completion(models, temperature=0, stream=False).sampling.temperature == 0
    assert completion(models, temperature=1e-30).sampling.temperature == 0
    assert chat(models, max_completion_tokens=5).prompts[0][2] == 5
    assert chat(models, max_completion_tokens=5, max_tokens=5).prompts[0][2] == 5


def test_what_asks_for_nothing_is_taken(models: Models) -> None:
    nothing = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "tools": [], "top_k": None}
    assert chat(models, **nothing, logit_bias=None, user="me", metadata={"a": "b"}) == chat(models)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("best_of", 2),
        ("frequency_penalty", 0.1),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("logprobs", True),
        ("logprobs", 0),
        ("top_logprobs", 2),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("top_k", 5),
        ("temprature", 1),
        ("functions", []),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("seed", 1.5),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["a", 1]),
        ("stream", 1),
        ("stream_options", {"include_usage": True}),  # without stream
        ("max_tokens", 0),
        ("max_tokens", 101),
        ("max_tokens", 5.0),
    ],
)
@pytest.mark.parametrize("read", [chat, completion])
def test_refused_by_name(read: Any, name: str, value: Any, models: Models) -> None:
    error = refused(read, models, **{name: value})
    assert (error.status, error.param) == (400, name)
    assert str(error).startswith(f"{name}: ")


def test_a_field_of_the_other_kind_is_refused(models: Models) -> None:
    assert refused(chat, models, prompt="w1").param == "prompt"
    assert refused(completion, models, messages=CHAT["messages"]).param == "messages"
    assert refused(completion, models, max_completion_tokens=3).param == "max_completion_tokens"
    assert refused(chat, models, max_completion_tokens=3, max_tokens=4).param == "max_tokens"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "w1",
        ["w1"],
        [{"role": "tool", "content": "w1"}],
        [{"role": "user"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "w1", "name": "Ann"}],
        [{"role": "assistant", "content": "w1", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_messages_that_are_refused(messages: Any, models: Models) -> None:
    error = refused(chat, models, messages=messages)
    assert error.status == 400
    assert str(error).startswith("messages")


@pytest.mark.parametrize("prompt", [None, "", [], ["w1", ""], [1, 2], [[1, 2]], "\ud800"])
def test_prompts_that_are_refused(prompt: Any, models: Models) -> None:
    error = refused(completion, models, prompt=prompt)
    assert (error.status, error.param) == (400, "prompt")


def test_no_more_than_the_context(models: Models) -> None:
    room = 40
    prompt = " ".join(["w1"] * (tiny_served.CONTEXT - room))
    assert completion(models, prompt=prompt, max_tokens=room).prompts[0][2] == room
    assert chat(models, messages=[{"role": "user", "content": prompt}]).prompts[0][2] == room - 5  # the template's
    error = refused(completion, models, prompt=prompt, max_tokens=room + 1)
    assert (error.status, error.param, error.code) == (400, "max_tokens", "context_length_exceeded")
    assert f"max_tokens: expected at most {room}, since the prompt has {tiny_served.CONTEXT - room} of" in str(error)
    error = refused(completion, models, prompt=" ".join(["w1"] * tiny_served.CONTEXT))
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")


def test_a_model_that_is_not_there(models: Models) -> None:
    error = refused(chat, models, model="run7")
    assert (error.status, error.code) == (404, "model_not_found")
    assert "expected one of run0, __base__, got 'run7'" in str(error)
    assert refused(chat, models, model=None).status == 400


@pytest.mark.parametrize("body", [[], "x", 1])
def test_a_body_that_is_no_object(body: Any, models: Models) -> None:
    with pytest.raises(RefusedError, match="expected a JSON object, got"):
        read_chat(body, models, 100)


def test_a_template_that_is_missing_or_refuses(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.tokenizer, "chat_template", tiny_chat.NO_SYSTEM)
    error = refused(chat, models, messages=[{"role": "system", "content": "w1"}])
    assert "messages: the chat template refuses the messages: no system role" in str(error)
    monkeypatch.setattr(models.tokenizer, "chat_template", None)
    error = refused(chat, models)
    assert (error.status, error.param) == (400, "messages")
    assert "messages: the tokenizer has no chat template" in str(error)
    assert completion(models).prompts
