"""Every refusal of data: its exception, and the line that says what was expected and what came."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterkern as ak
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.recipes.qa import QuestionAnswering
from adapterkern.recipes.qa.squad import read_questions
from adapterkern.training import DataError, evaluate, load_examples
from adapterkern.training.data.rows import BadRows
from tests.support import tiny_qa, tiny_run

TOKENIZER = tiny_run.tokenizer()
IDS = [5, 6, 7, 8]


def lm(**row: Any) -> Callable[[Path], Any]:
    return lambda _: load_examples([row], tiny_run.quiet(task="causal-lm"), TOKENIZER)


def labels(*rows: Any, **values: Any) -> Callable[[Path], Any]:
    return lambda _: load_examples(rows, tiny_run.quiet(**values), TOKENIZER)


def data(value: Any) -> Callable[[Path], Any]:
    return lambda _: load_examples(value, tiny_run.quiet(), TOKENIZER)


def file(name: str, content: str, **values: Any) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        (folder / name).write_text(content)
        return load_examples(folder / name, tiny_run.quiet(**values), TOKENIZER)

    return load


def labeled(label: str, names: list[str]) -> Callable[[Path], Any]:
    return lambda _: load_examples([{"text": "w1", "label": label}], tiny_run.quiet(), TOKENIZER, names)


def questions(*rows: Any) -> Callable[[Path], Any]:
    return lambda _: read_questions(rows, BadRows("data"))


def unlabeled(_: Path) -> Any:
    rows = [{"question": "Who?", "context": "Ann came."}]
    return QuestionAnswering(tiny_qa.model()).load(rows, tiny_qa.quiet(), tiny_qa.TOKENIZER)


def task_of_one_label(_: Path) -> Any:
    model = tiny_run.model()
    rows = {"default": [{"text": "w1", "label": "a"}]}
    return MultiTask(model, ["default"]).load(rows, tiny_run.quiet(), TOKENIZER)


def foreign_ids(_: Path) -> Any:
    rows = [{"input_ids": [5, 200]}, {"input_ids": [5, 500]}]
    return evaluate(tiny_run.model(), rows, tiny_run.quiet(task="causal-lm"))


def foreign_labels(_: Path) -> Any:
    row = {"input_ids": IDS, "labels": [5, 6, 7, 500]}
    return evaluate(tiny_run.model(), [row], tiny_run.quiet(task="causal-lm"))


class Frame:
    def iterrows(self) -> None: ...


Case = tuple[Callable[[Path], Any], type[Exception], str]
CASES: dict[str, Case] = {
    "text column": (
        data([{"body": "w1", "label": "a"}] * 300),
        DataError,
        r"^data: column 'text' is missing; there are 'body', 'label'; text_column names another$",
    ),
    "both columns": (
        data([{"sentence": "w1", "sentiment": "a"}]),
        DataError,
        r"^data: columns 'text', 'label' are missing; there are 'sentence', 'sentiment'; text_column and label_column "
        r"name others$",
    ),
    "both columns of a question": (
        questions({"q": "Who?", "c": "Ann."}),
        DataError,
        "^data: columns 'question', 'context' are missing; there are 'q', 'c'$",
    ),
    "another case": (
        file("a.csv", "Text,Label\nw1,a\n"),
        DataError,
        r"there are 'Text', 'Label'; text_column and label_column name others\. Did you mean 'Text', 'Label'\?$",
    ),
    "a space in the header": (
        file("a.csv", "text, label\nw1, a\n"),
        DataError,
        r"column 'label' is missing; there are 'text', ' label'; label_column names another\. Did you mean ' label'\?$",
    ),
    "null in a column": (
        file("a.jsonl", '{"prompt": "w1", "completion": null}\n', task="causal-lm"),
        DataError,
        r"a\.jsonl:1: column 'completion': expected a non-empty string, got null\n",
    ),
    "an object": (
        file("a.jsonl", '{"text": {"a": 1}, "label": [1]}\n'),
        DataError,
        r":1: column 'text': expected a non-empty string, got an object; column 'label': expected .*, got a list\n",
    ),
    "None": (
        lm(prompt="w1", completion=None),
        DataError,
        r"row 0: column 'completion': expected .* string, got None\n",
    ),
    "a label that is no token": (
        lm(input_ids=IDS, labels=[-100, 5, -1, 7]),
        DataError,
        r"column 'labels': expected token ids, or -100 for none, got -1\n",
    ),
    "no header": (
        file("a.csv", "w1 w2,no\nw2 w3,yes\n"),
        DataError,
        r"a\.csv: columns 'text', 'label' are missing; there are 'w1 w2', 'no'; text_column and label_column name "
        r"others\. If these are values, the file lacks a first line with the names of its columns$",
    ),
    "no header, TSV": (
        file("a.tsv", "w1 w2\nw2 w3\n", task="causal-lm"),
        DataError,
        r"text_column names another, or .*_column a pair\. If these are values, the file lacks a first line with",
    ),
    "questions": (
        file("a.jsonl", '{"question": "w1", "hint": "", "answer": "w2"}\n', task="causal-lm"),
        DataError,
        r"a\.jsonl: column 'text' is missing; there are 'question', 'hint', 'answer'; text_column names another, "
        r"or prompt_column and completion_column a pair$",
    ),
    "a column without a name": (data([{0: "w1 w2"}]), DataError, "columns 'text', 'label' are missing; there are 0; "),
    "a header, though of other columns": (
        file("a.csv", "body,label\nw1,a\n"),
        DataError,
        "column 'text' is missing; there are 'body', 'label'; text_column names another$",
    ),
    "two kinds of row": (
        file("a.jsonl", '{"prompt": "w1", "completion": "w2"}\n' + '{"text": "w1 w2"}\n' * 2, task="causal-lm"),
        DataError,
        r"a\.jsonl: 2 bad rows:\n  \S*a\.jsonl:2: expected 'prompt' and 'completion', which \S*a\.jsonl:1 has, got "
        r"'text': a file has one kind of row\n  \S*a\.jsonl:3: expected 'prompt' and .*\nset skip_bad_rows=True to ",
    ),
    "two kinds of row, CSV": (
        file("a.csv", "text,prompt,completion\nw1 w2,,\n,w1,w2\n", task="causal-lm"),
        DataError,
        r"1 bad row:\n  \S*a\.csv:2: expected 'prompt' and 'completion', which \S*a\.csv:3 has, got 'text': a file ",
    ),
    "label column, skipping": (
        labels({"text": "w1"}, skip_bad_rows=True),
        DataError,
        r"column 'label' is missing; there are 'text'; label_column names another$",
    ),
    "completion column": (
        lm(prompt="w1", answer="w2"),
        DataError,
        r"column 'completion' is missing; there are 'prompt', 'answer'; completion_column",
    ),
    "prompt column": (lm(completion="w2"), DataError, r"column 'prompt' is missing; .*prompt_column names"),
    "label of ids": (
        data([{"input_ids": IDS, "labels": 1}]),
        DataError,
        "'label' is missing; there are 'input_ids', 'l",
    ),
    "chat": (
        data([{"messages": [], "label": "a"}]),
        DataError,
        r"there are 'messages', 'label'; .* another\. Make a text of .* tokenizer\.apply_chat_template\(messages, ",
    ),
    "chat without labels": (
        data([{"messages": []}]),
        DataError,
        r"'text', 'label' are missing; there are 'messages'; .* others\. messages are for task='causal-lm'$",
    ),
    "Alpaca's rows": (
        data([{"instruction": "w1", "output": "w2"}]),
        DataError,
        r"there are 'instruction', 'output'; .* others\. instruction and output are for task='causal-lm'$",
    ),
    "no file": (data("no.csv"), FileNotFoundError, "^data: expected a file of rows, got no.csv, which is not there$"),
    "folder": (
        lambda folder: data(folder.with_suffix(".csv"))(folder.rename(folder.with_suffix(".csv"))),
        IsADirectoryError,
        "^data: expected a file of rows, got .*csv, which is a folder$",
    ),
    "semicolons": (
        file("a.csv", "text;label\nw1;a\n"),
        DataError,
        r"a\.csv: columns 'text', 'label' are missing; there are 'text;label'; .* name others\. The header seems to be "
        r"separated by ';': \.csv files have ',', \.tsv",
    ),
    "commas in TSV": (file("a.tsv", "text,label\n"), DataError, "a.tsv: no rows"),
    "commas in TSV rows": (file("a.tsv", "text,label\nw1,a\n"), DataError, "seems to be separated by ','"),
    "columns, many": (data([{f"c{i}": "w1" for i in range(100)}]), DataError, "'c9' and 90 more; text_column"),
    "bad rows, sorted and once": (
        file("a.jsonl", '{"text": " ", "label": 0.5}\n' + '{"text": "w1", "label": "a"}\n' * 9 + "{\n" * 2),
        DataError,
        r"(?s)^\S*a\.jsonl: 3 bad rows:\n  \S*:1: column 'text': expected .*, got an empty one; column 'label': .*\n"
        r"  \S*:11: not JSON: Expecting property name.* \(column 2\)\n  \S*:12: not JSON: [^\n]*\n"
        r"set skip_bad_rows=True to skip them$",
    ),
    "cut JSONL": (
        file("a.jsonl", '{"text": "w1", "label": "a"}\n{"text": "w'),
        DataError,
        "a.jsonl:2: not JSON: Unterminated string starting at .column 10.; the file ends here and may",
    ),
    "cut CSV": (
        file("a.csv", 'text,label\n"w1'),
        DataError,
        "a.csv:2: unexpected end of data; a quote is not closed, or",
    ),
    "JSON as JSONL": (
        file("a.jsonl", '[\n{"text": "w1"}\n]'),
        DataError,
        "a.jsonl:1: expected one JSON object per line, g",
    ),
    "JSON": (
        file("a.json", '{"data": []}'),
        DataError,
        r"a\.json: expected a list of objects, got an object; name a file of one object per line \.jsonl$",
    ),
    "null": (file("a.jsonl", "null\n"), DataError, "a.jsonl:1: expected a JSON object, got null"),
    "frame": (
        data(Frame()),
        TypeError,
        r"^data: expected a path or a list of rows, got Frame; pass frame\.to_dict\('re",
    ),
    "splits": (
        data({"train": [], "test": []}),
        TypeError,
        "got dict with the keys 'train', 'test'; pass one of its sp",
    ),
    "float label": (
        labels({"text": "w1", "label": 1.5}),
        DataError,
        "'label': expected .* an integer, got the number 1.5",
    ),
    "blank label": (
        labels({"text": "w1", "label": " "}),
        DataError,
        "row 0: column 'label': expected .* got an empty one",
    ),
    "long label": (
        lambda _: load_examples([{"text": "w1", "label": "b" * 9999}], tiny_run.quiet(), TOKENIZER, ["a", "c"]),
        DataError,
        r"row 0: column 'label': label 'b{55} \.\.\. is not one of the training's labels 'a', 'c'\n",
    ),
    "label of another spelling": (
        lambda _: load_examples([{"text": "w1", "label": "A "}], tiny_run.quiet(), TOKENIZER, ["a", "c"]),
        DataError,
        "row 0: column 'label': label 'A ' is not one of the training's labels 'a', 'c'; 'a' differs only in case, "
        "spaces or form",
    ),
    "label with a typing error": (
        labeled("Postive", ["negative", "positive"]),
        DataError,
        "label 'Postive' is not one of the training's labels 'negative', 'positive'; did you mean 'positive'\\?\n",
    ),
    "label of another number": (
        labeled("class 3", ["class 1", "class 2"]),
        DataError,
        "label 'class 3' is not one of the training's labels 'class 1', 'class 2'\n",
    ),
    "label like no other": (labeled("maybe", ["no", "yes"]), DataError, "the training's labels 'no', 'yes'\n"),
    "one label": (labels({"text": "w1", "label": "a"}), DataError, "expected at least two different labels, got 'a'$"),
    "one label of a task": (
        task_of_one_label,
        DataError,
        "^task 'default': data: column 'label': expected at least two",
    ),
    "packed, one label": (
        labels({"input_ids": IDS, "position_ids": [0, 1, 0, 1], "label": "a"}),
        DataError,
        "row 0: expected one text for one label, got 2 that are packed into the row",
    ),
    "ids, nested": (
        lm(input_ids=[IDS]),
        DataError,
        r"'input_ids': expected a non-empty list .* got \[\[5, 6, 7, 8\]\]",
    ),
    "ids, floats": (
        lm(input_ids=np.ones(3)),
        DataError,
        r"'input_ids': expected a non-empty list of integers from 0 to",
    ),
    "ids, bools": (
        lm(input_ids=[True, False]),
        DataError,
        r"'input_ids': expected a non-empty list of integers from 0 to",
    ),
    "labels, short": (lm(input_ids=IDS, labels=[5]), DataError, "'labels': expected 4 values, as input_ids has, got 1"),
    "labels, negative": (
        lm(input_ids=IDS, labels=[5, 6, -1, 7]),
        DataError,
        "expected token ids, or -100 for none, got -1",
    ),
    "labels, none": (
        lm(input_ids=IDS, labels=[-100] * 4),
        DataError,
        "row 0: no token to learn: labels and masks leave none",
    ),
    "ids of another model": (
        foreign_ids,
        ValueError,
        "row 1: column 'input_ids': expected token ids below the model's 128, got 500",
    ),
    "labels of another model": (
        foreign_labels,
        ValueError,
        "row 0: column 'labels': expected token ids below the model's 128, got 500",
    ),
    "mask, value": (
        lm(input_ids=IDS, attention_mask=[1, 1, 2, 2]),
        DataError,
        "expected a list of integers from 0 to 1, got",
    ),
    "mask, hole": (
        lm(input_ids=IDS, attention_mask=[1, 0, 1, 1]),
        DataError,
        "0 on padding at either end, got a 0 between",
    ),
    "mask, empty": (lm(input_ids=IDS, attention_mask=[0] * 4), DataError, "0 on padding at either end, got no 1"),
    "completion mask": (
        lm(input_ids=IDS, completion_mask="0011"),
        DataError,
        "'completion_mask': expected a list of integ",
    ),
    "positions": (
        lm(input_ids=IDS, position_ids=[3, 4, 5, 6]),
        DataError,
        r"expected positions that count up from 0 in e",
    ),
    "positions, jump": (lm(input_ids=IDS, position_ids=[0, 1, 0, 2]), DataError, r"in each text, got \[0, 1, 0, 2\]"),
    "lengths": (
        lm(input_ids=IDS, seq_lengths=[2, 3]),
        DataError,
        r"expected lengths that sum to 4, as input_ids has, got",
    ),
    "column's type": (
        lambda _: ak.TrainConfig(text_column=3),
        TypeError,
        "text_column: expected a column's name, got 3",
    ),
    "same columns": (
        lambda _: ak.TrainConfig(label_column="text"),
        ValueError,
        "label_column: expected a column that text_column does not name, got 'text' for both",
    ),
    "question": (
        questions({"context": "Ann."}, {"context": "Bo."}),
        DataError,
        "'question' is missing; there are 'context'$",
    ),
    "answers": (unlabeled, DataError, "^data: field 'answers' is missing: no question is labeled"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(case: str, tmp_path: Path) -> None:
    provoke, kind, message = CASES[case]
    with pytest.raises(kind, match=message):
        provoke(tmp_path)


def test_causal_lm_reads_no_label_column() -> None:
    config = tiny_run.quiet(task="causal-lm", text_column="label")
    assert len(load_examples([{"label": "w1 w2"}], config, TOKENIZER)[0]) == 1
