"""Routing as a task: the model it makes, its gradients, which experts compute, and its runs in the training loop."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterkern.model import mixing
from adapterkern.recipes.routing import RoutedTask, RoutingConfig
from adapterkern.recipes.routing.router import GATES, balance_loss, run_probability
from adapterkern.recipes.routing.task import ROUTING_CONFIG, ROUTING_WEIGHTS
from adapterkern.training import CheckpointError, TrainResult, evaluate, load_run, train
from adapterkern.training.data.batches import Batch, collate
from adapterkern.training.data.examples import numbered
from adapterkern.training.feed import Feed
from tests.support import tiny_run
from tests.support.tiny_recipes import IDS, MASK, routed

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(16)
BATCH: Batch = {"input_ids": IDS, "attention_mask": MASK}


def everything(task: RoutedTask) -> list[Tensor]:
    return [p.detach().clone() for p in task.trained(tiny_run.quiet()).values()]


def run(task: RoutedTask, **values: Any) -> TrainResult:
    config = tiny_run.quiet(**({"log_every": 1} | values))
    return train(task.model, ROWS, config, tokenizer=TOKENIZER, eval_data=ROWS[:8], task=task)


# The model


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("top_k", "skip"), [(1, True), (1, False), (2, True), (3, True)])
def test_equals_a_dense_formulation_with_its_gradients(top_k: int, skip: bool, gate: str) -> None:
    """Every expert on every sequence, times its weight or 0, in fp64: same states, and the same gradient everywhere."""
    task = routed(layers=(3,), top_k=top_k, skip=skip, gate=gate).double()
    model, direction = task.model, torch.randn(*IDS.shape, 32, dtype=torch.float64)
    parameters = [p for name, p in task.trained(tiny_run.quiet()).items() if not name.startswith("head")]

    def gradients(states: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((states * direction * MASK[..., None]).sum(), parameters))

    states, route = task.hidden_and_route(BATCH)
    if skip:
        assert (route.chosen < 0).any()
    assert len(route.chosen[route.chosen >= 0].unique()) > 1

    stream = model.run_prefix(IDS, MASK)
    scores = task.router(stream, MASK).scores
    p = scores.softmax(1)
    weight = p if gate == "probability" else p / p.detach()
    gates = torch.zeros(len(IDS), 3, dtype=torch.float64)
    for b in range(len(IDS)):
        for i in sorted(range(3), key=lambda i: -scores[b, i].item())[:top_k]:
            if not skip or scores[b, i] > scores[b, 3]:
                gates[b, i] = 1
    dense = stream
    for i, name in enumerate(task.experts):
        dense = dense + (gates[:, i] * weight[:, i])[:, None, None] * (model.adapters[name]["3"](stream) - stream)
    dense = model.decoder.norm(dense)

    assert torch.allclose(states[MASK > 0], dense[MASK > 0])
    for a, b in zip(gradients(states), gradients(dense), strict=True):  # type: ignore[assignment]  # b was an index
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_router_gradient_is_that_of_finite_differences() -> None:
    """Through two sites and the layers between them, and through both losses, in fp64."""
    task = routed(top_k=2, noise=0.0, gate="probability").double().train()
    direction = torch.randn(*IDS.shape, 32, dtype=torch.float64) * MASK[..., None]

    def value() -> Tensor:
        states, route = task.hidden_and_route(BATCH)
        return (states * direction).sum() + 3 * balance_loss(route, 3) + 5 * run_probability(route, 3)

    weight = task.router.linear.weight
    gradient = torch.autograd.grad(value(), weight)[0]
    for _ in range(3):
        step = 1e-3 * torch.randn_like(gradient)
        with torch.no_grad():
            weight.add_(step)
            up = value()
            weight.sub_(2 * step)
            down = value()
            weight.add_(step)
        # The backbone's RMSNorm computes in fp32: the values, near 5, have its rounding.
        assert (up - down).item() / 2 == pytest.approx((gradient * step).sum().item(), rel=2e-3, abs=5e-6)


@pytest.mark.parametrize("batch_size", [16, 5])
def test_training_adds_its_terms_for_each_target_of_a_step_and_evaluation_none(batch_size: int) -> None:
    """The terms are those of the whole step's sequences, however many forwards share them."""
    task = routed(noise=0.0, balance=0.3, cost=0.2, free_epochs=1)
    config = tiny_run.quiet(batch_size=batch_size)
    examples = numbered(task.load(ROWS, config, TOKENIZER))
    batch = collate(examples, config)
    plain = task(batch)[0]
    route = task.route(batch["input_ids"], batch["attention_mask"])
    assert len(route.chosen.unique()) > 2
    terms = 0.3 * balance_loss(route, 3), 0.2 * run_probability(route, 3)

    def step(epoch: int) -> tuple[Tensor, list[Tensor]]:
        """The loss of a step, and its gradient in the router."""
        task.train().begin_step(examples, config, epoch, 0)
        task.zero_grad()
        losses = []
        for start in range(0, len(ROWS), batch_size):
            loss, _ = task(task.collate(examples[start : start + batch_size], config))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum(), [p.grad.clone() for p in task.router.parameters()]

    for epoch, extra in ((1, sum(terms)), (0, terms[0])):
        loss, gradients = step(epoch)
        assert loss.item() == pytest.approx((plain + len(ROWS) * extra).item())
        whole = task.train()(batch)[0]  # not announced: a step of its own, whose cost does not count yet
        assert whole.item() == pytest.approx((plain + len(ROWS) * terms[0]).item())
        if epoch == 0:
            for p, gradient in zip(task.router.parameters(), gradients, strict=True):
                torch.testing.assert_close(torch.autograd.grad(whole, p, retain_graph=True)[0], gradient)


def test_what_choices_draw_follows_from_seed_step_and_place() -> None:
    task = routed(noise=1.0)
    config = tiny_run.quiet()
    examples = numbered(task.train().load(ROWS, config, TOKENIZER), 100)

    def drawn(some: slice = slice(None), epoch: int = 1, index: int = 2, **values: Any) -> Tensor:
        torch.manual_seed(len(values))  # must not matter
        task.begin_step(examples, tiny_run.quiet(**values), epoch, index)
        return task.collate(examples[some], config)["drawn"]

    expected = drawn()
    assert expected.shape == (16, 3 + 1 + 1)
    assert torch.equal(drawn(slice(3, 9), batch_size=3), expected[3:9])
    for other in (drawn(epoch=2), drawn(index=1), drawn(seed=1)):
        assert not torch.equal(other, expected)


def test_only_chosen_experts_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which sequences each site's grouped call runs which expert on."""
    task = routed()
    calls = []

    def counting(*args: Any, index: Tensor, **kwargs: Any) -> Tensor:
        calls.append(index.clone())
        return original(*args, index=index, **kwargs)

    original = mixing.adapter
    monkeypatch.setattr(mixing, "adapter", counting)
    route = task.route(IDS, MASK)
    assert len(calls) == 2  # one per site, whatever the number of experts
    assert all(torch.equal(index, route.chosen[:, 0]) for index in calls)
    assert (route.chosen < 0).any()
    with task.model.disable_adapter():
        bare = task.model.decoder(input_ids=IDS, attention_mask=MASK).last_hidden_state
    got = task.hidden(BATCH)
    skipped = route.chosen[:, 0] < 0
    assert torch.equal(got[skipped], bare[skipped])
    assert not any(torch.equal(a, b) for a, b in zip(got[~skipped], bare[~skipped], strict=True))


def test_an_unchosen_expert_gets_no_gradient_from_a_batch() -> None:
    task = routed()
    with torch.no_grad():
        task.router.linear.bias[1] = -100.0
    batch = collate(task.load(ROWS, tiny_run.quiet(), TOKENIZER), tiny_run.quiet())
    task.train()(batch)[0].backward()
    largest = [max(p.grad.abs().max().item() for p in task.model.adapter_parameters(n)) for n in task.experts]
    assert largest[1] == 0.0
    assert min(largest[0], largest[2]) > 0.0


def test_predicts_what_is_evaluated() -> None:
    task, config = routed(), tiny_run.quiet(batch_size=16)
    examples = task.load(ROWS, config, TOKENIZER)
    predictions = task.predict(Feed(task, config, None)(examples))
    right = [p.label == row["label"] for p, row in zip(predictions, ROWS, strict=True)]
    of_label = [p.probability if hit else 1 - p.probability for p, hit in zip(predictions, right, strict=True)]
    metrics = evaluate(task.model, ROWS, config, tokenizer=TOKENIZER, task=task)
    assert metrics["accuracy"] == sum(right) / 16
    assert metrics["loss"] == pytest.approx(-sum(map(math.log, of_label)) / 16, rel=1e-4)


# In the loop


@pytest.mark.slow
def test_learns_to_route_by_what_the_text_shows() -> None:
    """Two experts are the same at the start; a rule that needs adapters is learned, and the metrics add up."""
    task = RoutedTask(tiny_run.model(layers=(0, 1, 2, 3)), RoutingConfig(experts=2))
    rows, unseen = tiny_run.rows(800), tiny_run.rows(200, seed=1)
    config = tiny_run.quiet(epochs=4, batch_size=16, lr=2e-2)
    metrics = train(task.model, rows, config, tokenizer=TOKENIZER, eval_data=unseen, task=task).metrics
    assert metrics is not None
    assert metrics["accuracy"] >= 0.9
    assert metrics["expert_0"] + metrics["expert_1"] + metrics["skipped"] == pytest.approx(1.0)
    assert metrics["experts_run"] == pytest.approx(1 - metrics["skipped"])


def test_cost_makes_sequences_skip() -> None:
    skipped = []
    for cost in (0.0, 10.0):
        task = RoutedTask(tiny_run.model(), RoutingConfig(experts=2, cost=cost))
        metrics = run(task, epochs=8, lr=3e-2).metrics
        assert metrics is not None
        skipped.append(metrics["skipped"])
    assert skipped[1] == 1.0
    assert skipped[0] < 0.75  # 0.33 on average over 60 seeds


def test_only_experts_router_and_head_change() -> None:
    task = routed(sharp=False)
    backbone = {name: p.clone() for name, p in task.model.base.state_dict().items()}
    run(task, max_steps=1)  # makes the head
    before = everything(task)
    run(task)
    assert all(torch.equal(p, backbone[name]) for name, p in task.model.base.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(task), strict=True))
    with pytest.raises(ValueError, match=r"^train_adapters: expected True"):
        run(task, train_adapters=False)


def test_prefix_cache_changes_nothing() -> None:
    tasks = [routed(), routed()]
    same = {"padding": "max_length", "eval_batch_size": 4}
    results = [run(task, prefix_cache=cache, **same) for task, cache in zip(tasks, (False, True), strict=True)]
    assert results[1].prefix_layers == 3
    assert tiny_run.same_bits(everything(tasks[0]), everything(tasks[1]))


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = routed()
    run(whole, epochs=3, output_dir=tmp_path / "whole")
    run(routed(), epochs=3, output_dir=tmp_path / "cut", keep_checkpoints=9)
    for newer in sorted((tmp_path / "cut" / "checkpoints").iterdir())[1:]:
        for file in newer.iterdir():
            file.unlink()
        newer.rmdir()
    again = routed(sharp=False)  # other weights, which the checkpoint replaces
    run(again, epochs=3, output_dir=tmp_path / "cut", resume=True)
    assert tiny_run.same_bits(everything(whole), everything(again))
    with pytest.raises(CheckpointError, match=r"the run was begun with cost=0\.0, not 0\.5"):
        run(routed(cost=0.5), epochs=3, output_dir=tmp_path / "cut", resume=True)


def test_language_model_is_routed_too() -> None:
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 40} w{i + 60}"} for i in range(0, 16, 2)]
    task = RoutedTask(tiny_run.model(), RoutingConfig(experts=2, skip=False))
    config = tiny_run.quiet(task="causal-lm", epochs=60, lr=3e-2)
    metrics = train(task.model, rows, config, tokenizer=TOKENIZER, eval_data=rows, task=task).metrics
    assert metrics is not None
    assert metrics["accuracy"] >= 0.9
    assert metrics["skipped"] == 0.0


# Generation


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_keeps_the_prompts_route(beams: int) -> None:
    """Decided once, on the prompt: the whole text would be routed differently."""
    task = routed()
    prompts, how = IDS[:, :4], {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    decided = []
    task.router.register_forward_hook(lambda module, inputs, route: decided.append(route.chosen))
    got = task.train().generate(prompts, **how)
    assert len(decided) == 1
    route = task.route(prompts, torch.ones_like(prompts))
    assert torch.equal(decided[0][::beams], route.chosen)
    with task.model.mixing(task.experts, route.chosen, route.weight):
        assert torch.equal(task.model.generate(prompts, attention_mask=torch.ones_like(prompts), **how), got)
    assert not torch.equal(task.route(got, torch.ones_like(got)).chosen, route.chosen)


# Files


def test_saves_and_loads_to_the_same_bits(tmp_path: Path) -> None:
    task = routed(top_k=2, cost=0.1)
    metrics = run(task, output_dir=tmp_path).metrics
    bare = tiny_run.model().unload()
    again, config = RoutedTask.from_pretrained(bare, tmp_path)
    assert again.routing == task.routing
    assert config == load_run(tmp_path)[0]
    assert tiny_run.same_bits(everything(task), everything(again))
    assert torch.equal(task.eval().route(IDS, MASK).weight, again.route(IDS, MASK).weight)
    with pytest.raises(FileExistsError):
        run(routed(), output_dir=tmp_path)
    written = json.loads((tmp_path / "task.json").read_text())
    assert (written["kind"], written["config"]["output_dir"]) == ("RoutedTask", None)
    scored = evaluate(again.model, ROWS[:8], config, tokenizer=TOKENIZER, task=again)
    assert metrics is not None
    for name in ("loss", "accuracy", "skipped", "experts_run", "expert_0"):
        assert scored[name] == pytest.approx(metrics[name], rel=1e-5)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert tiny_run.same_bits(everything(task), everything(RoutedTask.from_pretrained(bare_model(), newest)[0]))


def test_a_broken_off_run_leaves_nothing_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = routed(noise=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(task.model, "run_suffix", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(task, prefix_cache=True)
    assert task._step is None


def test_another_kind_of_run_is_not_resumed(tmp_path: Path) -> None:
    train(tiny_run.model(), ROWS, tiny_run.quiet(output_dir=tmp_path, max_steps=1), tokenizer=TOKENIZER)
    with pytest.raises(CheckpointError, match="the run was begun with another task: Task, not RoutedTask"):
        run(routed(), output_dir=tmp_path, max_steps=1, resume=True)


def bare_model() -> Any:
    return tiny_run.model().unload()


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    run(routed(), max_steps=1, output_dir=tmp_path)
    path, weights = tmp_path / ROUTING_CONFIG, tmp_path / ROUTING_WEIGHTS
    good, tensors = path.read_text(), weights.read_bytes()
    for change, problem in (
        ({"format_version": 9}, "format_version"),
        ({"routing": {"top_k": 7}}, "top_k: expected"),
        ({"routing": {"wrong": 7}}, "wrong"),
        ({"base": {"hidden_size": 8, "num_hidden_layers": 4}}, "saved for a backbone"),
        ({"adapter": {"adapter_dim": 4}}, "routing.safetensors: not these experts' weights"),
    ):
        path.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(ValueError, match=problem):
            RoutedTask.from_pretrained(bare_model(), tmp_path)
    path.write_text(json.dumps({k: v for k, v in json.loads(good).items() if k != "adapter"}))
    with pytest.raises(ValueError, match="field 'adapter' is missing"):
        RoutedTask.from_pretrained(bare_model(), tmp_path)
    path.write_text(good)
    weights.write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        RoutedTask.from_pretrained(bare_model(), tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        RoutedTask.from_pretrained(bare_model(), tmp_path)


def test_needs_an_active_adapter_and_free_names() -> None:
    model = tiny_run.model()
    RoutedTask(model)
    model.delete_adapter("expert-1")
    with pytest.raises(ValueError, match="expected a new name, got 'expert-2'"):
        RoutedTask(model)
    assert "expert-1" not in model.adapters
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"^model: expected an active adapter"):
        RoutedTask(model)
