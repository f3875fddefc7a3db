"""A share of the training rows to evaluate on: which rows, how many of each label, and that a run can repeat it."""

import dataclasses
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from adapterkern.training import DataError, HeldOut, TrainConfig, evaluate, load_examples, train
from adapterkern.training.data.examples import Example, numbered
from adapterkern.training.data.split import is_share, split
from adapterkern.training.data.targets import TARGETS
from adapterkern.training.run.results import CheckpointError
from adapterkern.training.saved import Sources, checkpoints, load_run, load_sources, save_sources
from tests.support import tiny_chat, tiny_run

TOKENIZER = tiny_run.tokenizer()
CONFIG = tiny_run.quiet()


def rows(**labels: int) -> list[dict[str, Any]]:
    """So many rows of each label, in turn; each of three words that no other has in this order."""
    numbers = {
        label: iter(range(100 * place, 100 * place + count)) for place, (label, count) in enumerate(labels.items())
    }
    found = [{"text": f"w{n // 10} w{n % 10} w9", "label": label} for label, of in numbers.items() for n in of]
    random.Random(0).shuffle(found)
    return found


def parts(of: list[dict[str, Any]], share: str, seed: int = 0, **values: Any) -> tuple[list[Example], list[Example]]:
    config = tiny_run.quiet(**values)
    examples, _ = load_examples(of, config, TOKENIZER)
    return split(examples, HeldOut(of, share, seed), targets=TARGETS.get(config.task))


def places(examples: list[Example]) -> list[str]:
    return [example.place for example in examples]


def test_the_same_rows_for_a_seed_and_others_for_another() -> None:
    of = rows(a=40, b=40)
    learned, held = parts(of, "10%")
    assert places(held) == places(parts(of, "10%")[1])
    assert places(held) != places(parts(of, "10%", seed=1)[1])
    assert sorted(places(learned) + places(held)) == sorted(f"row {n}" for n in range(80))
    assert places(learned) == [place for place in places(learned + held) if place in places(learned)]


def test_which_rows_are_held_out_does_not_change_from_version_to_version() -> None:
    held = parts(rows(a=10, b=10), "20%")[1]
    texts = sorted(TOKENIZER.decode(example.input_ids) for example in held)
    assert texts == ["w0 w1 w9", "w0 w9 w9", "w10 w7 w9", "w10 w8 w9"]


def test_the_order_of_the_rows_decides_nothing() -> None:
    of = rows(a=40, b=40)
    other = of[::-1]
    first = {of[int(place.split()[1])]["text"] for place in places(parts(of, "25%")[1])}
    assert first == {other[int(place.split()[1])]["text"] for place in places(parts(other, "25%")[1])}


@pytest.mark.parametrize(
    ("labels", "share", "expected"),
    [
        ({"a": 60, "b": 30, "c": 10}, "10%", [6, 3, 1]),
        ({"a": 60, "b": 30, "c": 10}, "12.5%", [8, 4, 1]),  # 13 of 7.5, 3.75 and 1.25: the rests are .5, .75, .25
        ({"a": 20, "b": 1}, "50%", [11, 0]),  # 10.5 is 11, of which b, with one text, has none
        ({"a": 2, "b": 2}, "75%", [1, 1]),  # a text of each is learned
        ({"a": 10, "b": 10}, "5%", [1]),
    ],
)
def test_each_label_has_its_part(labels: dict[str, int], share: str, expected: list[int]) -> None:
    of = rows(**labels)
    learned, held = parts(of, share)
    found = Counter(int(example.targets[0]) for example in held)
    got = [found[number] for number in range(len(labels))]
    assert got == expected or (len(expected) == 1 and sorted(got) == [0, 1])
    assert {int(example.targets[0]) for example in learned} == set(range(len(labels)))


def test_a_language_model_has_no_labels_to_balance() -> None:
    assert [len(part) for part in parts(rows(a=30, b=10), "10%", task="causal-lm")] == [36, 4]


def test_rows_of_one_text_are_on_one_side() -> None:
    """Whatever their labels, and where only what is cut off tells them apart."""
    once = rows(a=30, b=30)
    twice = [row | {"label": "b"} for row in once[:20]]
    long = [{"text": "w1 " * 16 + end, "label": "a"} for end in ("w2", "w3", "w4")]
    for seed in range(5):
        learned, held = parts(once + twice + long, "30%", seed=seed)
        assert not {e.input_ids.tobytes() for e in learned} & {e.input_ids.tobytes() for e in held}
        assert len(held) == 25  # 24.9


def test_a_label_whose_text_has_others_too_is_learned() -> None:
    """The text of its only row may not be held out with the rows of the same text that have another label."""
    of = [{"text": "w0 w0", "label": label} for label in "ab"] + [{"text": f"w{n} w0", "label": "a"} for n in range(9)]
    for seed in range(20):
        for turned in (of, of[::-1]):
            learned, held = parts(turned, "30%", seed=seed)
            assert {int(example.targets[0]) for example in learned} == {0, 1}
            assert len(held) == 3


def test_the_turns_of_a_conversation_are_on_one_side() -> None:
    """Also where each is learned from a text of its own, which begins with the turns before."""
    talks = [[f"w{n} w1", f"w8 w9 w{n}", f"w2 w{n}", "w3"] for n in range(1, 7)]
    talks.append(["w7 w7", "w8 w9 w7", "w4", "w5"])
    talks.append([*talks[-1][:2], "w4 w4", "w5 w5"])  # whose first text is that of the one before
    of = [{"messages": tiny_chat.said(*talk)} for talk in talks]
    config = tiny_run.quiet(task="causal-lm", max_length=64)
    examples, _ = load_examples(of, config, tiny_chat.tokenizer(tiny_chat.FORGETS))
    texts = numbered(examples)
    assert len(texts) == 16
    for seed in range(10):
        learned, held = split(texts, HeldOut(of, "25%", seed), targets=None)
        assert len(held) in (2, 4)
        assert not set(places(learned)) & set(places(held))
        assert len({"row 6", "row 7"} & set(places(held))) in (0, 2)


def test_texts_that_are_packed_into_a_row_are_parted() -> None:
    """They are separate texts; one that is in every row would hold all rows together."""
    of = [{"input_ids": [1, 5, 6, 1, 7, n], "position_ids": [0, 1, 2] * 2} for n in range(3, 23)]
    examples, _ = load_examples(of, tiny_run.quiet(task="causal-lm"), TOKENIZER)
    learned, held = split(numbered(examples), HeldOut(of, "10%", 0), targets=None)
    assert (len(learned), len(held)) == (36, 4)
    assert [5, 6] not in [example.targets.tolist() for example in held]


def test_a_text_with_more_rows_than_are_left_is_learned() -> None:
    of = rows(a=10, b=10) + [{"text": "w7 w7", "label": "a"}] * 20
    for seed in range(5):
        assert len(parts(of, "10%", seed=seed)[1]) == 4
    same = [{"text": f"w{n // 5}", "label": "ab"[n % 5 < 2]} for n in range(20)]
    message = r"got 10%, which is 2 of 20 rows, of 4 texts; rows of one text stay together"
    with pytest.raises(ValueError, match=message):
        parts(same, "10%")


@pytest.mark.parametrize(
    ("share", "got"), [("1%", "1%, which is 0 of 20 rows"), ("99%", "99%, which is 20 of 20 rows")]
)
def test_each_side_has_a_row(share: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"eval_data: expected a share that leaves rows to learn .* got {got}$"):
        parts(rows(a=10, b=10), share)


@pytest.mark.parametrize("data", ["0%", "100%", "0.0%", "250%"])
def test_a_share_is_within_0_and_100_percent(data: str) -> None:
    with pytest.raises(ValueError, match=f"eval_data: expected a share above 0% and below 100%, .* got '{data}'"):
        is_share(data)


@pytest.mark.parametrize("data", ["0.1", "10", 0.1, 10, "1e-1"])
def test_a_number_is_no_share(data: Any) -> None:
    with pytest.raises(ValueError, match=r"a share of the training rows such as '10%', got '?(0.1|10|1e-1)'?$"):
        train(tiny_run.model(), tiny_run.rows(8), CONFIG, tokenizer=TOKENIZER, eval_data=data)


def test_files_and_datasets_are_no_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2024").mkdir()
    assert not any(map(is_share, ("a.csv", "./10%", "user/data:train[:10%]", "2024", [], None, Path("10%"))))
    assert is_share("12.5%")


def run(of: Any, model: Any = None, share: Any = "25%", **values: Any) -> Any:
    config = tiny_run.quiet(**values)
    return train(model or tiny_run.model(), of, config, tokenizer=TOKENIZER, eval_data=share)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_evaluate_repeats_the_last_evaluation(task: str, tmp_path: Path) -> None:
    model, of = tiny_run.model(), tiny_run.rows(24)
    metrics = run(of, model, task=task, output_dir=tmp_path, seed=3).metrics
    config, head = load_run(tmp_path)
    again = evaluate(model, HeldOut(of, "25%", 3), config, tokenizer=TOKENIZER, head=head)
    assert again["targets"] == metrics["targets"] > 0
    for name in ("loss", "accuracy"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-5)
    other = evaluate(model, HeldOut(of, "25%", 4), config, tokenizer=TOKENIZER, head=head)
    assert other["loss"] != pytest.approx(metrics["loss"], rel=1e-5)


def test_both_parts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_run.rows(24)))
    run(path, progress=True, output_dir=tmp_path / "run")
    said = capsys.readouterr().err
    assert "train  75% of reviews.jsonl: 18 texts; " in said
    assert "eval   25% of reviews.jsonl: 6 texts; " in said
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Trained on 75% of reviews.jsonl: 18 examples. Evaluated on 25% of reviews.jsonl: 6 examples." in card
    summary = json.loads((tmp_path / "run" / "data_summary.json").read_text())
    assert [summary[part]["counts"]["texts"] for part in ("train", "eval")] == [18, 6]


def test_resume_finds_the_same_parts(tmp_path: Path) -> None:
    of = tiny_run.rows(24)
    whole = run(of, output_dir=tmp_path)
    first, last = checkpoints(tmp_path)
    shutil.rmtree(last)
    with pytest.raises(CheckpointError, match="data"):
        run(of, share="50%", output_dir=tmp_path, resume=True)
    resumed = run(of, output_dir=tmp_path, resume=True)
    assert resumed.steps == whole.steps == 10
    assert first.name == "step-00000005"
    assert resumed.metrics["loss"] == whole.metrics["loss"]


def test_sources_say_file_share_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").touch()
    part = HeldOut("x.csv", "10%", 3, "ab")
    save_sources(tmp_path, Sources("hub/name", eval_data=part))
    saved = json.loads((tmp_path / "sources.json").read_text())
    assert saved["eval_data"] == {"train_data": str(tmp_path / "x.csv"), "share": "10%", "seed": 3, "sha256": "ab"}
    assert load_sources(tmp_path).eval_data == dataclasses.replace(part, train_data=str(tmp_path / "x.csv"))
    for name, value in (("share", "200%"), ("seed", True), ("train_data", None)):
        (tmp_path / "sources.json").write_text(json.dumps(saved | {"eval_data": saved["eval_data"] | {name: value}}))
        with pytest.raises(ValueError, match=r"sources.json: eval_data: .*expected"):
            load_sources(tmp_path)


def test_a_file_that_has_changed_is_refused() -> None:
    model, of = tiny_run.model(), tiny_run.rows(24)
    result = run(of, model)
    part = HeldOut(of + tiny_run.rows(4, seed=1), "25%", 0, "0" * 64)
    with pytest.raises(
        DataError, match="data: expected the rows of the training, of which 25% were held out, got othe"
    ):
        evaluate(model, part, TrainConfig(progress=False), tokenizer=TOKENIZER, head=result.head)
