"""A batch in which each row has an adapter, an end and a length of its own answers as the rows do alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from adapterkern.inference.server.batching import Piece, Request, Sampling
from adapterkern.inference.server.generation import generate
from adapterkern.inference.server.models import Models, find_models, load_models
from adapterkern.model.running import BASE_NAME
from tests.support import tiny_served

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    tiny_served.save_runs(made, 4)
    return made


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    runs = find_models([str(folder / f"run{number}") for number in range(4)])
    return load_models(runs, model=folder / "llama", dtype="fp32")


class Asked:
    """A request and what it has been given."""

    def __init__(
        self, models: Models, name: str, text: str, tokens: int, sampling: Sampling = GREEDY, **more: Any
    ) -> None:
        self.pieces: list[Piece] = []
        ids = models.tokenizer(text)["input_ids"]
        self.request = Request(models.adapters[name], ids, sampling, tokens, self.pieces.append, **more)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def last(self) -> Piece:
        return self.pieces[-1]


def answer(models: Models, *asked: Asked) -> None:
    generate(models.model, models.tokenizer, [one.request for one in asked])


def test_every_adapter_answers_as_it_does_alone(models: Models, folder: Path) -> None:
    names = [*models.adapters] * 2
    assert names[:5] == ["run0", "run1", "run2", "run3", BASE_NAME]
    asked = [Asked(models, name, tiny_served.prompt(n), 6 + n) for n, name in enumerate(names)]
    answer(models, *asked)
    answers = set()
    for number, (name, one) in enumerate(zip(names, asked, strict=True)):
        run = None if name == BASE_NAME else folder / name
        ids = tiny_served.alone(folder, run, tiny_served.prompt(number), 6 + number)
        assert one.text == models.tokenizer.decode(ids, skip_special_tokens=True)
        assert (one.last.tokens, one.last.finish) == (6 + number, "length")
        answers.add(tuple(ids[:6]))
    assert len(answers) > 5  # the adapters do something


def test_a_row_ends_by_its_own_token_or_string(models: Models, folder: Path) -> None:
    ids = tiny_served.alone(folder, folder / "run0", "w1 w2", 12)
    words = models.tokenizer.convert_ids_to_tokens(ids)
    end = next(n for n in range(2, 12) if not any(word.startswith(words[n]) for word in words[:n]))
    by_token = Asked(models, "run0", "w1 w2", 12, ends=frozenset([ids[end]]))
    by_string = Asked(models, "run0", "w1 w2", 12, stop=(words[end],))
    neither = Asked(models, "run0", "w1 w2", 12)
    answer(models, by_token, by_string, neither)
    before = models.tokenizer.decode(ids[:end], skip_special_tokens=True)
    assert (by_token.text, by_token.last.tokens, by_token.last.finish) == (before, end + 1, "stop")
    assert by_string.text.rstrip() == before
    assert (by_string.last.tokens, by_string.last.finish) == (end + 1, "stop")
    assert neither.text == models.tokenizer.decode(ids, skip_special_tokens=True)
    assert neither.last.finish == "length"


def test_a_call_ends_with_the_last_request_that_somebody_waits_for(models: Models) -> None:
    class Leaves(Asked):
        """Cancelled by its third piece."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.request.emit = self.take

        def take(self, piece: Piece) -> None:
            self.pieces.append(piece)
            self.request.cancelled = len(self.pieces) == 3

    gone = Leaves(models, "run0", "w1 w2", tiny_served.CONTEXT - 8)
    short = Asked(models, "run1", "w1", 5)
    calls: list[int] = []
    hook = models.model.base.register_forward_pre_hook(lambda *_: calls.append(1))
    answer(models, gone, short)
    hook.remove()
    assert len(gone.pieces) == 3
    assert short.last == Piece(short.last.text, 5, "length")
    assert len(calls) == 5


def test_a_seed_repeats_an_answer_and_leaves_the_others_random(models: Models) -> None:
    def sampled(**sampling: Any) -> str:
        one = Asked(models, "run0", "w1 w2", 20, Sampling(temperature=1.5, **sampling))
        answer(models, one)
        return one.text

    torch.manual_seed(0)
    without = sampled()
    torch.manual_seed(0)
    first = sampled(seed=7)
    assert sampled() == without
    assert sampled(seed=7) == first
    assert len({first, without, sampled(seed=8)}) == 3


def test_of_the_backbones_own_settings_only_the_ends_are_used(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "llama", tmp_path / "llama")
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "top_k": 3}
    GenerationConfig(**settings, num_return_sequences=2, eos_token_id=[7, 9]).save_pretrained(tmp_path / "llama")
    made = load_models(find_models([str(folder / "run0")]), model=tmp_path / "llama", dtype="fp32")
    assert made.ends == {7, 9}
    ids = tiny_served.alone(folder, folder / "run0", "w1 w2", 12)
    assert not {7, 9} & set(ids)
    one = Asked(made, "run0", "w1 w2", 12)
    answer(made, one)
    assert one.text == made.tokenizer.decode(ids, skip_special_tokens=True)
