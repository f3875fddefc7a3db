"""Windows, spans and the question-answering task: what is cut is found back, what is learned is saved and loaded."""

import dataclasses
import itertools
import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkern as ak
from adapterkern.recipes.qa import QuestionAnswering, SpanSettings
from adapterkern.recipes.qa.head import SpanHead
from adapterkern.recipes.qa.spans import best_spans, cut, tokens_of, window_starts
from adapterkern.recipes.qa.squad import Answer, Question
from adapterkern.training import CheckpointError, DataError, PrefixCache, evaluate, train
from adapterkern.training.data.batches import Batch, fingerprint
from adapterkern.training.data.rows import BadRows
from adapterkern.training.feed import Feed
from tests.support import pair, tiny_run
from tests.support.tiny_qa import EXAMPLES, TOKENIZER, examples, model, quiet, row, shared_run


class Oracle(nn.Module):
    """A model that knows the targets: they score 5, "no answer" 1 and everything else 0."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        choices = batch["choices"]
        scores = torch.zeros(*choices.shape, 2)
        scores[:, 0] = 1
        scores.scatter_(1, batch["targets"][:, None], 5.0)
        return scores.sum(), scores.masked_fill(~choices[..., None], -math.inf)


# Windows and spans


@given(tokens=st.integers(1, 300), room=st.integers(1, 60), stride=st.integers(1, 80))
def test_windows_cover_every_token_and_every_short_run(tokens: int, room: int, stride: int) -> None:
    starts = window_starts(tokens, room, stride)
    windows = [range(start, min(start + room, tokens)) for start in starts]
    assert {token for window in windows for token in window} == set(range(tokens))
    assert all(len(window) for window in windows)
    run = min(room - min(stride, room) + 1, tokens)
    for first in range(tokens - run + 1):
        assert any(first >= w.start and first + run <= w.stop for w in windows)
    # None too many: without the last, the end of the context is not reached.
    assert len(starts) == 1 or starts[-2] + room < tokens


@given(
    scores=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=14),
    count=st.integers(1, 30),
    longest=st.integers(1, 16),
)
def test_best_spans_are_the_best(scores: list[tuple[int, int]], count: int, longest: int) -> None:
    table = np.array(scores, dtype=np.float32)
    k = len(table) - 1
    pairs = [(i, j) for i, j in itertools.product(range(k), repeat=2) if i <= j < i + longest]
    expected = sorted((table[i + 1, 0] + table[j + 1, 1] - table[0].sum() for i, j in pairs), reverse=True)
    got = list(best_spans(table, count, longest))
    assert [span.score for span in got] == expected[:count]
    assert len({(span.first, span.last) for span in got}) == len(got)
    for span in got:
        assert (span.first, span.last) in pairs
        assert span.score == table[span.first + 1, 0] + table[span.last + 1, 1] - table[0].sum()


TEXT = st.text(st.sampled_from("abc de.,-\n\u00a0äß€łŁ日本😀e\u0301"), min_size=1, max_size=60)


@given(context=TEXT, data=st.data())
def test_the_tokens_of_an_answer_are_those_that_hold_its_characters(context: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    assume(context[start:end].strip())
    offsets = np.array(TOKENIZER(context, return_offsets_mapping=True)["offset_mapping"])
    found = tokens_of(Answer(context[start:end], start), offsets)
    assert found is not None
    first, last = found
    assert context[start:end].strip() in context[offsets[first, 0] : offsets[last, 1]]
    # And no token more: the ones beside them end before the answer, or begin after it.
    stripped = range(*(end - len(context[start:end].lstrip()), start + len(context[start:end].rstrip())))
    assert first == 0 or offsets[first - 1, 1] <= stripped.start or offsets[first - 1, 0] == offsets[first, 0]
    assert last == len(offsets) - 1 or offsets[last + 1, 0] >= stripped.stop


def test_tokens_of_characters_that_no_token_has() -> None:
    assert tokens_of(Answer("xx", 4), np.array([[0, 3], [4, 4], [6, 9]])) is None
    assert tokens_of(Answer(" xx ", 2), np.array([[0, 3], [3, 4], [4, 6], [6, 9]])) == (1, 2)


WORDS = st.lists(
    st.sampled_from(["tin", "Łódź", "日本", "naïve", "€40", "e\u0301te\u0301", "😀", "warbler", "x"]),
    min_size=1,
    max_size=120,
)


@settings(max_examples=30)
@given(words=WORDS, data=st.data(), stride=st.integers(1, 40), side=st.sampled_from(["left", "right"]))
def test_an_answer_is_found_back_through_windows(words: list[str], data: st.DataObject, stride: int, side: str) -> None:
    first = data.draw(st.integers(0, len(words) - 1))
    last = min(first + data.draw(st.integers(0, 3)), len(words) - 1)
    context = " ".join(words)
    start = len(" ".join(words[:first])) + (first > 0)
    end = len(" ".join(words[: last + 1]))
    config = quiet(max_length=96, padding_side=side)
    task = QuestionAnswering(MODEL, SpanSettings(doc_stride=stride, max_answer_tokens=96))
    windows = task.load([row(context, start, end)], config, TOKENIZER)
    assert all(len(window.input_ids) <= 96 for window in windows)
    assert len(windows) > 1 or len(TOKENIZER(context)["input_ids"]) < 96
    metrics = task.evaluate(Oracle(), windows, Feed(task, config, None), config)
    assert metrics["exact"] == 100
    # A word may occur more than once: the scores point at this place.
    encoded = [window.input_ids[window.positions] for window in windows if window.targets.any()]
    spans = [window.targets - 1 for window in windows if window.targets.any()]
    for ids, (a, b) in zip(encoded, spans, strict=True):
        assert TOKENIZER.decode(ids[a : b + 1]).strip() == context[start:end]


MODEL = model()


def test_windows_carry_the_question_first_and_the_closing_last() -> None:
    context = " ".join(f"w{i}" for i in range(100))
    question = Question("q", "Where is w90?", context, (Answer("w90", context.index("w90")),), "q")
    windows = cut([question], TOKENIZER, 64, 16, BadRows("x"))
    assert len(windows) > 4
    for window in windows:
        text = TOKENIZER.decode(window.input_ids)
        assert text.startswith("Question: Where is w90?\nContext:\n")
        assert text.endswith("\nAnswer:")
        part = TOKENIZER.decode(window.input_ids[window.positions])
        assert part == context[window.offsets[0, 0] : window.offsets[-1, 1]]
        assert window.targets.any() == ("w90" in part)


def test_data_have_one_fingerprint_whatever_was_loaded_before() -> None:
    other = model()
    fresh, used = QuestionAnswering(other), QuestionAnswering(other)
    used.load([row("Ann met Bo.", 0, 3)], quiet(), TOKENIZER)
    a, b = (task.load(EXAMPLES, quiet(), TOKENIZER) for task in (fresh, used))
    assert fingerprint(a) == fingerprint(b)


def test_the_fingerprint_is_that_of_version_0_1() -> None:
    """Checkpoints of that version must resume."""
    windows = QuestionAnswering(MODEL, SpanSettings(doc_stride=5)).load(EXAMPLES, quiet(max_length=60), TOKENIZER)
    assert len(windows) > 26
    assert fingerprint(windows) == "292b2eb12a8c1bfdaa8e426e80f206258cd88f9606c272166e460d96809f1232"


# The head


def test_the_head_is_its_formula() -> None:
    head = SpanHead(8, pointer_dim=3)
    tokens, last = torch.randn(2, 5, 8), torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(tokens.bfloat16(), last.bfloat16())
    tokens, last = tokens.bfloat16().double(), last.bfloat16().double()
    weights = {name: p.detach().double() for name, p in head.named_parameters()}
    for side in (0, 1):
        key = tokens @ weights["key.weight"][3 * side : 3 * side + 3].T
        query = last @ weights["query.weight"][3 * side : 3 * side + 3].T
        expected = tokens @ weights["token.weight"][side] + (key * query[:, None]).sum(-1) / math.sqrt(3)
        none = last @ weights["none.weight"][side] + weights["none.bias"][side]
        torch.testing.assert_close(scores[:, :, side].double(), torch.cat([none[:, None], expected], 1))
    assert scores.dtype == torch.float32
    assert [name for name, _ in SpanHead(8, pointer_dim=0).named_parameters()] == [
        "token.weight",
        "none.weight",
        "none.bias",
    ]


def scores_of(task: QuestionAnswering, rows: list[dict[str, Any]], config: ak.TrainConfig) -> list[Tensor]:
    """The finite scores of each window, in order."""
    windows = task.load(rows, config, TOKENIZER)
    with torch.no_grad():
        scores = task(Feed(task, config, None)(windows))[1]
    return [s[: 1 + len(window.positions)] for s, window in zip(scores, windows, strict=True)]


@pytest.mark.parametrize(("pointer_dim", "sees"), [(0, False), (8, True)])
def test_only_the_pointer_lets_a_start_know_what_follows(pointer_dim: int, sees: bool) -> None:
    task = QuestionAnswering(model(init="xavier"), SpanSettings(pointer_dim=pointer_dim))
    rows = [row("Ann met Bo in the old town.", 0, 3), row("Ann met Cy by the old mill.", 0, 3)]
    (one,), (other,) = (scores_of(task, [r], quiet()) for r in rows)
    same = len(TOKENIZER("Ann met")["input_ids"])
    assert torch.allclose(one[1 : 1 + same], other[1 : 1 + same], atol=1e-5) != sees
    assert not torch.allclose(one[0], other[0], atol=1e-5)  # "no answer" is scored by the last token, which sees all


def test_padding_changes_no_score() -> None:
    task = QuestionAnswering(model(init="xavier"))
    rows = [row(q.context, 0, 3) | {"id": q.id} for q in examples()[:6]]
    alone = [scores_of(task, [r], quiet())[0] for r in rows]
    for config in (quiet(), quiet(padding_side="left"), quiet(padding="max_length")):
        for a, b in zip(alone, scores_of(task, rows, config), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_cross_entropy_of_starts_and_ends() -> None:
    task = QuestionAnswering(model(init="xavier"))
    windows = task.load(EXAMPLES, quiet(), TOKENIZER)[:5]
    loss, scores = task(Feed(task, quiet(), None)(windows))
    expected = sum(
        -torch.log_softmax(s[: 1 + len(w.positions), side].double(), 0)[int(w.targets[side])]
        for w, s in zip(windows, scores, strict=True)
        for side in (0, 1)
    )
    torch.testing.assert_close(loss.double(), torch.as_tensor(expected))


# Training


@pytest.mark.slow
def test_learns_its_examples_by_heart_and_says_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    adapted = model(layers=(0, 1, 2))
    task = QuestionAnswering(adapted, SpanSettings(null_threshold=0.0, pointer_dim=16))
    config = quiet(epochs=40, lr=1e-2, output_dir=tmp_path, warmup=0.1)
    result = train(adapted, EXAMPLES, config, tokenizer=TOKENIZER, eval_data=EXAMPLES, task=task)
    assert result.metrics is not None
    assert result.metrics["exact"] >= 90
    assert result.metrics["f1"] >= result.metrics["exact"] == 100 * result.metrics["accuracy"]
    assert result.metrics["NoAns_exact"] >= 75
    assert result.history[0]["loss"] > 2 * result.metrics["loss"]

    again, saved_config = QuestionAnswering.from_pretrained(model().unload(), tmp_path)
    assert again.span_settings == task.span_settings
    assert saved_config == dataclasses.replace(config, output_dir=None)
    saved = evaluate(again.model, EXAMPLES, saved_config, tokenizer=TOKENIZER, task=again)
    assert (saved["exact"], saved["f1"]) == (result.metrics["exact"], result.metrics["f1"])
    assert saved["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)

    unlabeled = [{"id": q.id, "question": q.question, "context": q.context} for q in examples()]
    predictions = again.answer(unlabeled, config, TOKENIZER)
    assert list(predictions) == [q.id for q in examples()]
    right = 0
    for q in examples():
        text, candidates = predictions[q.id]
        assert all(q.context[c.start : c.end].strip() == c.text for c in candidates)
        assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)
        assert 10 <= len({c.text for c in candidates}) == len(candidates) <= 20
        assert text == ("" if candidates[0].score < 0 else candidates[0].text)
        right += text in ([a.text for a in q.answers or ()] or [""])
    assert right >= 0.8 * len(predictions)


@pytest.mark.parametrize(("threshold", "empty"), [(None, 0), (1e9, 0), (-1e9, 26)])
def test_the_threshold_decides_when_nothing_is_said(threshold: float | None, empty: int) -> None:
    adapted = model()
    task = QuestionAnswering(adapted, SpanSettings(null_threshold=threshold))
    task.load(EXAMPLES, quiet(), TOKENIZER)
    predictions = task.answer(EXAMPLES, quiet(), TOKENIZER)
    assert sum(p.text == "" for p in predictions.values()) == empty


def test_answering_leaves_the_task_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    task = QuestionAnswering(model())
    config = quiet(precision="bf16")
    task.load(EXAMPLES, config, TOKENIZER)
    task.train()
    task.answer(EXAMPLES, config, TOKENIZER)
    monkeypatch.setattr(task, "predict", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task.answer(EXAMPLES, config, TOKENIZER)
    assert all(module.training for module in task.modules())
    assert "forward" not in vars(task)


@pytest.mark.parametrize("train_adapters", [True, False])
def test_resume_and_prefix_cache_give_the_same_numbers(tmp_path: Path, train_adapters: bool) -> None:
    def outcome(folder: str, **values: Any) -> list[Tensor]:
        adapted = model()
        task = QuestionAnswering(adapted)
        config = quiet(output_dir=tmp_path / folder, train_adapters=train_adapters, padding="max_length", **values)
        train(adapted, EXAMPLES, config, tokenizer=TOKENIZER, task=task)
        return tiny_run.weights(adapted, task.span)

    whole = outcome("whole", max_steps=6, prefix_cache=False)
    stopped = tmp_path / "stopped"
    outcome("stopped", max_steps=6, prefix_cache=False, checkpoint_every=3)
    for newest in sorted((stopped / "checkpoints").iterdir())[1:]:
        for path in newest.iterdir():
            path.unlink()
        newest.rmdir()
    again = outcome("stopped", max_steps=6, prefix_cache=False, resume=True)
    assert tiny_run.same_bits(again, whole)
    for a, b in zip(outcome("cached", max_steps=6, prefix_cache=True), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_shared_cache_serves_evaluation() -> None:
    adapted, cache = model(), PrefixCache()
    task = QuestionAnswering(adapted)
    result = train(adapted, EXAMPLES, quiet(), tokenizer=TOKENIZER, eval_data=EXAMPLES, task=task, cache=cache)
    known = len(cache)
    metrics = evaluate(adapted, EXAMPLES, quiet(), tokenizer=TOKENIZER, task=task, cache=cache)
    assert result.metrics is not None
    assert metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
    assert known == len(cache) > 0


def trained_by(rank: int, port: int, folder: Path) -> None:
    """What one of two processes does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for shard in (False, True):
        torch.save(shared_run(shard=shard), folder / f"{rank}-{shard}.pt")
    pair.leave()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    losses, metrics = shared_run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(trained_by, (port, tmp_path), nprocs=2)
    for rank, shard in itertools.product((0, 1), (False, True)):
        got_losses, got = torch.load(tmp_path / f"{rank}-{shard}.pt")
        assert got_losses == pytest.approx(losses, rel=1e-5)
        for key in ("loss", "exact", "f1"):
            assert got[key] == pytest.approx(metrics[key], rel=1e-4), (rank, shard, key)


# Errors


def load(rows: Any, stride: int = 128, **config: Any) -> list[Any]:
    return QuestionAnswering(MODEL, SpanSettings(doc_stride=stride)).load(rows, quiet(**config), TOKENIZER)


GOOD = row("Ann met Bo.", 8, 10) | {"id": "good"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("Ann met Bo.", 8, 10, "Who? " * 60), r"question 'q': field 'question': its \d+ tokens leave no room"),
        (row("x " * 200 + "end", 2, 300), "question 'q': field 'answers': no window contains one whole; .* 1 tokens"),
        ({"id": "q", "question": "Who?", "context": "Ann."}, "question 'q': field 'answers' is missing"),
        (row("Ann met Bo.", 8, 10) | {"context": "Bo met Ann."}, "expected 'Bo' at 8 of the context, but it is at 0"),
    ],
)
def test_bad_questions_are_named_or_left_out(
    bad: dict[str, Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(bad) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert len(load(path, skip_bad_rows=True)) == 1
    assert "'q'" in caplog.text


def test_other_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data: no questions"):
        load([])
    with pytest.raises(TypeError, match="tokenizer: expected a fast one, which gives offsets, got NoneType"):
        QuestionAnswering(MODEL).load([GOOD], quiet(), None)
    with pytest.raises(ValueError, match="doc_stride: expected an integer >= 1, got 0"):
        SpanSettings(doc_stride=0)
    with pytest.raises(TypeError, match=r"null_threshold: expected a number in .*, got 'x'"):
        SpanSettings(null_threshold="x")
    for threshold in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"null_threshold: expected a number in \(-inf, inf\), got {threshold}"):
            SpanSettings(null_threshold=threshold)
    with pytest.raises(ValueError, match="span: expected pointer_dim=64, got 8"):
        QuestionAnswering(MODEL, span=SpanHead(32, 8))
    with pytest.raises(ValueError, match="span: expected a head, got none: load training data first"):
        QuestionAnswering(MODEL).answer([GOOD], quiet(), TOKENIZER)


def test_a_run_is_not_resumed_with_another_head(tmp_path: Path) -> None:
    """The settings of what is learned must be the same; how answers are chosen may change."""

    def run(resume: bool, **settings: Any) -> None:
        adapted = model()
        config = quiet(output_dir=tmp_path, epochs=2, checkpoint_every=1, resume=resume)
        train(adapted, [GOOD], config, tokenizer=TOKENIZER, task=QuestionAnswering(adapted, SpanSettings(**settings)))

    run(False)
    with pytest.raises(CheckpointError, match="the run was begun with pointer_dim=64, not 8"):
        run(True, pointer_dim=8)
    run(True, null_threshold=0.0, n_best=1)


def test_unanswerable_questions_that_would_be_answered_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    load(EXAMPLES)
    assert "4 of 26 questions have no answer" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "classification"}, "expected a span head"),
        ({"hidden_size": 64}, "field 'hidden_size': expected the model's 32, got 64"),
        ({"settings": {"doc_stride": 0}}, "field 'settings': doc_stride: expected an integer >= 1"),
        ({"settings": {"stride": 1}}, "field 'settings': .*stride"),
        ({"settings": []}, "field 'settings': expected dict"),
    ],
)
def test_a_damaged_head(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    task = QuestionAnswering(MODEL)
    task.load([GOOD], quiet(), TOKENIZER)
    task.save(tmp_path, quiet())
    path = tmp_path / "head_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"head_config.json: {message}"):
        QuestionAnswering.from_pretrained(model().unload(), tmp_path)
