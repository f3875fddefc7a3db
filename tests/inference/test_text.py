"""Tokens to text in pieces: whole characters, the same text as at once, and stop strings that are never shown."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapterkern.inference.server.text import Text
from tests.support import tiny_chat, tiny_run


def of_bytes() -> Any:
    """A token per byte, so that a character may be four of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def pieces(text: Text, ids: list[int]) -> list[str]:
    return [*(text.push(token) for token in ids), text.flush()]


@pytest.mark.parametrize("said", ["plain", "grün 🌍, 世界!", "🌍🌍"])
def test_no_piece_has_half_a_character(said: str) -> None:
    tokenizer = of_bytes()
    ids = tokenizer.encode(said)
    found = pieces(Text(tokenizer), ids)
    assert len(ids) == len(said.encode())
    assert "".join(found) == said
    assert [piece for piece in found if piece] == list(said)


def test_what_is_no_character_is_given_at_the_end() -> None:
    tokenizer = of_bytes()
    assert pieces(Text(tokenizer), tokenizer.encode("a🌍")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_the_pieces_are_the_text_of_all_tokens_without_special_ones() -> None:
    """A word's space depends on whether a word is before it, special tokens or not."""
    tokenizer = tiny_chat.tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["w4", "<|im_end|>", "w5", "<unk>", "<unk>", "w6"])
    assert pieces(Text(tokenizer), ids) == ["w4", "", " w5", "", "", " w6", ""]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "w4 w5 w6"


def test_a_text_that_follows_another() -> None:
    tokenizer = tiny_run.tokenizer()
    before, ids = (tokenizer.convert_tokens_to_ids(words) for words in (["w1", "w2"], ["w3", "w4"]))
    assert pieces(Text(tokenizer, before), ids) == [" w3", " w4", ""]


@pytest.mark.parametrize(
    ("stop", "expected", "stopped"),
    [
        (("cd",), "ab", True),
        (("x",), "abcabcde", False),
        (("abcd", "bca"), "a", True),  # the first to come, not the first of the list
        (("abcdef",), "abcabcde", False),  # held back, and given at the end
        (("a",), "", True),
    ],
)
def test_stop_strings(stop: tuple[str, ...], expected: str, stopped: bool) -> None:
    said = "abcabcde" if stop != ("cd",) else "abcde"
    tokenizer = of_bytes()
    text = Text(tokenizer, stop=stop)
    found = pieces(text, tokenizer.encode(said))
    assert ("".join(found), text.stopped) == (expected, stopped)


def test_nothing_of_a_stop_string_is_shown_while_it_may_still_come() -> None:
    tokenizer = of_bytes()
    assert pieces(Text(tokenizer, stop=("aab",)), tokenizer.encode("aaac")) == ["", "", "a", "aac", ""]
