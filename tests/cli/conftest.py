"""A tiny model in a folder and two files of texts, for commands."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapterkern.model import fast_dtype
from tests.support.commands import TOPICS, write_texts
from tests.support.tiny_chat import CHATML, SPECIAL
from tests.support.tiny_llama import tiny


@pytest.fixture(autouse=True)
def fp32_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """--dtype auto stands for fp32 in this process, on whatever machine the tests run."""
    monkeypatch.setattr(fast_dtype, "_speed", lambda low, threads: 1.0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "a", "and", *TOPICS["fruit"], *TOPICS["metal"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("chat") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return write_texts(folder / "train.jsonl", 64, 0), write_texts(folder / "eval.jsonl", 32, 1)
