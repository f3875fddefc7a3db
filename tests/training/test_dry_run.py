"""A dry run says what a run learns and takes, and leaves everything as it was."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from adapterkern.recipes.distillation import KeepBehaviour, WithKept
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.recipes.qa import QuestionAnswering
from adapterkern.recipes.routing import RoutedTask
from adapterkern.training import PrefixCache, TrainResult, load_examples, processes, train
from adapterkern.training.dry_run import decoded, described, say
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.run.checkpoint import checkpoints
from adapterkern.training.run.report import Reporter
from adapterkern.training.task import Task
from tests.support import tiny_chat, tiny_qa, tiny_recipes, tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(24)


def run(model: Any = None, dry_run: bool = False, **values: Any) -> TrainResult:
    config = tiny_run.quiet(**({"log_every": 1} | values))
    of = model or tiny_run.model()
    return train(of, ROWS, config, tokenizer=TOKENIZER, eval_data="25%", dry_run=dry_run)


def generators() -> list[Any]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_has_the_same_bits_after_a_dry_run(precision: str) -> None:
    plain, after = tiny_run.model(), tiny_run.model()
    expected = run(plain, precision=precision)
    before = tiny_run.weights(after)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    drawn = generators()
    first = next(iter(after.adapter_parameters()))
    first.grad = torch.ones_like(first)
    result = run(after, dry_run=True, precision=precision)
    assert result.dry_run is not None
    assert generators() == drawn
    assert tiny_run.same_bits(tiny_run.weights(after), before)
    assert first.grad is not None
    assert first.grad.eq(1).all()
    assert sum(p.grad is not None for p in after.parameters()) == 1
    first.grad = None
    got = run(after, precision=precision)
    timed = ("seconds", "tokens_per_second")
    bare = [[{k: v for k, v in r.items() if k not in timed} for r in found.history] for found in (got, expected)]
    assert bare[0] == bare[1]
    assert tiny_run.same_bits(tiny_run.weights(after, got.head), tiny_run.weights(plain, expected.head))


def test_what_it_finds() -> None:
    result = run(dry_run=True, epochs=3, eval_every=2)
    found = result.dry_run
    assert found is not None
    assert (result.steps, result.stopped, result.metrics, result.history) == (0, False, None, [])
    assert (found.steps, found.evaluations) == (15, 8)  # 18 rows in steps of 4: after 2, 4, ..., 14 and 15
    head = ClassificationHead(32, ["no", "yes"])
    adapters = tiny_run.model().adapter_parameters()
    trained = sum(p.numel() for p in (*adapters, *head.parameters()))
    assert found.trainable_parameters == result.trainable_parameters == trained
    assert found.trained_bytes == 12 * trained
    assert found.all_parameters == trained + sum(p.numel() for p in tiny_run.model().unload().parameters())
    assert found.weights_bytes == 4 * found.all_parameters
    assert found.peak_bytes > found.weights_bytes
    tokens = sum(len(e.input_ids) for e in load_examples(ROWS, tiny_run.quiet(), TOKENIZER)[0])
    assert found.cache_bytes == tokens * 32 * 4
    parts = found.steps * found.step_seconds + found.evaluations * found.eval_seconds + found.prefix_seconds
    assert found.seconds >= parts > 0
    assert min(found.step_seconds, found.eval_seconds, found.prefix_seconds) > 0


def test_a_run_of_one_step_without_evaluation_and_cache() -> None:
    config = tiny_run.quiet(max_steps=1, prefix_cache=False)
    found = train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER, dry_run=True).dry_run
    assert found is not None
    assert (found.steps, found.evaluations, found.eval_seconds) == (1, 0, 0)
    assert (found.prefix_seconds, found.cache_bytes) == (0, 0)
    assert found.step_seconds > 0


def test_nothing_is_written_or_removed(tmp_path: Path) -> None:
    run(dry_run=True, output_dir=tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())
    run(output_dir=tmp_path)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        run(dry_run=True, output_dir=tmp_path)
    assert run(dry_run=True, output_dir=tmp_path, overwrite=True).dry_run is not None
    finished = run(dry_run=True, output_dir=tmp_path, resume=True)
    assert finished.dry_run is not None
    assert (finished.steps, finished.dry_run.steps, finished.dry_run.evaluations) == (10, 0, 1)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_of_a_run_that_is_resumed(tmp_path: Path) -> None:
    run(output_dir=tmp_path)
    for name in (checkpoints(tmp_path)[-1]).iterdir():
        name.unlink()
    checkpoints(tmp_path)[-1].rmdir()
    model = tiny_run.model()
    before = tiny_run.weights(model)
    result = run(model, dry_run=True, output_dir=tmp_path, resume=True)
    assert result.dry_run is not None
    assert (result.steps, result.dry_run.steps, result.dry_run.evaluations) == (5, 5, 1)
    assert tiny_run.same_bits(tiny_run.weights(model), before)


def test_a_users_cache_and_head_are_left_alone() -> None:
    cache, model = PrefixCache(), tiny_run.model()
    config = tiny_run.quiet(prefix_cache=True)
    head = ClassificationHead(32, ["no", "yes"])
    before = tiny_run.weights(None, head)
    train(model, ROWS, config, tokenizer=TOKENIZER, cache=cache, head=head, dry_run=True)
    assert len(cache) == 0
    assert tiny_run.same_bits(tiny_run.weights(None, head), before)
    task: Task[Any] = Task(model)
    train(model, ROWS, config, tokenizer=TOKENIZER, task=task, dry_run=True)
    assert task.head is None
    labels = [{"text": "w1 w2", "label": name} for name in "abc"]  # others than those of the dry run
    assert train(model, labels, config, tokenizer=TOKENIZER, task=task).labels == ["a", "b", "c"]


def questions() -> Any:
    return QuestionAnswering(tiny_qa.model()), tiny_qa.EXAMPLES, tiny_qa.TOKENIZER, {"max_length": 128}


def several() -> Any:
    task = MultiTask(tiny_recipes.many_adapters(), list(tiny_recipes.ADAPTERS))
    return task, dict.fromkeys(tiny_recipes.ADAPTERS, ROWS), TOKENIZER, {}


def kept() -> Any:
    return KeepBehaviour(tiny_run.model()), WithKept(ROWS, tiny_run.rows(8, seed=1)), TOKENIZER, {}


def routed() -> Any:
    return RoutedTask(tiny_run.model()), ROWS, TOKENIZER, {}


@pytest.mark.parametrize("make", [questions, several, kept, routed])
def test_of_other_tasks(make: Callable[[], Any]) -> None:
    task, data, tokenizer, values = make()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    config = tiny_run.quiet(batch_size=8, **values)
    result = train(task.model, data, config, tokenizer=tokenizer, task=task, eval_data=data, dry_run=True)
    assert result.dry_run is not None
    assert result.dry_run.eval_seconds > 0
    assert task.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match="dry_run: expected one process, got 2"):
        run(dry_run=True)
    with pytest.raises(TypeError, match="dry_run: expected True or False, got 1"):
        train(tiny_run.model(), ROWS, tiny_run.quiet(), tokenizer=TOKENIZER, dry_run=1)


# What it shows


def shown(task: Any, example: Any, tokenizer: Any, color: bool = False) -> str:
    reporter = Reporter(None, 1)
    reporter.console = Console(width=200, force_terminal=color, color_system="standard" if color else None)
    with reporter.console.capture() as captured:
        say(reporter, described(task, example, tokenizer))
    return captured.get()


def labeled(text: str, max_length: int = 16) -> tuple[Any, Any]:
    task: Task[Any] = Task(tiny_run.model(), ClassificationHead(32, ["no", "yes"]))
    config = tiny_run.quiet(max_length=max_length)
    examples, _ = load_examples([{"text": text, "label": "yes"}], config, TOKENIZER, ["no", "yes"])
    return task, examples[0]


def test_a_text_and_its_label() -> None:
    task, example = labeled("w1 w2 w3")
    assert shown(task, example, TOKENIZER) == "row 0, 3 tokens:\n  w1 w2 w3\n  label: ⟦yes⟧\n"
    assert shown(task, example, TOKENIZER, color=True).endswith("label: \x1b[1;32myes\x1b[0m\n")
    task, example = labeled("w1 w2 w3 w4 w5", 3)
    assert "\n  w1 w2 w3 [cut here: 2 more]\n" in shown(task, example, TOKENIZER)
    task, example = labeled(" ".join(["w1"] * 250 + ["w2"] * 250), 500)
    assert "w1 w1 [... 100 more tokens ...] w2 w2" in " ".join(shown(task, example, TOKENIZER).split())


def test_tokens_that_are_learned() -> None:
    task: Task[Any] = Task(tiny_run.model())
    (example,), _ = load_examples([{"prompt": "w1 w2", "completion": "w3"}], tiny_chat.CONFIG, TOKENIZER)
    assert shown(task, example, TOKENIZER) == "row 0, 4 tokens:\n  w1 w2⟦ w3 </s>⟧\n"
    assert shown(task, example, None).endswith("\n  4 5 ⟦6 2 ⟧\n")
    assert "w1 w2\x1b[1;32m w3 </s>\x1b[0m" in shown(task, example, TOKENIZER, color=True)


def test_chat_messages() -> None:
    row = {"messages": tiny_chat.said("w1", "w2 w3", "w4", "w5", system="w6")}
    found = shown(Task(tiny_run.model()), tiny_chat.load(row), tiny_chat.tokenizer())
    turns = "<|im_start|> <unk> w6 <|im_end|> <|im_start|> <unk> w1 <|im_end|> <|im_start|> <unk>⟦ w2 w3 <|im_end|>⟧"
    assert turns in found
    assert found.count("⟦") == 2


def test_an_answer() -> None:
    task, data, tokenizer, _ = questions()
    row = tiny_qa.row("The plum is blue.", 4, 8)
    (window,) = task.load([row], tiny_qa.quiet(), tokenizer)
    found = shown(task, window, tokenizer)
    assert "Question: Which?↵\n  Context:↵\n  The⟦ plum⟧ is blue.↵\n  Answer:" in found
    assert found.endswith("label: ⟦plum⟧\n")
    assert data.exists()


def test_no_character_is_lost_between_tokens() -> None:
    """Characters of several tokens, spaces before words, and control characters, which a terminal would obey."""
    text = "a é \U0001f600 b"
    ids = tiny_qa.TOKENIZER(text)["input_ids"]
    for cut in range(len(ids) + 1):
        parts = [decoded(tiny_qa.TOKENIZER, ids, *part) for part in ((0, cut), (cut, len(ids)))]
        assert "".join(parts) == text or "\ufffd" in "".join(parts)
    task = labeled("w1")[0]
    ids = tiny_qa.TOKENIZER("a\x1b[31m\tb")["input_ids"]
    (example,), _ = load_examples([{"input_ids": ids, "label": "no"}], tiny_run.quiet(), None, ["no", "yes"])
    assert "a\\x1b[31m\\tb" in shown(task, example, tiny_qa.TOKENIZER)


def test_without_progress_it_goes_to_the_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("INFO"):
        run(dry_run=True)
    said = "\n".join(record.message for record in caplog.records)
    assert "row 0, " in said or "row 1, " in said
    assert "dry run: 3 steps were taken and undone, and nothing was written" in said
    assert capsys.readouterr() == ("", "")
