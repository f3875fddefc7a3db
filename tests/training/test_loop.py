"""The loop: it learns what can be learned, in every precision, changes nothing else, and reports non-finite numbers."""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkern.training import NonFiniteError, TrainConfig, TrainResult, evaluate, load_run, read_metrics, train
from adapterkern.training.data.batches import Batch
from adapterkern.training.data.examples import Example
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.optimization import make_optimizer
from adapterkern.training.run.lock import LOCK_NAME
from adapterkern.training.saved import Sources
from adapterkern.training.task import Task
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(24)


def run(model: Any = None, rows: Any = None, eval_rows: Any = None, **values: Any) -> TrainResult:
    config = tiny_run.quiet(**({"log_every": 1} | values))
    return train(model or tiny_run.model(), rows or ROWS, config, tokenizer=TOKENIZER, eval_data=eval_rows)


# Learning


def accuracy(rows: list[dict[str, Any]], unseen: list[dict[str, Any]], **values: Any) -> float:
    model = tiny_run.model(layers=(0, 1, 2, 3))
    metrics = run(model, rows, unseen, epochs=4, batch_size=16, lr=2e-2, **values).metrics
    assert metrics is not None
    return metrics["accuracy"]


@pytest.mark.slow
def test_learns_a_rule_and_not_noise() -> None:
    """The label says which of two words is in the text, which generalizes to unseen texts; random labels do not."""
    rows, unseen = tiny_run.rows(800), tiny_run.rows(200, seed=1)
    noise = [row | {"label": other["label"]} for row, other in zip(rows, tiny_run.rows(800, seed=2), strict=True)]
    learned, head_alone = accuracy(rows, unseen), accuracy(rows, unseen, train_adapters=False)
    assert learned >= 0.9
    assert 0.6 <= head_alone <= learned - 0.03
    assert accuracy(rows, unseen, pooling="last", padding_side="left") >= 0.9
    assert 0.35 <= accuracy(noise, unseen) <= 0.65


def test_language_model_learns_its_completions() -> None:
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 40} w{i + 60}"} for i in range(0, 16, 2)]
    result = run(rows=rows, eval_rows=rows, task="causal-lm", epochs=60, lr=3e-2, padding_side="left")
    assert result.metrics is not None
    assert result.metrics["accuracy"] >= 0.9
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]))


def test_only_what_is_trained_changes() -> None:
    model = tiny_run.model()
    model.eval()
    backbone = {name: p.clone() for name, p in model.base.state_dict().items()}
    before = tiny_run.weights(model)
    result = run(model)
    assert all(torch.equal(p, backbone[name]) for name, p in model.base.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(before, tiny_run.weights(model), strict=True))
    assert result.trainable_parameters == sum(p.numel() for p in model.adapter_parameters()) + 2 * 32 + 2
    assert not model.training


def test_head_alone_leaves_the_adapters_and_ignores_them() -> None:
    model, other = tiny_run.model(), tiny_run.model(init="xavier")
    before = tiny_run.weights(model)
    result = run(model, train_adapters=False)
    assert tiny_run.same_bits(tiny_run.weights(model), before)
    assert model.active_adapter == "default"
    assert result.trainable_parameters == 2 * 32 + 2
    again = run(other, train_adapters=False)
    assert tiny_run.same_bits(tiny_run.weights(None, result.head), tiny_run.weights(None, again.head))


def test_a_seed_repeats_to_the_bit_and_another_differs() -> None:
    def outcome(seed: int) -> list[torch.Tensor]:
        model = tiny_run.model()
        return tiny_run.weights(model, run(model, seed=seed).head)

    first = outcome(1)
    torch.manual_seed(123)
    assert tiny_run.same_bits(outcome(1), first)
    assert not tiny_run.same_bits(outcome(2), first)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_accumulation_changes_no_gradient(task: str) -> None:
    """Texts have different lengths: a mean of means would give their tokens unequal weights."""
    outcomes = []
    for batch_size, accumulation in ((8, 1), (3, 4), (2, 4)):
        if batch_size * accumulation == 12:
            continue
        model = tiny_run.model()
        values = {"task": task, "batch_size": batch_size, "accumulation": accumulation, "lr": 1e-3, "eps": 1e-4}
        result = run(model, **values)
        outcomes.append((tiny_run.weights(model), [r["loss"] for r in result.history]))
    (weights, losses), (weights_accumulated, losses_accumulated) = outcomes
    assert losses_accumulated == pytest.approx(losses, rel=1e-4)
    for a, b in zip(weights, weights_accumulated, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_steps_and_epochs() -> None:
    assert run(epochs=3, batch_size=5).steps == 15  # 24 rows: 5 steps per epoch, the last with 4 rows
    assert run(epochs=3, batch_size=5, accumulation=2).steps == 9
    assert run(max_steps=7).steps == 7


def test_every_row_is_seen_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    collate = Task.collate

    def seeing(self: Task[Example], examples: Sequence[Example], config: TrainConfig) -> Batch:
        seen.extend(e.row for e in examples)
        return collate(self, examples, config)

    monkeypatch.setattr(Task, "collate", seeing)
    run(epochs=2, batch_size=5, prefix_cache=False)
    assert sorted(seen[:24]) == list(range(24)) == sorted(seen[24:])
    assert seen[24:] != seen[:24]


# Precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_the_same(precision: str) -> None:
    low, full = run(precision=precision, epochs=4), run(precision="fp32", epochs=4)
    pairs = [(a["loss"], b["loss"]) for a, b in zip(low.history, full.history, strict=True)]
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=0.1, abs=0.02)
    assert pairs != [(b, b) for _, b in pairs]  # autocast was on
    assert all(p.dtype == torch.float32 for p in low.head.parameters())


def test_fp16_skips_are_counted_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale at which every fp16 gradient overflows: it is halved per step, and steps are skipped until it fits."""
    grown(monkeypatch, 2.0**40)
    result = run(precision="fp16", epochs=6, max_skipped_steps=36)
    assert 10 < result.skipped_steps < 36
    assert result.history[-1]["skipped_steps"] == result.skipped_steps
    assert result.history[0]["grad_norm"] == 0.0
    assert result.steps == 36


def grown(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=scale))


def test_too_many_fp16_skips_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    grown(monkeypatch, 2.0**40)
    with pytest.raises(NonFiniteError, match="step 4: 4 consecutive steps had gradients beyond fp16") as error:
        run(precision="fp16", max_skipped_steps=3)
    assert error.value.step == 4


def test_a_run_whose_every_step_was_skipped_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grown(monkeypatch, 2.0**40)
    with pytest.raises(NonFiniteError, match="step 6: 6 of 6 steps had gradients beyond fp16 and changed nothing"):
        run(precision="fp16", epochs=1, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "task.json").exists()
    run(precision="fp16", epochs=6, max_skipped_steps=36, progress=True)
    assert "of 36 steps had gradients beyond fp16 and changed nothing" in capsys.readouterr().err


def test_the_only_step_of_a_run_has_a_learning_rate() -> None:
    result = run(max_steps=1, log_every=1)  # the first step of a warmup, whose share would be one step, has 0
    assert result.history[0]["lr"] == 0.0  # after it
    model = tiny_run.model()
    before = tiny_run.weights(model)
    train(model, ROWS, tiny_run.quiet(max_steps=1), tokenizer=TOKENIZER)
    assert not tiny_run.same_bits(before, tiny_run.weights(model))


def test_rows_fewer_than_a_step_s_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    run(batch_size=len(ROWS) + 1, epochs=1, progress=True)
    said = f"{len(ROWS)} training rows are fewer than a step's {len(ROWS) + 1}"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "few"),
    [
        ({"epochs": 1}, "6 steps are few to learn new labels: 200 are 34 epochs here"),  # of 24 rows, 4 per step
        ({"epochs": 1, "batch_size": 30}, "1 step is few to learn new labels: 200 are 200 epochs here"),
        ({"max_steps": 6}, None),
        ({"epochs": 34}, None),
        ({"epochs": 1, "task": "causal-lm"}, None),
    ],
)
def test_few_steps_are_said(values: dict[str, Any], few: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    run(progress=True, **values)
    said = capsys.readouterr().err
    assert (few in said) if few else ("to learn new labels" not in said)


# Numbers that are not finite


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("log_every", [1, 100])
def test_nan_is_reported_with_its_step(precision: str, log_every: int) -> None:
    """One row has a token whose embedding is NaN; the order of rows says in which step it is."""
    from adapterkern.training.data.batches import epoch_order

    rows = tiny_run.rows(24)
    rows[17] = rows[17] | {"text": rows[17]["text"] + " w99"}
    order = epoch_order(24, seed=3, epoch=0)
    expected = order.index(17) // 4 + 1
    model = tiny_run.model()
    with torch.no_grad():
        model.decoder.embed_tokens.weight[tiny_run.VOCABULARY["w99"]] = math.nan
    with pytest.raises(NonFiniteError, match=f"step {expected}: the loss is nan; the step was not applied") as error:
        run(model, rows, seed=3, log_every=log_every, precision=precision, prefix_cache=False)
    assert error.value.step == expected > 1
    assert all(p.isfinite().all() for p in model.adapter_parameters())


def test_an_infinite_gradient_is_reported(tmp_path: Path) -> None:
    model = tiny_run.model()
    steps = []
    parameter = model.adapter_parameters()[0]

    def explode(grad: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return grad * math.inf if len(steps) == 4 else grad

    parameter.register_hook(explode)
    with pytest.raises(NonFiniteError, match=r"step 4: the gradient's norm is (nan|inf).*step-00000002"):
        run(model, output_dir=tmp_path, checkpoint_every=2)
    assert all(p.isfinite().all() for p in model.adapter_parameters())


def test_an_infinite_loss_with_finite_gradients_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, model, states = Task.forward, tiny_run.model(), []

    def infinite_in_step_3(self: Task[Example], batch: Batch) -> Any:
        loss, correct = forward(self, batch)
        states.append(tiny_run.weights(model))
        return (loss + math.inf if len(states) == 3 else loss), correct

    monkeypatch.setattr(Task, "forward", infinite_in_step_3)
    with pytest.raises(NonFiniteError, match="step 3: the loss is inf; the step was not applied"):
        run(model)
    assert tiny_run.same_bits(tiny_run.weights(model), states[2])
    assert not tiny_run.same_bits(states[2], states[1])


def test_a_non_finite_evaluation_is_reported() -> None:
    rows = tiny_run.rows(8, seed=1)
    rows[3] = rows[3] | {"text": "w99"}
    model = tiny_run.model()
    with torch.no_grad():
        model.decoder.embed_tokens.weight[tiny_run.VOCABULARY["w99"]] = math.inf
    with pytest.raises(NonFiniteError, match="step 2: the evaluation's loss is nan"):
        run(model, eval_rows=rows, eval_every=2)


# One run after another


def test_a_gradient_left_behind_goes_nowhere() -> None:
    """As an interrupted backward leaves it; the same objects are then trained again."""
    clean, model = tiny_run.model(), tiny_run.model()
    run(clean, max_steps=2)
    for p in model.adapter_parameters():
        p.grad = torch.ones_like(p)
    run(model, max_steps=2)
    assert tiny_run.same_bits(tiny_run.weights(model), tiny_run.weights(clean))
    assert all(p.grad is None for p in model.adapter_parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_task_is_as_it_was_after_a_run_and_an_evaluation(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_run.model()
    task: Task[Example] = Task(model)
    config = tiny_run.quiet(max_steps=1, precision=precision)

    def modes() -> list[bool]:
        return [module.training for module in task.modules()]

    model.base.eval()  # as load_backbone gives it, while the task and its head are new
    train(model, ROWS, config, tokenizer=TOKENIZER, task=task)
    before = modes()
    assert len(set(before)) == 2
    evaluate(model, ROWS, config, tokenizer=TOKENIZER, task=task)
    monkeypatch.setattr(Task, "metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, ROWS, config, tokenizer=TOKENIZER, task=task)
    with pytest.raises(ZeroDivisionError):
        train(model, ROWS, config, tokenizer=TOKENIZER, eval_data=ROWS, task=task)
    assert modes() == before
    assert not {"forward", "_original_forward"} & vars(task).keys()


# Optimizer


def test_vectors_do_not_decay() -> None:
    model = tiny_run.model()
    parameters = Task(model, ClassificationHead(32, ["a", "b"])).trained(tiny_run.quiet())
    optimizer = make_optimizer(parameters, tiny_run.quiet(weight_decay=0.1, max_norm=math.inf))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name.rsplit(".", 2)[-2:][0] for name, p in parameters.items() if decay[id(p)]} == {"down", "up", "linear"}
    assert all(name.endswith("weight") for name, p in parameters.items() if decay[id(p)])
    assert len(decay) == len(parameters)


def test_clipping_bounds_the_first_step() -> None:
    """With Adam's eps far above the gradient, a step is proportional to the gradient, and so to ``max_norm``."""

    def moved(max_norm: float) -> float:
        model = tiny_run.model()
        before = tiny_run.weights(model)
        result = run(model, max_steps=1, max_norm=max_norm, warmup=0, eps=1e3, weight_decay=0.0)
        assert result.history[0]["grad_norm"] > 0.1  # before clipping
        return sum(((a - b) ** 2).sum().item() for a, b in zip(before, tiny_run.weights(model), strict=True)) ** 0.5

    assert moved(1e-3) == pytest.approx(10 * moved(1e-4), rel=1e-2)


def test_a_head_learns_at_its_own_rate() -> None:
    heads, adapters = [], []
    for head_lr in (1e-30, 1e-3, 1e-2):
        model = tiny_run.model()
        head = run(model, max_steps=1, warmup=0, eps=1e3, weight_decay=0.0, lr=2e-2, head_lr=head_lr).head
        assert head is not None
        heads.append(torch.cat([p.detach().double().flatten() for p in head.parameters()]))
        adapters.append(tiny_run.weights(model))
    assert tiny_run.same_bits(adapters[0], adapters[1])
    assert tiny_run.same_bits(adapters[0], adapters[2])
    untrained, slow, fast = heads
    assert (fast - untrained).norm().item() == pytest.approx(10 * (slow - untrained).norm().item(), rel=1e-2)
    assert (slow - untrained).norm() > 0


# Files


def test_files_of_a_run(tmp_path: Path) -> None:
    unseen = tiny_run.rows(10, seed=1)
    model = tiny_run.model()
    result = run(model, eval_rows=unseen, output_dir=tmp_path, plot=True)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records == result.history
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [6, 12]
    for record in records:
        if record["kind"] == "train":
            assert record["tokens_per_second"] > 0
            assert record["grad_norm"] > 0

    config, head = load_run(tmp_path)
    model.eval()
    again = evaluate(model, unseen, config, tokenizer=TOKENIZER, head=head)
    assert not model.training
    assert result.metrics is not None
    assert again["accuracy"] == result.metrics["accuracy"]
    assert again["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)


def test_an_earlier_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    run(output_dir=tmp_path, max_steps=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output_dir: .* holds an earlier run .*overwrite=True"):
        run(output_dir=tmp_path, max_steps=1)
    run(output_dir=tmp_path, max_steps=1, overwrite=True)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_earlier_run_stays_until_the_new_one_can_begin(tmp_path: Path) -> None:
    run(output_dir=tmp_path, max_steps=2)
    (tmp_path / "sources.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for wrong, kind in (
        ({"rows": tmp_path / "trian.csv"}, FileNotFoundError),
        ({"eval_rows": [{"text": "w1"}]}, ValueError),
        ({"shard": True}, ValueError),
        ({"best": "acuracy"}, ValueError),
    ):
        with pytest.raises(kind):
            run(output_dir=tmp_path, overwrite=True, **wrong)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_sources_alone_are_no_earlier_run(tmp_path: Path) -> None:
    """A run of 0.1.0 that was killed before its first checkpoint left only them: there is nothing to resume."""
    for folder in (tmp_path, tmp_path / "tasks" / "a"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sources.json").write_text("{}")
    assert run(output_dir=tmp_path, max_steps=1).steps == 1


@pytest.mark.parametrize("own", [False, True], ids=["card of the run", "card of the user"])
def test_an_earlier_run_s_card_and_sources_go_with_it(
    tmp_path: Path, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(output_dir=tmp_path, max_steps=1)
    (tmp_path / "sources.json").write_text("{}")
    card = tmp_path / "README.md"
    assert card.exists()
    if own:
        card.write_text("mine")
    seen: list[str] = []
    forward = Task.forward

    def look(self: Task[Example], batch: Batch) -> Any:
        seen.extend(os.listdir(tmp_path) if not seen else ())
        return forward(self, batch)

    monkeypatch.setattr(Task, "forward", look)
    train(
        tiny_run.model(),
        ROWS,
        tiny_run.quiet(output_dir=tmp_path, overwrite=True, max_steps=1),
        tokenizer=TOKENIZER,
        sources=Sources("model"),
    )
    assert sorted(seen) == [LOCK_NAME, "README.md"] if own else [LOCK_NAME]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(max_steps=2, plot=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["not json\n", '{"kind": "train"}\n'])
def test_damaged_metrics(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    record = {"kind": "train", "step": 1, "loss": 1.0, "grad_norm": 1.0, "skipped_steps": 0}
    path.write_text(json.dumps(record) + "\n" + damage + json.dumps(record | {"step": 3}) + '\n{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)
    path.write_text(json.dumps(record) + '\n{"st')
    assert read_metrics(path) == [record]


def test_head_and_task_must_fit() -> None:
    with pytest.raises(ValueError, match="head: expected a head"):
        evaluate(tiny_run.model(), ROWS, tiny_run.quiet(), tokenizer=TOKENIZER)


def test_progress_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run(eval_rows=tiny_run.rows(4, seed=1), progress=True, max_steps=2)
    shown = capsys.readouterr().err
    for part in ("prefix cache: ", "step 2/2", "loss ", "lr ", "grad norm ", "tokens/s", "eval loss", "accuracy"):
        assert part in shown


def test_without_a_bar_lines_go_to_the_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "adapterkern"):
        run(eval_rows=tiny_run.rows(4, seed=1), max_steps=2)
    assert "prefix cache: " in caplog.text
    assert "eval loss" in caplog.text
    assert "step 2/2" not in caplog.text  # metrics.jsonl has it
    assert "prefix cache" not in capsys.readouterr().err


def test_settings_without_effect_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, model = [{"input_ids": [5, 6, 7, 8]}] * 4, tiny_run.model()
    config = tiny_run.quiet(
        task="causal-lm", pooling="last", label_column="topic", max_steps=1, eval_every=2, checkpoint_every=5
    )
    train(model, rows, config)
    assert caplog.messages == [
        "config: label_column='topic' has no effect with task='causal-lm'",
        "config: pooling='last' has no effect with task='causal-lm'",
        "config: eval_every=2 has no effect without eval_data",
        "config: checkpoint_every=5 has no effect without output_dir",
    ]
    caplog.clear()
    labeled, head = tiny_run.rows(4), ClassificationHead(32, ["no", "yes"])
    config = tiny_run.quiet(pooling="last", eval_every=2, checkpoint_every=5, output_dir=tmp_path, max_steps=1)
    train(model, labeled, config, tokenizer=tiny_run.tokenizer(), eval_data=tiny_run.rows(1, seed=9), head=head)
    assert caplog.messages == ["config: pooling='last' has no effect with a head that reads 'mean'"]
    evaluate(model, labeled, config, tokenizer=tiny_run.tokenizer(), head=head)
    assert len(caplog.messages) == 2
