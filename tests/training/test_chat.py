"""Rows of chat messages are learned through the tokenizer's chat template: the assistant's turns and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from adapterkern.training import DataError, load_examples
from adapterkern.training.data.examples import unpacked
from adapterkern.training.data.summary import summarize
from tests.support import tiny_qa, tiny_run
from tests.support.tiny_chat import (
    BARE,
    CHATML,
    CLOSED,
    CONFIG,
    FORGETS,
    NO_SYSTEM,
    PLAIN,
    PROMPT,
    STRIPS,
    load,
    marked,
    said,
    shown,
    tokenizer,
)

LONG = tiny_run.quiet(task="causal-lm", max_length=256)

# What is learned


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "S ? w1 E S ? w2 E S ? [w3] [w4] [E] S ? w5 E S ? [w6] [E]"),
        (marked("<|im_end|>", "\n"), "S ? w1 E S ? w2 E S ? [w3] [w4] [E] S ? w5 E S ? [w6] [E]"),
        (marked("<|im_end|>\n", ""), "S ? w1 E S ? w2 E S ? [w3] [w4] [E] S ? w5 E S ? [w6] [E]"),
        (marked("", "<|im_end|>\n"), "S ? w1 E S ? w2 E S ? [w3] [w4] E S ? w5 E S ? [w6] E"),
        (STRIPS, "S ? w1 E S ? w2 E S ? [w3] [w4] [E] S ? w5 E S ? [w6] [E]"),
        (CLOSED, "<s> S ? w1 E S ? w2 E S ? [w3] [w4] [E] S ? w5 E S ? [w6] [E] [</s>]"),
        (PLAIN, "? ? w1 ? ? w2 ? ? [w3] [w4] ? ? w5 ? ? [w6]"),
    ],
    ids=["ChatML", "marks", "marks with the newline", "marks without the end", "strips", "closes", "plain"],
)
def test_every_turn_of_the_assistant_is_learned_with_its_end(template: str, expected: str) -> None:
    example = load({"messages": said("w2 ", " w3 w4", "w5", "w6", system="w1")}, template)
    assert shown(example) == expected


def test_turns_without_a_generation_prompt_that_need_none() -> None:
    example = load({"messages": said("w1", "w2 w3", "w4", "w5")}, BARE)
    assert shown(example) == "<s> S w1 E [w2] [w3] [</s>] S w4 E [w5] [</s>]"


def test_a_question_at_the_end_is_not_learned() -> None:
    assert shown(load({"messages": said("w1", "w2", "w3")})) == "S ? w1 E S ? [w2] [E] S ? w3 E"


def test_prompt_and_completion_of_messages_learn_the_completion() -> None:
    row = {"prompt": said("w1", "w2", "w3"), "completion": [{"role": "assistant", "content": "w4"}]}
    expected = "S ? w1 E S ? w2 E S ? w3 E S ? [w4] [E]"
    for template in (CHATML, marked("<|im_end|>", "\n")):
        assert shown(load(row, template)) == expected


def test_a_message_of_weight_0_is_not_learned() -> None:
    messages = said("w1", "w2", "w3", "w4")
    messages[1]["weight"] = 0
    messages[3]["weight"] = 1
    expected = "S ? w1 E S ? w2 E S ? w3 E S ? [w4] [E]"
    for template in (CHATML, marked("<|im_end|>", "\n")):
        assert shown(load({"messages": messages}, template)) == expected


class Slow:
    """A tokenizer that gives no offsets."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __call__(self, texts: Any, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.fast(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("template", [CHATML, marked("<|im_end|>\n", "")], ids=["by turns", "marks"])
def test_the_bytes_of_a_text(slow: bool, template: str) -> None:
    """Characters of several tokens, tokens of several characters, and white space that is a token."""
    fast = tokenizer(template, tiny_qa.byte_level_tokenizer())
    messages = said("Who wrote it?", "The “first” 🦙 of\n\nthem  ", " \n", "é")
    (messages[2]["content"],) = ("And then?\n",)
    (example,), _ = load_examples([{"messages": messages}], LONG, Slow(fast) if slow else fast)
    assert example.input_ids.tolist() == fast.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert fast.decode(example.targets.tolist()) == "The “first” 🦙 of\n\nthem  <|im_end|>é<|im_end|>"


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}"], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("template", [CHATML, marked("<|im_end|>", "\n")], ids=["by turns", "marks"])
def test_the_tokens_are_the_template_s_own(begin: str, template: str) -> None:
    """What the tokenizer puts around other texts is not put there again."""
    made = tokenizer(begin + template)
    ids = [(token, tiny_run.VOCABULARY[token]) for token in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    assert made("w1")["input_ids"] == [1, 4, 2]
    row = {"messages": said("w1", "w2"), "tools": [{"name": "w3"}]}
    (example,), _ = load_examples([row], CONFIG, made)
    assert shown(example) == ("<s> " if begin else "") + "<|tools|> w3 S ? w1 E S ? [w2] [E]"


def test_templates_of_known_models() -> None:
    """By turns, TRL's copies of their templates mark what TRL's own, which have marks, do."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    messages = said("Who are you?", "A model.", "Of whom?", "I do not know that.")
    for name in ("cohere", "gemma3", "lfm2", "llama3", "phi3", "qwen2_5_vl", "qwen3_instruct_2507"):
        learned = []
        for file in (f"{name}.jinja", f"{name}_training.jinja"):
            made = tiny_qa.byte_level_tokenizer()
            ends = ["<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>"]
            made.add_special_tokens({"additional_special_tokens": ends})
            made.chat_template = (folder / file).read_text()
            (example,), _ = load_examples([{"messages": messages}], LONG, made)
            learned.append((example.input_ids.tolist(), example.positions.tolist()))
        assert learned[0] == learned[1], name
        assert len(learned[0][1]) > 20


def test_length_and_summary() -> None:
    row = {"messages": said("w1", "w2 w3", "w4", "w5")}
    examples = [load(row), load(row, max_length=7), load(row, max_length=13)]
    assert [shown(example) for example in examples] == [
        "S ? w1 E S ? [w2] [w3] [E] S ? w4 E S ? [w5] [E]",
        "S ? w1 E S ? [w2]",
        "S ? w1 E S ? [w2] [w3] [E] S ? w4 E",
    ]
    summary = summarize(examples, 64)
    assert (summary.tokens, summary.learned, summary.cut) == (17 + 7 + 13, 5 + 1 + 3, 2)
    with pytest.raises(DataError, match="row 0: no token to learn: the prompt has 6 and max_length is 6"):
        load(row, max_length=6)


# Templates that are refused


def refuses(row: dict[str, Any], template: str | None, message: str, tmp_path: Path) -> None:
    """The second line of a file is bad; the first is not."""
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": said("w1", "w2")}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"1 bad row:\n  \S*chat\.jsonl:2: {message}"):
        load_examples(file, CONFIG, tokenizer(template))


@pytest.mark.parametrize("begin", ["", "<|tools|>"], ids=["a word", "a special token"])
def test_a_template_that_renders_turns_otherwise_later(begin: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each turn is learned as it is generated. The special token that a turn begins with is no end of it."""
    messages = said("w1", "w8 w9 w2", "w3", "w4")
    template = FORGETS.replace("'\n' + content", f"'\n{begin}' + content")
    (packed,), _ = load_examples([{"messages": messages}], CONFIG, tokenizer(template))
    texts = [shown(example) for example in unpacked([packed])]
    first, second = (text.replace("[<|tools|>] ", "").replace("<|tools|> ", "") for text in texts)
    assert texts[0].count("[<|tools|>]") == bool(begin)
    assert first == "S ? w1 E S ? [w8] [w9] [w2] [E]"
    assert second == "S ? w1 E S ? w2 E S ? w3 E S ? [w4] [E]"
    assert "rendered otherwise once others follow: each is learned from a text of its own (row 0)" in caplog.text


def test_turns_that_are_learned_from_texts_of_their_own_have_their_weights() -> None:
    messages = said("w1", "w8 w9 w2", "w3", "w4", "w5", "w6")
    messages[3]["weight"] = 0
    (packed,), _ = load_examples([{"messages": messages}], CONFIG, tokenizer(FORGETS))
    assert [shown(example) for example in unpacked([packed])] == [
        "S ? w1 E S ? [w8] [w9] [w2] [E]",
        "S ? w1 E S ? w2 E S ? w3 E S ? w4 E S ? w5 E S ? [w6] [E]",
    ]


def test_a_turn_that_is_rendered_otherwise_even_alone(tmp_path: Path) -> None:
    """The question is changed once its answer follows."""
    refuses(
        {"messages": said("w8 w9 w1", "w2")},
        FORGETS,
        r"messages\[1\]: the chat template begins it otherwise than with the generation prompt",
        tmp_path,
    )


def test_marks_say_what_is_learned_of_turns_that_are_rendered_otherwise_later(caplog: pytest.LogCaptureFixture) -> None:
    content = "{% generation %}{{ content + '<|im_end|>\n' }}{% endgeneration %}"
    template = FORGETS.replace(
        " + content + '<|im_end|>\n' }}",
        " }}{% if message.role == 'assistant' %}" + content + "{% else %}{{ content + '<|im_end|>\n' }}{% endif %}",
    )
    example = load({"messages": said("w1", "w8 w9 w2", "w3", "w4")}, template)
    assert shown(example) == "S ? w1 E S ? [w2] [E] S ? w3 E S ? [w4] [E]"
    assert "1 of 1 conversations have messages that the chat template leaves out or changes (row 0)" in caplog.text


def test_a_template_whose_generation_prompt_is_not_how_a_turn_begins(tmp_path: Path) -> None:
    refuses(
        {"messages": said("w1", "w2", "w3", "w4")},
        CHATML.replace(
            PROMPT, "{% if add_generation_prompt and messages | length > 1 %}{{ 'w5' }}{% endif %}" + PROMPT
        ),
        r"messages\[3\]: the chat template begins it otherwise than with the generation prompt",
        tmp_path,
    )


def test_a_template_without_a_generation_prompt() -> None:
    with pytest.raises(
        DataError,
        match=r"row 0: messages\[1\]: expected a chat template with a generation prompt \(add_generation_prompt\), got "
        r"one without, which begins the assistant's turn with '<\|im_start\|>assistant'\n",
    ):
        load({"messages": said("w1", "w2")}, CHATML.replace(PROMPT, ""))


def test_a_template_that_refuses_a_role(tmp_path: Path) -> None:
    refuses(
        {"messages": said("w1", "w2", system="w3")},
        NO_SYSTEM,
        "the chat template refuses the messages: no system role\n",
        tmp_path,
    )


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(DataError, match="row 0: the chat template refuses the messages: Unexpected end of template"):
        load({"messages": said("w1", "w2")}, "{% if messages %}")


def test_a_template_for_other_messages() -> None:
    with pytest.raises(DataError, match="row 0: the chat template renders no message's content as it is"):
        load({"messages": said("w1", "w2")}, CHATML.replace("message.content", "'w3'"))


def test_marks_on_nothing() -> None:
    template = marked("<|im_end|>", "\n").replace("message.role == 'assistant'", "message.role == 'tool'")
    with pytest.raises(DataError, match=r"row 0: the chat template marks no token .* \({% generation %}\)\n"):
        load({"messages": said("w1", "w2")}, template)


def test_an_assistant_that_begins() -> None:
    messages = said("w1", "w2")[1:]
    with pytest.raises(DataError, match=r"messages\[0\]: .* expected a message before the assistant's\n"):
        load({"messages": messages})
    assert shown(load({"messages": messages}, marked("<|im_end|>", "\n"))) == "S ? [w2] [E]"


@pytest.mark.parametrize("slow", [False, True])
def test_a_token_of_both_prompt_and_turn(slow: bool) -> None:
    """A space belongs to the word after it: "assistant: " and "the" are tokenized otherwise than together."""
    made = tokenizer(PLAIN.replace("'assistant:'", "'assistant: '"), tiny_qa.byte_level_tokenizer())
    assert made.tokenize("a the")[1] == "Ġthe"
    with pytest.raises(
        DataError, match=r"row 0: a token covers the border of an assistant's turn, in '.*assistant: the"
    ):
        load_examples([{"messages": said("Who?", "the")}], LONG, Slow(made) if slow else made)


def test_no_chat_template() -> None:
    message = (
        r"^tokenizer: expected one with a chat template for rows of chat messages \(row 0\), got none; set tokenizer\."
        r"chat_template, or add a file chat_template\.jinja to the tokenizer's folder$"
    )
    for row in ({"messages": said("w1", "w2")}, {"conversations": [{"from": "gpt", "value": "w1"}]}):
        with pytest.raises(ValueError, match=message):
            load(row, None)
    with pytest.raises(TypeError, match="tokenizer: expected a transformers tokenizer"):
        load_examples([{"messages": said("w1", "w2")}], CONFIG)


# What is named


def test_tools_are_the_template_s(caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": said("w1", "w2"), "tools": [{"name": "w3"}]}
    for tools in (row["tools"], json.dumps(row["tools"])):
        assert shown(load(row | {"tools": tools})) == "<|tools|> w3 S ? w1 E S ? [w2] [E]"
    assert not caplog.messages
    assert shown(load(row | {"tools": None}, STRIPS)) == "S ? w1 E S ? [w2] [E]"
    load(row, BARE)
    assert caplog.messages == ["data: not used by the chat template: 'tools' (row 0)"]


@pytest.mark.parametrize(
    ("messages", "more", "message"),
    [
        (
            '{"role": "assistant", "content": "w2", "content": "w3"}',
            "",
            r"column 'messages'\[1\]: key 'content' is",
        ),
        ('{"role": "assistant", "content": "w2", "x": [{"a": 1, "a": 2}]}', "", r"column 'messages'\[1\]: key 'a' is"),
        (
            '{"role": "assistant", "content": "w2"}',
            '[{"name": "w8", "name": "w9"}]',
            "column 'tools': key 'name' is",
        ),
        (
            '{"role": "assistant", "content": "w2"}',
            json.dumps('[{"a": 1, "a": 2}]'),
            "column 'tools': key 'a' is",
        ),
    ],
)
def test_a_key_that_a_message_has_twice(messages: str, more: str, message: str, tmp_path: Path) -> None:
    """One of the two values would be learned, and the other lost in silence."""
    for name, form in (("a.jsonl", "%s"), ("a.json", "[%s]")):
        row = f'{{"messages": [{{"role": "user", "content": "w1"}}, {messages}], "tools": {more or "null"}}}'
        (tmp_path / name).write_text(form % row)
        with pytest.raises(DataError, match=message):
            load_examples(tmp_path / name, CONFIG, tokenizer())


def test_calls_of_tools() -> None:
    messages = said("w1", "w2", "w3", "w4")
    messages[1] = {"role": "assistant", "content": None, "tool_calls": [{"name": "w5"}]}
    messages[2]["role"] = "tool"
    template = CHATML.replace("message.content", "(message.content or message.tool_calls[0].name)")
    assert shown(load({"messages": messages}, template)) == "S ? w1 E S ? [w5] [E] S ? w3 E S ? [w4] [E]"


def test_what_the_template_does_not_read(caplog: pytest.LogCaptureFixture) -> None:
    messages = said("w1", "w2", "w3", "w4")
    messages[0]["name"] = "w5"
    messages[1]["reasoning_content"] = None
    row = {"messages": messages, "source": "web", "text": None}
    expected = "S ? w1 E S ? [w2] [E] S ? w3 E S ? [w4] [E]"
    assert shown(load(row, CHATML)) == expected
    assert caplog.messages == [
        "data: columns not used: 'source', 'text'",
        "data: not used by the chat template: 'name' of messages (row 0)",
    ]
    caplog.clear()
    load(row, CHATML.replace("message.content", "message.content ~ message.name"))
    assert caplog.messages == ["data: columns not used: 'source', 'text'"]


def test_a_message_that_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    template = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    assert shown(load({"messages": said("w1", "w2", system="w3")}, template)) == "S ? w1 E S ? [w2] [E]"
    what = "messages that the chat template leaves out or changes"
    assert caplog.messages == [f"data: 1 of 1 conversations have {what} (row 0)"]


@pytest.mark.parametrize("template", [PLAIN, marked("", "<|im_end|>\n")], ids=["plain", "marks"])
def test_turns_that_do_not_end(template: str, caplog: pytest.LogCaptureFixture) -> None:
    load_examples([{"messages": said("w1", "w2")}] * 2, CONFIG, tokenizer(template))
    what = "no special token at the end of the assistant's turn, so nothing teaches where to stop"
    assert caplog.messages == [f"data: 2 of 2 conversations have {what} (row 0)"]
