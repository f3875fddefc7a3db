"""Which columns of causal-lm rows are read, and as what; what is wrong with rows of chat messages."""

import logging
from typing import Any

import pytest

from adapterkern.training import DataError, load_examples
from adapterkern.training.data.examples import check_data
from tests.support import tiny_qa, tiny_run
from tests.support.tiny_chat import CONFIG, NO_SYSTEM, load, said, shown, tokenizer


def test_sharegpt(caplog: pytest.LogCaptureFixture) -> None:
    values = [("system", "w1"), ("human", "w2"), ("gpt", "w3"), ("user", "w4"), ("model", "w5")]
    row = {"conversations": [{"from": role, "value": value} for role, value in values], "id": "a"}
    assert shown(load(row)) == "S ? w1 E S ? w2 E S ? [w3] [E] S ? w4 E S ? [w5] [E]"
    assert caplog.messages == [
        "data: column not used: 'id'",
        "data: rows of ShareGPT's form (from, value); read as chat messages",
    ]
    assert shown(load({"conversations": said("w1", "w2")})) == "S ? w1 E S ? [w2] [E]"


ALPACA = {"instruction": "w1", "input": "w2", "output": "w3"}
SAID = "data: rows of Alpaca's form (instruction, input, output); read as "


def test_alpaca_with_a_chat_template(caplog: pytest.LogCaptureFixture) -> None:
    assert shown(load(ALPACA)) == "S ? w1 w2 E S ? [w3] [E]"
    assert caplog.messages == [SAID + "chat messages"]
    assert shown(load(ALPACA | {"input": None})) == "S ? w1 E S ? [w3] [E]"


def test_alpaca_without_a_chat_template(caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer(None, tiny_qa.byte_level_tokenizer())
    rows = [ALPACA, ALPACA | {"input": ""}, {"instruction": "w4", "output": "w5"}]
    examples, _ = load_examples(rows, tiny_run.quiet(task="causal-lm", max_length=512), made)
    assert caplog.messages == [SAID + "prompt and completion"]
    task = "Below is an instruction that describes a task"
    answer = "Write a response that appropriately completes the request."
    assert [made.decode(example.input_ids.tolist()) for example in examples] == [
        f"{task}, paired with an input that provides further context. {answer}\n\n### Instruction:\nw1\n\n"
        "### Input:\nw2\n\n### Response:\nw3</s>",
        f"{task}. {answer}\n\n### Instruction:\nw1\n\n### Response:\nw3</s>",
        f"{task}. {answer}\n\n### Instruction:\nw4\n\n### Response:\nw5</s>",
    ]
    assert [made.decode(example.targets.tolist()) for example in examples] == ["w3</s>", "w3</s>", "w5</s>"]


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"dialog": said("w1", "w2")}, {"text_column": "dialog"}, "S ? w1 E S ? [w2] [E]"),
        (ALPACA, {"prompt_column": "instruction", "completion_column": "output"}, "w1 [w3] [</s>]"),
        (ALPACA | {"messages": said("w4", "w5")}, {"text_column": "input"}, "w2 [</s>]"),
        (ALPACA | {"messages": said("w4", "w5")}, {}, "S ? w4 E S ? [w5] [E]"),
        ({"text": "w1 w2", "messages": said("w4", "w5")}, {}, "w1 [w2] [</s>]"),
        ({"prompt": "w1", "messages": said("w4", "w5")}, {}, "S ? w4 E S ? [w5] [E]"),
    ],
    ids=["a column of messages", "instruction and output", "a text", "messages", "text", "prompt alone"],
)
def test_columns_that_settings_name_go_first(row: dict[str, Any], columns: dict[str, str], expected: str) -> None:
    assert shown(load(row, **columns)) == expected


def test_a_column_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_run.quiet(task="causal-lm", text_column="dialog")
    load_examples([{"messages": said("w1", "w2")}], config, tokenizer(), named=True)
    assert caplog.messages == ["data: there is no column 'dialog' (text_column); read are 'messages'"]
    with pytest.raises(DataError, match="column 'completion' is missing"):
        load(ALPACA | {"messages": said("w1", "w2")}, prompt_column="instruction")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"messages": said("w1", "w2")},
            {"text": "w1 w2"},
            "expected 'text', which row 1 has, got 'messages' of role and content: a file has one kind of row",
        ),
        (
            {"messages": said("w1", "w2")},
            {"messages": [{"from": "gpt", "value": "w1"}]},
            "expected 'messages' of role and content, which row 0 has, got 'messages' of from and value: a file",
        ),
        (
            {"prompt": "w1", "completion": "w2"},
            {"prompt": said("w1"), "completion": said("w1", "w2")[1:]},
            "expected 'prompt' and 'completion', which row 0 has, got 'prompt' and 'completion' of role and content: a",
        ),
        (
            ALPACA,
            {"messages": said("w1", "w2")},
            "expected 'messages' of role and content, which row 1 has, got 'instruction' and 'output': a file has one",
        ),
    ],
    ids=["messages and texts", "two kinds of message", "two kinds of prompt", "Alpaca and messages"],
)
def test_a_file_has_rows_of_one_shape(first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"1 bad row:\n  row [01]: {message}"):
        load_examples([first, second], CONFIG, tokenizer())


# Rows that are refused, with a tokenizer and without


def one(**message: Any) -> dict[str, Any]:
    return {"messages": [*said("w1", "w2"), message]}


ROLES = "'system', 'developer', 'user', 'assistant', 'tool', 'function'"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "column 'messages': expected a non-empty list of messages, got an empty one"),
    "a text": ({"messages": "w1"}, "column 'messages': expected a non-empty list of messages, got str"),
    "texts": ({"messages": ["w1"]}, r"column 'messages'\[0\]: expected an object with role and content, got str"),
    "no role": (one(content="w1"), rf"column 'messages'\[2\]: expected role to be one of {ROLES}, got None"),
    "a role": (one(role="gpt", content="w1"), rf"'messages'\[2\]: expected role to be one of {ROLES}, got 'gpt'"),
    "a role of ShareGPT": (
        {"conversations": [{"from": "Human", "value": "w1"}]},
        rf"column 'conversations'\[0\]: expected from to be one of 'human', 'gpt', 'model', {ROLES}, got 'Human'",
    ),
    "no content": (one(role="user"), r"column 'messages'\[2\]: expected content to be a string, got None"),
    "parts": (one(role="user", content=[{"type": "text"}]), r"\[2\]: expected content to be a string, got list"),
    "an empty content": (one(role="user", content=" "), "expected content to be a non-empty string, got an empty one"),
    "half a character": (one(role="tool", content="\ud83d"), "content has half a surrogate pair"),
    "a weight": (one(role="assistant", content="w1", weight=0.5), "expected weight to be 0 or 1, got 0.5"),
    "a weight of a call": (
        one(role="assistant", tool_calls=[{"name": "w1"}], weight="no"),
        "expected weight to be 0 or 1, got 'no'",
    ),
    "no assistant": ({"messages": said("w1")}, "expected a message of the assistant to learn, got 'user'"),
    "weights": (
        {"messages": [*said("w1"), {"role": "assistant", "content": "w2", "weight": 0}]},
        "expected a message of the assistant to learn, got 'user', 'assistant'",
    ),
    "no assistant in the completion": (
        {"prompt": said("w1", "w2"), "completion": said("w3")},
        "expected a message of the assistant to learn in the completion, got 'user'",
    ),
    "a prompt": (
        {"prompt": "w1", "completion": said("w1", "w2")},
        "column 'completion': expected a non-empty string, got list",
    ),
    "tools": (
        one(role="user", content="w3") | {"tools": "w1"},
        "column 'tools': expected .* or one as JSON: Expecting",
    ),
    "a tool": (
        one(role="user", content="w3") | {"tools": ["w1"]},
        "column 'tools': expected a list of objects, or one",
    ),
    "an instruction": (ALPACA | {"instruction": 3}, "column 'instruction': expected a non-empty string, got int"),
    "an output": (ALPACA | {"output": ""}, "column 'output': expected a non-empty string, got an empty one"),
    "an input": (ALPACA | {"input": 3}, "column 'input': expected a string, got int"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("check", [True, False], ids=["before the model is loaded", "with a tokenizer"])
def test_bad_rows(case: str, check: bool) -> None:
    row, message = BAD[case]
    with pytest.raises(DataError, match=rf"^data: 1 bad row:\n  row 0: .*{message}"):
        check_data([row], CONFIG) if check else load_examples([row], CONFIG, tokenizer())


def test_a_check_without_a_tokenizer_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert check_data([ALPACA], CONFIG) == []
        assert check_data([{"conversations": [{"from": "gpt", "value": "w1"}]}], CONFIG) == []
    assert not caplog.messages


def test_bad_rows_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": said("w1", "w2", system="w3")}, {"messages": said("w1", "w2")}, {"messages": said("w1")}]
    config = tiny_run.quiet(task="causal-lm", skip_bad_rows=True)
    examples, _ = load_examples(rows, config, tokenizer(NO_SYSTEM))
    assert [example.place for example in examples] == ["row 1"]
    assert "skipped 2 bad rows" in caplog.text
