"""A text is tokenized as a whole, with the tokenizer's own tokens around it once, and an end at the end."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adapterkern.training.data.examples import Example, load_examples
from adapterkern.training.data.tokens import tokenize
from tests.support import tiny_qa, tiny_run

BYTES = tiny_qa.TOKENIZER  # a byte-level BPE: a space belongs to the word after it
LM = tiny_run.quiet(task="causal-lm", max_length=64)


def words(template: str = "", **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with special tokens around a text as the template has them."""
    core = Tokenizer(models.WordLevel(tiny_run.VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        ids = [(token, tiny_run.VOCABULARY[token]) for token in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As LLaMA 2's: a space before the first word of a text."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "=", "▁4", "4", "2", "▁2", "+", "▁="]
    core = Tokenizer(models.Unigram([(piece, -1.0 - 0.01 * i) for i, piece in enumerate(pieces)], 0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


class Slow:
    """A tokenizer that gives no offsets."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.eos_token_id, self.unk_token_id = fast.eos_token_id, fast.unk_token_id

    def __call__(self, texts: Any, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.fast(texts, **options)


def load(tokenizer: Any, **row: str) -> tuple[list[str], list[str]]:
    """The tokens of a row, and those that are learned."""
    (example,), _ = load_examples([row], LM, tokenizer)
    names = getattr(tokenizer, "fast", tokenizer).convert_ids_to_tokens
    return names(example.input_ids.tolist()), names(example.targets.tolist())


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("template", "special"),
    [("", BOTH), ("<s> $A", BOTH), ("<s> $A </s>", BOTH), ("$A </s>", {"eos_token": "</s>"})],
)
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("rendered", [False, True])
def test_one_beginning_and_one_end(template: str, special: dict[str, str], slow: bool, rendered: bool) -> None:
    tokenizer = words(template, **special)
    begin = ["<s>"] if rendered or template.startswith("<s>") else []
    prompt, completion = ("<s> w1 w2", " w3 </s>") if rendered else ("w1 w2", " w3")
    got = load(Slow(tokenizer) if slow else tokenizer, prompt=prompt, completion=completion)
    assert got == ([*begin, "w1", "w2", "w3", "</s>"], ["w3", "</s>"])
    got = load(tokenizer, text=prompt + completion)
    assert got[0] == [*begin, "w1", "w2", "w3", "</s>"]
    assert got[1] == got[0][1:]


def test_no_special_tokens_at_all(caplog: pytest.LogCaptureFixture) -> None:
    assert load(words(), prompt="w1", completion=" w2 w3") == (["w1", "w2", "w3"], ["w2", "w3"])
    assert "data: the tokenizer has no end-of-text token (eos_token), so no text teaches where to stop" in caplog.text


def test_an_end_between_turns_stays() -> None:
    """It is the text's own, not the tokenizer's."""
    got, learned = load(words("<s> $A </s>", **BOTH), prompt="w1 </s> w2", completion=" w3")
    assert got == ["<s>", "w1", "</s>", "w2", "w3", "</s>"]
    assert learned == ["w3", "</s>"]


def test_words_that_prompt_and_completion_would_join() -> None:
    """A tokenizer of whole words has no token for w2w3: they are cut where the completion begins."""
    assert load(words("<s> $A", **BOTH), prompt="w1 w2", completion="w3") == (
        ["<s>", "w1", "w2", "w3", "</s>"],
        ["w3", "</s>"],
    )


@pytest.mark.parametrize("slow", [False, True])
def test_sentencepiece_puts_no_space_before_the_completion(slow: bool) -> None:
    tokenizer = sentencepiece()
    got = load(Slow(tokenizer) if slow else tokenizer, prompt="2+2=", completion="4")
    assert got == (["▁2", "+", "2", "=", "4", "</s>"], ["4", "</s>"])


@pytest.mark.parametrize("slow", [False, True])
def test_a_token_of_both_is_learned_and_named(slow: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = sentencepiece()
    rows = [{"prompt": "2+2= ", "completion": "4"}, {"prompt": "2+2=", "completion": " 4"}]
    examples, _ = load_examples(rows, LM, Slow(tokenizer) if slow else tokenizer)
    for example in examples:
        assert tokenizer.convert_ids_to_tokens(example.input_ids.tolist()) == ["▁2", "+", "2", "=", "▁4", "</s>"]
        assert tokenizer.convert_ids_to_tokens(example.targets.tolist()) == ["▁4", "</s>"]
    assert "data: 1 of 2 prompts end within a token (row 0): that token is learned" in caplog.text


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@given(TEXTS, TEXTS)
def test_any_text_is_tokenized_as_a_whole(prompt: str, completion: str) -> None:
    (example,), _ = load_examples([{"prompt": prompt, "completion": completion}], LM, BYTES)
    whole = BYTES(prompt + completion, return_offsets_mapping=True)
    assert example.input_ids.tolist() == [*whole["input_ids"], BYTES.eos_token_id]
    learned = [i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(prompt)]
    assert example.positions.tolist() == [i - 1 for i in (*learned, len(whole["input_ids"])) if i]


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_a_text_without_prompt_is_what_the_tokenizer_makes_of_it(texts: list[str]) -> None:
    found = tokenize(BYTES, [("", text) for text in texts])
    assert [tokens.ids for tokens in found] == BYTES(texts)["input_ids"]


def test_a_text_without_tokens_is_a_bad_row() -> None:
    tokenizer = words("<s> $A", **BOTH)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    (found,) = tokenize(tokenizer, [("", "\u200b")])
    assert found.empty


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    def upper(texts: Any, add_special_tokens: bool = True, **_: Any) -> Any:
        return {"input_ids": [9] if add_special_tokens else [8]}

    with pytest.raises(
        ValueError, match="tokenizer: expected one that puts special tokens around a text, got function"
    ):
        tokenize(upper, [("", "w1")])


def test_classification_begins_once() -> None:
    rows = [{"text": "<s> w1", "label": "a"}, {"text": "w2", "label": "b"}]
    examples: list[Example] = load_examples(rows, tiny_run.quiet(), words("<s> $A", **BOTH))[0]
    assert [e.input_ids.tolist() for e in examples] == [[1, 4], [1, 5]]
