"""Which requests share a batch, what waits, what is dropped, and that everybody gets an end."""

import threading
from typing import Any

import pytest

from adapterkern.inference.server.batching import Batcher, ClosedError, Piece, QueueFullError, Request, Sampling

GREEDY = Sampling(temperature=0)


def request(name: str = "a", sampling: Sampling = GREEDY, pieces: list[Any] | None = None) -> Request:
    return Request(name, [1], sampling, 4, (pieces if pieces is not None else []).append)


class Recorder:
    """A ``run`` that notes its batches and answers each request; the first batch waits for ``go``."""

    def __init__(self) -> None:
        self.batches: list[str] = []
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, batch: list[Request]) -> None:
        self.batches.append("".join(one.adapter for one in batch))
        self.began.set()
        assert self.go.wait(60)
        for one in batch:
            one.give(Piece("x", 1, "stop"))


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (Sampling(temperature=0, top_p=0.5, seed=3), True),  # neither matters to a greedy one
        (Sampling(temperature=1), False),
    ],
)
def test_greedy_requests_share(other: Sampling, shared: bool) -> None:
    assert GREEDY.shares(other) is other.shares(GREEDY) is shared


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (Sampling(temperature=0.7), True),
        (Sampling(temperature=0.8), False),
        (Sampling(temperature=0.7, top_p=0.9), False),
        (Sampling(temperature=0.7, seed=1), False),
    ],
)
def test_sampled_requests_share_if_their_settings_are_equal(other: Sampling, shared: bool) -> None:
    one = Sampling(temperature=0.7)
    assert one.shares(other) is other.shares(one) is shared
    assert not Sampling(temperature=0.7, seed=1).shares(Sampling(temperature=0.7, seed=1))


def test_the_oldest_and_those_that_can_join_it_in_their_order() -> None:
    run = Recorder()
    run.go.set()
    batcher = Batcher(run, max_batch=3, window=0)
    warm, seeded = Sampling(temperature=0.5), Sampling(temperature=0.5, seed=1)
    for name, sampling in zip("abcdefgh", [GREEDY, warm, GREEDY, seeded, warm, GREEDY, GREEDY, seeded], strict=True):
        batcher.submit([request(name, sampling)])
    batcher.start()
    batcher.close()
    assert run.batches == ["acf", "be", "d", "g", "h"]


def test_a_full_batch_does_not_wait_for_the_window() -> None:
    run = Recorder()
    run.go.set()
    batcher = Batcher(run, max_batch=2, window=3600)
    batcher.start()
    batcher.submit([request("a")])
    batcher.submit([request("b")])
    assert run.began.wait(60)
    assert run.batches == ["ab"]
    batcher.close()


def test_a_full_queue_refuses_all_or_none() -> None:
    run = Recorder()
    batcher = Batcher(run, max_batch=1, window=0, queue=2)
    batcher.start()
    batcher.submit([request("a")])
    assert run.began.wait(60)
    batcher.submit([request("b")])
    with pytest.raises(QueueFullError):
        batcher.submit([request("c"), request("d")])
    batcher.submit([request("e")])
    assert batcher.counts() == (2, 1)
    run.go.set()
    batcher.close()
    assert run.batches == ["a", "b", "e"]
    assert batcher.counts() == (0, 0)


def test_what_is_cancelled_leaves_the_queue() -> None:
    run = Recorder()
    batcher = Batcher(run, max_batch=1, window=0, queue=1)
    batcher.start()
    first, second = request("a"), request("b")
    batcher.submit([first])
    assert run.began.wait(60)
    batcher.submit([second])
    batcher.cancel([first, second])
    assert first.cancelled  # which generation.py sees at its next token
    assert batcher.counts() == (0, 1)
    batcher.submit([request("c")])  # there is room again
    run.go.set()
    batcher.close()
    assert run.batches == ["a", "c"]


def test_after_close_all_that_was_accepted_is_answered_and_nothing_else() -> None:
    run, pieces = Recorder(), []  # type: ignore[var-annotated]
    run.go.set()
    batcher = Batcher(run, max_batch=1, window=3600)
    batcher.submit([request("a", pieces=pieces), request("b", pieces=pieces)])
    batcher.start()
    batcher.close()
    assert pieces == [Piece("x", 1, "stop")] * 2
    with pytest.raises(ClosedError):
        batcher.submit([request()])


def test_a_batch_that_fails_ends_its_requests_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    run = Recorder()
    run.go.set()

    def fails_once(batch: list[Request]) -> None:
        if batch[0].adapter == "a":
            batch[0].give(Piece("x", 1))
            raise RuntimeError("out of memory")
        run(batch)

    pieces: dict[str, list[Piece]] = {"a": [], "b": []}
    batcher = Batcher(fails_once, max_batch=1, window=0)
    batcher.submit([request(name, pieces=pieces[name]) for name in pieces])
    batcher.start()
    batcher.close()
    assert pieces == {"a": [Piece("x", 1), Piece("", 0, "error")], "b": [Piece("x", 1, "stop")]}
    assert "out of memory" in caplog.text
