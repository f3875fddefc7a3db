"""Many tasks on one backbone: training them together gives each the result of training it alone."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import adapterkern as ak
from adapterkern import cli
from adapterkern.recipes.multitask import MultiTask, Prediction
from adapterkern.recipes.multitask.sampling import shares
from adapterkern.training import NonFiniteError, TrainConfig, TrainResult, evaluate, load_run, train
from adapterkern.training.feed import Feed
from adapterkern.training.run.checkpoint import checkpoints
from adapterkern.training.run.results import CheckpointError
from adapterkern.training.saved import Sources, load_kind
from tests.support import tiny_run
from tests.support.tiny_recipes import ADAPTERS, many_adapters

TOKENIZER = tiny_run.tokenizer()
COUNTS = {"a": 24, "b": 8, "c": 16}
DATA = {name: tiny_run.rows(count, seed=n) for n, (name, count) in enumerate(COUNTS.items())}
UNSEEN = {name: tiny_run.rows(10, seed=10 + n) for n, name in enumerate(COUNTS)}


def config(**values: Any) -> TrainConfig:
    # eps: where a gradient is almost 0, Adam makes any step of its rounding. max_norm: every step is clipped.
    return tiny_run.quiet(**({"batch_size": 12, "eps": 1e-4, "max_norm": 0.05, "log_every": 1} | values))


def together(multi: MultiTask, data: Any = DATA, eval_data: Any = None, **values: Any) -> TrainResult:
    return train(multi.model, data, config(**values), tokenizer=TOKENIZER, eval_data=eval_data, task=multi)


def trained(task: MultiTask, name: str) -> list[torch.Tensor]:
    head = task.heads[name] if name in task.heads else torch.nn.Module()
    return [p.detach().clone() for p in (*task.model.adapter_parameters(name), *head.parameters())]


def assert_as_alone(multi: MultiTask, name: str, data: Any = DATA, **values: Any) -> dict[str, float]:
    """Train ``name`` by the plain task on its own share of every batch, and compare all parameters."""
    single = many_adapters([name])
    single.set_adapter(name)
    result = train(single, data[name], config(**values), tokenizer=TOKENIZER, eval_data=UNSEEN[name])
    head = result.head.parameters() if result.head is not None else ()
    start = many_adapters([name]).adapter_parameters(name)
    moved = 0.0
    for p, expected in zip(trained(multi, name), [*single.adapter_parameters(), *head], strict=True):
        torch.testing.assert_close(p, expected.detach(), rtol=2e-4, atol=2e-5)
    for p, before in zip(single.adapter_parameters(), start, strict=True):
        moved = max(moved, (p - before).abs().max().item())
    assert moved > 0.01  # training moved parameters 500 times further than they may differ
    assert result.metrics is not None
    return result.metrics


# Together as alone


@pytest.mark.parametrize("values", [{}, {"prefix_cache": False}, {"batch_size": 6, "accumulation": 2}], ids=str)
def test_each_task_as_if_trained_alone(values: dict[str, Any]) -> None:
    """Of 12 rows per step a, b and c have 6, 2 and 4: the plain task with such batches must give the same."""
    task = MultiTask(many_adapters(), list(ADAPTERS))
    result = together(task, eval_data=UNSEEN, **values)
    assert result.steps == 8
    assert result.metrics is not None
    for name, batch_size in (("a", 6), ("b", 2), ("c", 4)):
        alone = assert_as_alone(task, name, batch_size=batch_size)
        assert result.metrics[f"{name}/loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert result.metrics[f"{name}/accuracy"] == alone["accuracy"]
    losses = [result.metrics[f"{name}/loss"] for name in ADAPTERS]
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 3)  # as many rows of each
    assert result.metrics["targets"] == 30


def test_a_step_without_a_task_leaves_it_alone() -> None:
    """One row per step: b has a step only where it has the row, and then its moments count as many steps."""
    task = MultiTask(many_adapters(), ["a", "b"])
    values = {"batch_size": 1, "schedule": "constant", "warmup": 0}
    assert together(task, {name: DATA[name] for name in "ab"}, **values).steps == 64
    for name in "ab":
        assert_as_alone(task, name, **values)


def test_language_models_share_the_backbone_s_head() -> None:
    rows = {
        name: [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + step} w{i + 60} w3"} for i in range(0, 16, 2)]
        for name, step in (("a", 30), ("b", 31))
    }
    task = MultiTask(many_adapters(), ["a", "b"])
    result = together(task, rows, eval_data=rows, task="causal-lm", batch_size=8, epochs=3)
    assert result.metrics is not None
    for name in "ab":
        assert_as_alone(task, name, rows, task="causal-lm", batch_size=4, epochs=3)
        loss = result.metrics[f"{name}/loss"]
        assert result.metrics[f"{name}/perplexity"] == pytest.approx(math.exp(loss))


def test_checkpointing_and_unfused_and_bf16_give_the_same_or_nearly() -> None:
    expected = MultiTask(many_adapters(), list(ADAPTERS))
    together(expected)
    recomputed, unfused = MultiTask(many_adapters(), list(ADAPTERS)), MultiTask(many_adapters(), list(ADAPTERS))
    recomputed.model.gradient_checkpointing_enable()
    unfused.model.fused = False
    together(recomputed, prefix_cache=True)
    together(unfused)
    for name in ADAPTERS:
        for other in (recomputed, unfused):
            for p, e in zip(trained(other, name), trained(expected, name), strict=True):
                torch.testing.assert_close(p, e, rtol=2e-4, atol=2e-5)
    history = together(MultiTask(many_adapters(), list(ADAPTERS)), precision="bf16").history
    assert [r["loss"] for r in history] == pytest.approx(
        [r["loss"] for r in together(MultiTask(many_adapters(), list(ADAPTERS))).history], rel=0.05
    )


@pytest.mark.slow
def test_each_learns_its_own_rule() -> None:
    """b's labels are a's swapped: one adapter for both could not learn them."""
    swapped = [row | {"label": {"no": "yes", "yes": "no"}[row["label"]]} for row in tiny_run.rows(800)]
    unseen = tiny_run.rows(200, seed=1)
    wrong = [row | {"label": {"no": "yes", "yes": "no"}[row["label"]]} for row in unseen]
    made = tiny_run.model()
    for name in "ab":
        made.add_adapter(name, ak.AdapterConfig(adapter_dim=8, layers=(0, 1, 2, 3)))
    task = MultiTask(made, ["a", "b"])
    data = {"a": tiny_run.rows(800), "b": swapped}
    values = {"epochs": 4, "batch_size": 32, "lr": 2e-2, "max_norm": 1.0, "eps": 1e-8}
    metrics = together(task, data, {"a": unseen, "b": wrong}, **values).metrics
    assert metrics is not None
    assert min(metrics["a/accuracy"], metrics["b/accuracy"]) >= 0.9
    texts, tasks = [row["text"] for row in unseen for _ in "ab"], ["a", "b"] * 200
    predictions = task.classify(texts, tasks, config(), TOKENIZER)
    assert [p.task for p in predictions] == tasks
    labels = [row["label"] for pair in zip(unseen, wrong, strict=True) for row in pair]
    right = [p.label == label for p, label in zip(predictions, labels, strict=True)]
    assert sum(right[::2]) / 200 == pytest.approx(metrics["a/accuracy"])
    assert sum(right[1::2]) / 200 == pytest.approx(metrics["b/accuracy"])
    assert all(0.5 <= p.probability <= 1 for p in predictions)
    assert task.classify([], [], config(), TOKENIZER) == []


def test_predicts_a_batch() -> None:
    task = MultiTask(many_adapters(), list(ADAPTERS))
    examples = task.load(DATA, config(), TOKENIZER)
    batch = Feed(task.eval(), config(), None)([examples[i] for i in (30, 0, 40, 1)])
    predicted = task.predict(batch)
    assert [p.task for p in predicted] == ["b", "a", "c", "a"]
    rows = [DATA["b"][6], DATA["a"][0], DATA["c"][8], DATA["a"][1]]
    for row, prediction in zip(rows, predicted, strict=True):
        (alone,) = task.classify([row["text"]], [prediction.task], config(), TOKENIZER)
        assert (alone.task, alone.label) == (prediction.task, prediction.label)
        assert alone.probability == pytest.approx(prediction.probability)
    assert isinstance(predicted[0], Prediction)
    assert len({p.probability for p in predicted}) == 4
    with pytest.raises(NotImplementedError, match=r"use model\.generate"):
        MultiTask(many_adapters(), list(ADAPTERS)).predict(batch)


def test_a_number_that_is_not_finite_stops_every_task() -> None:
    task = MultiTask(many_adapters(), ["a", "b"])
    with torch.no_grad():
        task.model.adapter_parameters("b")[0].fill_(math.inf)
    before = trained(task, "a")
    with pytest.raises(NonFiniteError, match="step 1: "):
        together(task, {name: DATA[name] for name in "ab"})
    assert tiny_run.same_bits(trained(task, "a")[: len(before)], before)


# The order of rows


def order(task: MultiTask, epoch: int, **values: Any) -> list[int]:
    c = config(**values)
    return task.order(task.load(DATA, c, TOKENIZER), c, epoch)


def test_every_step_has_every_task_s_share() -> None:
    task = MultiTask(many_adapters(), list(ADAPTERS))
    for epoch in range(3):
        rows = order(task, epoch)
        assert sorted(rows) == list(range(48))
        for start in range(0, 48, 12):
            step = rows[start : start + 12]
            assert [sum(low <= i < high for i in step) for low, high in ((0, 24), (24, 32), (32, 48))] == [6, 2, 4]
    assert order(task, 0) == order(task, 0) != order(task, 1)
    assert order(task, 0) != order(task, 0, seed=1)


def test_with_equal_shares_small_tasks_go_round_and_round() -> None:
    """48 places, 16 each: b's 8 rows twice per epoch, two thirds of a's 24, which continue in the next epoch."""
    task = MultiTask(many_adapters(), list(ADAPTERS), temperature=math.inf)
    two = [i for epoch in range(3) for i in order(task, epoch)]
    for low, high in ((0, 24), (24, 32), (32, 48)):
        mine = [i for i in two if low <= i < high]
        assert len(mine) == 48
        for start in range(0, 48, high - low):
            assert sorted(mine[start : start + high - low]) == list(range(low, high))


@hypothesis.given(
    rows=st.lists(st.integers(1, 500), min_size=1, max_size=6), temperature=st.sampled_from([1.0, 2.0, 5.0, math.inf])
)
def test_shares_are_whole_and_as_near_as_whole_numbers_come(rows: list[int], temperature: float) -> None:
    counts = shares(rows, temperature)
    assert sum(counts) == sum(rows)
    assert min(counts) >= 1
    if temperature == 1:
        assert counts == rows
    weights = [n ** (1 / temperature) for n in rows]
    exact = [sum(rows) * w / sum(weights) for w in weights]
    raised = sum(1 for e in exact if e < 1)  # each of these has a place that another task lacks
    assert all(abs(c - e) < 1 + raised for c, e in zip(counts, exact, strict=True))


# Files


def test_resumes_to_the_bit(tmp_path: Path) -> None:
    values = {"checkpoint_every": 1, "keep_checkpoints": 9, "eval_every": 3}

    def go(folder: Path, temperature: float = 2.0, **more: Any) -> tuple[MultiTask, TrainResult]:
        task = MultiTask(many_adapters(), list(ADAPTERS), temperature=temperature)
        return task, together(task, eval_data=UNSEEN, output_dir=folder, **values, **more)

    whole, result = go(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for checkpoint in checkpoints(tmp_path / "broken")[5:]:
        shutil.rmtree(checkpoint)
    resumed, again = go(tmp_path / "broken", resume=True)
    assert again.steps == result.steps == 8
    for name in ADAPTERS:
        assert tiny_run.same_bits(trained(resumed, name), trained(whole, name))
    losses = [[r["loss"] for r in result_.history] for result_ in (result, again)]
    assert losses[0] == losses[1]
    with pytest.raises(CheckpointError, match=r"the run was begun with temperature=2\.0, not 3\.0"):
        go(tmp_path / "broken", temperature=3.0, resume=True)
    damaged = checkpoints(tmp_path / "broken")[-1] / "tasks" / "b" / "head.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"tasks/b/head.safetensors: damaged"):
        go(tmp_path / "broken", resume=True)
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        go(tmp_path / "broken")


def test_saved_together_used_alone_and_together(tmp_path: Path) -> None:
    task = MultiTask(many_adapters(), list(ADAPTERS), temperature=math.inf)
    metrics = together(task, eval_data=UNSEEN, output_dir=tmp_path).metrics
    assert metrics is not None
    backbone = tiny_run.model().unload()
    assert load_kind(tmp_path) == "MultiTask"
    for folder in (tmp_path, checkpoints(tmp_path)[-1]):
        for name in ADAPTERS:
            own = task.folder(folder, name)
            single = ak.LlamaAdapter.from_pretrained(copy.deepcopy(backbone), own)
            saved_config, head = load_run(own)
            assert load_kind(own) == "Task"
            scores = evaluate(single, UNSEEN[name], saved_config, tokenizer=TOKENIZER, head=head)
            assert scores["loss"] == pytest.approx(metrics[f"{name}/loss"], rel=1e-5)
            assert scores["accuracy"] == metrics[f"{name}/accuracy"]
        loaded, saved_config = MultiTask.from_pretrained(copy.deepcopy(backbone), folder)
        assert loaded.temperature == math.inf
        data: Any = UNSEEN
        scores = evaluate(loaded.model, data, saved_config, tokenizer=TOKENIZER, task=loaded)
        assert scores["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        subset: Any = {"b": UNSEEN["b"]}
        assert set(evaluate(loaded.model, subset, saved_config, tokenizer=TOKENIZER, task=loaded)) >= {"b/accuracy"}


def test_a_run_that_stopped_before_its_first_checkpoint_may_begin_again(tmp_path: Path) -> None:
    """Until then nothing is written."""
    data = {name: DATA[name] for name in "ab"}
    sources = {f"tasks/{name}": Sources("somewhere") for name in data}
    task = MultiTask(many_adapters(), ["a", "b"])
    with torch.no_grad():
        task.model.adapter_parameters("b")[0].fill_(math.nan)
    with pytest.raises(NonFiniteError):
        train(task.model, data, config(output_dir=tmp_path), tokenizer=TOKENIZER, task=task, sources=sources)
    assert not list(tmp_path.iterdir())
    together(MultiTask(many_adapters(), ["a", "b"]), data, output_dir=tmp_path, max_steps=1)


def test_another_run_takes_the_place_of_all_tasks(tmp_path: Path) -> None:
    """Also where the checkpoints, which list what a run has saved, are gone."""
    for names in ("ab", "a"):
        task = MultiTask(many_adapters(), list(names))
        data = {name: DATA[name] for name in names}
        together(task, data, output_dir=tmp_path, max_steps=1, overwrite=names == "a")
        assert {path.name for path in (tmp_path / "tasks").iterdir()} == {*names, "multitask.json"}
        shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        together(task, data, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "expected format_version 1, got 2"),
        ("tasks", "a", "field 'tasks': expected list, got 'a'"),
        ("tasks", ["a", "../a"], "field 'tasks': expected names"),
        ("tasks", [], "field 'tasks': expected names"),
        ("tasks", [""], "field 'tasks': expected names"),
        ("temperature", "hot", r"field 'temperature': expected int \| float \| None, got 'hot'"),
        ("temperature", 0.5, r"temperature: expected a number in \[1, inf\], got 0.5"),
    ],
)
def test_refuses_damaged_settings(tmp_path: Path, field: str, value: object, message: str) -> None:
    task = MultiTask(many_adapters(["a"]), ["a"])
    together(task, {"a": DATA["a"]}, output_dir=tmp_path, max_steps=1)
    path = tmp_path / "tasks" / "multitask.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=f"multitask.json: .*{message}"):
        MultiTask.from_pretrained(tiny_run.model().unload(), tmp_path)


def test_refuses_what_does_not_fit() -> None:
    made = many_adapters()
    with pytest.raises(ValueError, match="name: expected one of default, a, b, c, got 'x'"):
        MultiTask(made, ["a", "x"])
    with pytest.raises(ValueError, match="names: expected at least one and none twice"):
        MultiTask(made, ["a", "a"])
    for temperature, error in ((0, ValueError), (math.nan, ValueError), ("hot", TypeError)):
        with pytest.raises(error, match=rf"temperature: expected a number in \[1, inf\], got '?{temperature}"):
            MultiTask(made, ["a"], temperature=temperature)
    with pytest.raises(ValueError, match="heads: expected tasks among a, got 'b'"):
        MultiTask(made, ["a"], heads={"b": ak.training.ClassificationHead(32, ["x", "y"])})
    task = MultiTask(made, ["a", "b"])
    for data, error, message in (
        (DATA["a"], TypeError, "data: expected a mapping from task names to rows, got list"),
        (DATA, ValueError, "data: expected tasks among 'a', 'b', got 'c'"),
        ({"a": DATA["a"]}, ValueError, "data: expected rows of all tasks, 'a', 'b'; 'b' is missing"),
    ):
        with pytest.raises(error, match=message):
            together(task, data)
    rows = [{"text": "w1 w2"}]
    for data, message in (
        ({"a": rows}, "data: expected rows of all tasks, 'a', 'b'; 'b' is missing"),
        ({}, "data: expected rows of tasks among 'a', 'b', got none"),
    ):
        with pytest.raises(ValueError, match=message):
            together(task, data, task="causal-lm")
    with pytest.raises(ValueError, match="train_adapters: expected True"):
        together(task, {name: DATA[name] for name in "ab"}, train_adapters=False)
    with pytest.raises(ValueError, match="tasks: expected one for each of 2 texts, got 1"):
        task.classify(["w1", "w2"], ["a"], config(), TOKENIZER)
    with pytest.raises(ValueError, match="got 'z'"):
        task.classify(["w1"], ["z"], config(), TOKENIZER)
    task.load({name: DATA[name] for name in "ab"}, config(), TOKENIZER)
    with pytest.raises(ValueError, match="'b' is missing"):  # it has a head now, and would still learn nothing
        together(task, {"a": DATA["a"]})
    with pytest.raises(ValueError, match="texts: expected none empty, got ''"):
        task.classify(["w1", ""], ["a", "b"], config(), TOKENIZER)
    task.train()
    with pytest.raises(ValueError, match="tokenizer: expected token ids below the model's 128, got 10000"):
        task.classify(
            ["w1"],
            ["a"],
            config(),
            lambda texts, **_: {"input_ids": [10_000] if isinstance(texts, str) else [[10_000]]},
        )
    assert all(module.training for module in task.modules())


def test_another_kind_of_run_is_not_resumed(tmp_path: Path) -> None:
    one = many_adapters(["a"])
    train(one, DATA["a"], config(output_dir=tmp_path, max_steps=1), tokenizer=TOKENIZER)
    with pytest.raises(CheckpointError, match="the run was begun with another task: Task, not MultiTask"):
        together(MultiTask(one, ["a"]), {"a": DATA["a"]}, output_dir=tmp_path, max_steps=1, resume=True)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny_run.model().unload().save_pretrained(tmp_path / "model")
    arguments = ["multitask", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")]
    for name in "ab":
        for kind, rows in (("train", DATA[name]), ("test", UNSEEN[name])):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}-{kind}.jsonl").write_text(lines)
        arguments += ["--data", name, str(tmp_path / f"{name}-train.jsonl"), str(tmp_path / f"{name}-test.jsonl")]
    more = ["--layers=-2,-1", "--adapter-dim", "4", "--epochs", "1", "--no-progress", "--no-plot"]
    own = ["--adapters", "b", '{"adapter_dim": 2, "layers": [-1]}', "--temperature", "inf"]
    assert cli.main([*arguments, *more, *own]) == 0
    shown = capsys.readouterr().out
    assert f"b: {2 * 65 + 96} adapter parameters" in shown
    checkpoint = checkpoints(tmp_path / "run")[-1]
    for folder in (checkpoint, tmp_path / "run"):  # the checkpoint must have the run's scores
        assert cli.main(["eval", str(folder / "tasks" / "b")]) == 0
    accuracy = next(line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy"))
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("b/accuracy ")] == [accuracy]
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    again = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert again["b/accuracy"] == accuracy
    for wrong, message in (
        (["--data", "a", "x.csv"], "--data: expected each name once, got a twice"),
        (["--adapters", "z", "{}"], "--adapters: expected a task among a, b, got 'z'"),
        (["--adapters", "a", "[]"], "--adapters: expected a JSON object of fields, got []"),
        (["--adapters", "a", "{bad"], "--adapters: expected a JSON object of fields, got {bad: "),
    ):
        assert cli.main([*arguments, *more, *wrong]) == 1
        assert message in capsys.readouterr().err
