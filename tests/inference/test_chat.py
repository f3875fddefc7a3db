"""A conversation: what the model sees of it, who answers, and what stops an answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import adapterkern as ak
from adapterkern.inference.chat import Chat, Voice
from adapterkern.inference.generate import complete
from adapterkern.inference.settings import GenerationSettings
from adapterkern.model.llama import LlamaAdapter
from tests.support import tiny_chat, tiny_run

# Answers of four words: no end, no special token and none without a word
FOUR = GenerationSettings(max_new_tokens=4, other={"suppress_tokens": [0, 1, 2, *range(103, 128)]})


def model() -> LlamaAdapter:
    made = tiny_run.model()
    made.add_adapter("b", ak.AdapterConfig(adapter_dim=4, layers=[3]))
    for name in ("default", "b"):
        for p in made.adapter_parameters(name):
            nn.init.normal_(p, std=1.0)  # answers differ in their first word
    return made.eval()


class Talk:
    """A conversation with two adapters, and what it prints beside the answers."""

    def __init__(self, templated: bool = True, settings: GenerationSettings = FOUR) -> None:
        self.model, self.notes, self.names = model(), list[str](), list[str]()
        self.tokenizer = tiny_chat.tokenizer() if templated else tiny_run.tokenizer()
        voices = {"a": Voice(self.model, "default"), "b": Voice(self.model, "b")}
        shown: dict[str, Any] = {"show": self.names.append, "note": self.notes.append}
        self.chat = Chat(voices, self.tokenizer, settings, templated=templated, **shown)

    def run(self, *lines: str) -> None:
        self.chat.run(iter(lines))

    def answer(self, messages: Any, adapter: str = "default") -> str:
        (text,) = complete(self.model, self.tokenizer, [messages], FOUR, adapter=adapter)
        return text


def test_each_answer_sees_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk()
    talk.run("w5 w6", "", "/system w9", "w7", "/quit", "w8")
    messages = talk.chat.messages
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"] == talk.answer(messages[:1])
    assert messages[3]["content"] == talk.answer([{"role": "system", "content": "w9"}, *messages[:3]])
    assert messages[3]["content"] != talk.answer(messages[:3])
    assert capsys.readouterr().out == f"{messages[1]['content']}\n{messages[3]['content']}\n"
    talk.run("/clear", "/system", "w7")
    assert talk.chat.messages[1]["content"] == talk.answer([{"role": "user", "content": "w7"}])


def test_adapters_change_live_and_the_backbone_stands_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk()
    question = [{"role": "user", "content": "w5 w6"}]
    expected = {name: talk.answer(question, name) for name in ("default", "b", "none")}
    assert len(set(expected.values())) == 3
    talk.run("/adapter b", "/off", "w5 w6")
    assert talk.names == ["b", "backbone"]
    assert capsys.readouterr().out == f"{expected['b']}\n{expected['none']}\n"
    assert talk.chat.messages[1]["content"] == expected["b"]  # the conversation goes on with it
    talk.run("/clear", "/on", "/adapter none", "w5 w6", "/clear", "/adapter a", "w5 w6")
    assert talk.names == ["b", "backbone"]
    assert capsys.readouterr().out == f"{expected['none']}\n{expected['default']}\n"
    talk.run("/adapter", "/adapter c")
    assert capsys.readouterr().out == "* a\n  b\n  none\n"
    assert talk.notes[-1] == "/adapter: expected one of a, b, none, got 'c'"


def test_without_a_template_each_message_is_a_prompt() -> None:
    talk = Talk(templated=False)
    talk.run("w5", "w6 w7", "/system w9")
    assert talk.chat.messages[3]["content"] == talk.answer("w6 w7")
    assert talk.notes == ["/system: has no effect: each message is a prompt by itself"]


def test_the_oldest_turns_are_left_out() -> None:
    """Of 64 tokens 4 are for the answer; a message is a start, its role, its words and an end."""
    talk = Talk()
    words = " ".join(f"w{i}" for i in range(20))
    talk.run("/system w1", words, words)
    assert talk.notes == ["the system message is set"]
    talk.run(words)
    assert "the oldest 2 messages are left out from here on: the model was made for 64 tokens" in talk.notes[-1]
    messages = talk.chat.messages
    assert len(messages) == 6
    assert messages[5]["content"] == talk.answer([{"role": "system", "content": "w1"}, *messages[2:5]])
    talk.run(" ".join([words] * 4))
    assert "expected a prompt of fewer than the model's 64 tokens, got one of 8" in talk.notes[-1]
    assert len(messages) == 6  # it is not kept
    talk.run("/clear", "w5")
    assert messages is not talk.chat.messages
    assert talk.chat.messages[1]["content"] == talk.answer(
        [{"role": "system", "content": "w1"}, {"role": "user", "content": "w5"}]
    )


@pytest.mark.parametrize("after", [1, 3])
def test_ctrl_c_stops_the_answer_alone(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there by then is kept, and the next message is answered."""
    talk = Talk()
    whole = talk.answer([{"role": "user", "content": "w5"}])
    shown: list[str] = []

    def stop(self: Any, text: str, stream_end: bool = False) -> None:
        shown.append(text)
        if len(shown) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr("transformers.TextStreamer.on_finalized_text", stop)
    talk.run("w5")
    assert talk.notes[0] == "stopped"
    kept = "".join(shown)
    assert whole.startswith(kept)
    assert len(kept) < len(whole)
    assert [m["content"] for m in talk.chat.messages] == (["w5", kept] if kept.strip() else [])
    talk.run("/clear", "w5")
    assert talk.chat.messages[1]["content"] == whole


@pytest.mark.parametrize("templated", [True, False])
def test_a_conversation_is_saved_as_rows_to_train_on(templated: bool, tmp_path: Path) -> None:
    talk = Talk(templated)
    path = tmp_path / "chat.jsonl"
    talk.run("/save", f"/save {path}", "w5", "w6", f"/save {path}", f"/save {path}")
    assert talk.notes[:2] == [
        "/save: expected the name of a file",
        "/save: expected a conversation, got none yet",
    ]
    assert talk.notes[2:] == [f"saved in {path}", f"/save: {path} exists; name another file"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    messages = talk.chat.messages
    pairs = [{"prompt": a["content"], "completion": b["content"]} for a, b in (messages[:2], messages[2:])]
    assert rows == ([{"messages": messages}] if templated else pairs)
    config = tiny_chat.CONFIG
    assert len(ak.training.load_examples(path, config, talk.tokenizer)[0]) == len(rows)


def test_what_is_not_understood_is_said() -> None:
    talk = Talk()
    talk.run("/adaptor b", "/off now", "/")
    assert talk.notes[0].startswith("/adaptor: no such command; /help names them.")
    assert talk.notes[1] == "/off: expected nothing after it, got 'now'"
    assert talk.notes[2].startswith("/: no such command")
    assert not talk.chat.messages
    talk.run(" /w5")
    assert talk.chat.messages[0]["content"] == " /w5"


def test_a_template_that_refuses_says_so() -> None:
    talk = Talk()
    talk.tokenizer.chat_template = tiny_chat.NO_SYSTEM
    talk.run("/system w9", "w5")
    assert talk.notes[-1].startswith("the chat template refuses the messages: no system role")
    assert not talk.chat.messages


def test_what_cannot_be_read_or_written_does_not_end_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for templated in (True, False):
        talk = Talk(templated)
        talk.run("w5", "w6 \udcff", "/save ~nobody-here/no/chat.jsonl", f"/save {tmp_path}/\0")
        half, first, second = talk.notes
        assert "have half a surrogate pair" in half or "has half a surrogate pair" in half
        assert first.startswith("/save: ")
        assert second.startswith("/save: ")
        assert [m["content"] for m in talk.chat.messages][::2] == ["w5"]
    assert not list(tmp_path.iterdir())
    talk = Talk()
    talk.run("/system \udcff", "w5")
    assert talk.notes == ["/system: the message has half a surrogate pair, which is not a character"]
    assert len(talk.chat.messages) == 2


def test_the_room_for_an_answer_is_what_was_asked_for() -> None:
    """However it was asked for: 64 tokens are enough for three messages and an answer of four."""
    words = " ".join(f"w{i}" for i in range(13))
    notes = []
    for settings in (FOUR, GenerationSettings(other={**FOUR.other, "max_new_tokens": 4})):
        talk = Talk(settings=settings)
        talk.run(words, words)
        notes.append(talk.notes)
    assert notes == [[], []]


def test_beams_are_shown_at_their_end(capsys: pytest.CaptureFixture[str]) -> None:
    settings = GenerationSettings(max_new_tokens=4, num_beams=2)
    talk = Talk(settings=settings)
    talk.run("w5")
    question = [{"role": "user", "content": "w5"}]
    (text,) = complete(talk.model, talk.tokenizer, [question], settings, adapter="default")
    assert capsys.readouterr().out == text + "\n"
