"""Routing of tokens: the model it makes, what training adds and draws, padding, generation, and a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkern.recipes.routing import RoutedTask, RoutingConfig
from adapterkern.recipes.routing.router import GATES
from adapterkern.training import CheckpointError, TrainConfig, TrainResult, evaluate, train
from adapterkern.training.data.batches import Batch
from adapterkern.training.data.examples import numbered
from tests.support import tiny_run
from tests.support.tiny_recipes import IDS, MASK, routed

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(16)
BATCH: Batch = {"input_ids": IDS, "attention_mask": MASK}
REAL = MASK > 0


def of_tokens(**values: Any) -> RoutedTask:
    return routed(**({"per": "token"} | values))


def everything(task: RoutedTask) -> list[Tensor]:
    return [p.detach().clone() for p in task.trained(tiny_run.quiet()).values()]


@pytest.mark.parametrize(("top_k", "skip", "gate"), [(1, True, GATES[0]), (2, True, GATES[1]), (2, False, GATES[0])])
def test_equals_a_loop_over_tokens_and_experts_with_its_gradients(top_k: int, skip: bool, gate: str) -> None:
    """In fp64: states, balance and cost of real tokens alone, and the gradients of experts and router."""
    task = of_tokens(
        layers=(3,), top_k=top_k, skip=skip, gate=gate, noise=0.0, free_epochs=0, balance=0.3, cost=0.2 * skip
    )
    task = task.double().train()
    model, direction = task.model, torch.randn(*IDS.shape, 32, dtype=torch.float64)
    parameters = [p for name, p in task.trained(tiny_run.quiet()).items() if not name.startswith("head")]
    states, route = task.hidden_and_route(BATCH)
    assert route.chosen.shape == (*IDS.shape, top_k)
    assert (route.chosen[~REAL] == -1).all()
    assert len(route.chosen[REAL].unique()) == 3 + skip

    stream = model.run_prefix(IDS, MASK)
    rows, chosen, P, runs = torch.zeros_like(stream), torch.zeros(3), torch.zeros(3, dtype=torch.float64), 0.0
    for b, t in REAL.nonzero().tolist():
        x = stream[b, t]
        scores = task.router.linear(F.layer_norm(x, (32,)))
        p, row, any_runs = scores.softmax(0), x, False
        for i in sorted(range(3), key=lambda i: -scores[i].item())[:top_k]:
            if not skip or scores[i] > scores[3]:
                weight = p[i] if gate == "probability" else p[i] / p[i].detach()
                row = row + weight * (model.adapters[task.experts[i]]["3"](x) - x)
                chosen[i] += 1
                any_runs = True
        P = P + scores[:3].softmax(0) * any_runs
        runs = runs + (1 - p[3] if skip else 1.0)
        rows[b, t] = row
    ran = int((route.chosen >= 0).any(-1).sum())
    balance = 3 * (chosen / chosen.sum() * P / ran).sum()
    extra = 5 * (0.3 * balance + 0.2 * skip * runs / int(REAL.sum()))

    dense = model.decoder.norm(rows)
    assert torch.allclose(states[REAL], dense[REAL])
    found, wanted = task._extra(route, 5), extra
    assert torch.allclose(found, wanted)
    got = torch.autograd.grad((states * direction * MASK[..., None]).sum() + found, parameters)
    expected = torch.autograd.grad((dense * direction * MASK[..., None]).sum() + wanted, parameters)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_forwards_of_a_step_change_nothing(side: str) -> None:
    """Neither what is drawn, nor loss or gradients, depends on which texts share a forward, or on their padding."""
    found = []
    for batch_size in (16, 5):
        task = of_tokens(top_k=2, noise=1.0, balance=0.3, cost=0.2)
        config = tiny_run.quiet(batch_size=batch_size, padding_side=side)
        examples = numbered(task.train().load(ROWS, config, TOKENIZER), 100)
        torch.manual_seed(batch_size)  # must not matter
        torch.nn.init.normal_(task.head.linear.weight, generator=torch.Generator().manual_seed(0))
        task.begin_step(examples, config, epoch=1, index=2)
        losses, routes = [], []
        for start in range(0, 16, batch_size):
            batch = task.collate(examples[start : start + batch_size], config)
            mask = batch["attention_mask"] > 0
            assert batch["drawn"].shape == (*mask.shape, 3 + 1 + 1)
            with task.routed(batch["attention_mask"], batch["drawn"]) as decided:
                task.model.decoder(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            routes += [c[m] for c, m in zip(decided[0].chosen, mask, strict=True)]
            loss, _ = task(batch)
            loss.backward()
            losses.append(loss.detach())
        parameters = [p for name, p in task.trained(config).items() if not name.startswith("head")]
        found.append((torch.cat(routes), torch.stack(losses).sum(), *(p.grad for p in parameters)))
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][0].unique()) == 4
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_tokens_draw_follows_from_seed_epoch_step_and_place() -> None:
    task, config = of_tokens().train(), tiny_run.quiet()
    examples = numbered(task.load(ROWS, config, TOKENIZER))

    def drawn(epoch: int = 1, index: int = 2, seed: int = 0) -> Tensor:
        task.begin_step(examples, tiny_run.quiet(seed=seed), epoch, index)
        return task.collate(examples, config)["drawn"]

    expected = drawn()
    assert torch.equal(drawn(), expected)
    others = drawn(epoch=2), drawn(index=1), drawn(seed=1)
    assert not any(torch.equal(other, expected) for other in others)
    real = expected[expected.any(-1)]
    assert len(real.unique(dim=0)) == len(real) == sum(len(e.input_ids) for e in examples)  # each token its own


@torch.no_grad()
def test_a_text_alone_is_as_in_a_padded_batch() -> None:
    task = of_tokens(top_k=2)
    left = torch.stack([torch.roll(row, 9 - int(mask.sum())) for row, mask in zip(IDS, MASK, strict=True)])
    sides = [(IDS, MASK), (left, MASK.flip(1))]
    for ids, mask in sides:
        states, route = task.hidden_and_route({"input_ids": ids, "attention_mask": mask})
        for row in range(len(IDS)):
            alone = ids[row : row + 1, mask[row] > 0]
            expected, choices = task.hidden_and_route({"input_ids": alone, "attention_mask": torch.ones_like(alone)})
            assert torch.equal(choices.chosen[0], route.chosen[row, mask[row] > 0])
            torch.testing.assert_close(expected[0], states[row, mask[row] > 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"num_beams": 3}])
@torch.no_grad()
def test_each_new_token_is_routed_when_it_is_decoded(more: dict[str, Any]) -> None:
    """Its logits are those of one forward over the whole text, which is routed anew."""
    task = of_tokens(top_k=2).train()  # whose generation has no noise either
    ids = torch.stack([torch.roll(row, 9 - int(mask.sum())) for row, mask in zip(IDS, MASK, strict=True)])
    mask, how = MASK.flip(1), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    decided: list[Tensor] = []
    hook = task.router.register_forward_hook(lambda module, inputs, route: decided.append(route.chosen))
    out = task.generate(ids, mask, **how, **more, output_logits=True, return_dict_in_generate=True)
    hook.remove()
    tokens = [9, *[1] * 4] if "use_cache" not in more else list(range(9, 14))
    assert [chosen.shape[1] for chosen in decided] == tokens
    whole = torch.cat([mask, torch.ones(len(ids), 5, dtype=torch.int64)], 1)
    route = task.eval().route(out.sequences, whole)
    assert not torch.equal(route.chosen[:, 9:13], route.chosen[:, 8:12])
    if more.get("num_beams"):
        return
    chosen = torch.cat(decided, 1) if not more else decided[-1]
    assert torch.equal(chosen, route.chosen[:, :13])
    states = task.hidden({"input_ids": out.sequences, "attention_mask": whole})
    logits = task.model.logits_of(states[:, 8:13])
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, rtol=1e-4, atol=1e-4)


def run(task: RoutedTask, **values: Any) -> tuple[TrainResult, TrainConfig]:
    config = tiny_run.quiet(**({"log_every": 1, "eval_batch_size": 4} | values))
    return train(task.model, ROWS, config, tokenizer=TOKENIZER, eval_data=ROWS[:8], task=task), config


def test_a_run_saves_loads_resumes_and_caches_its_prefix(tmp_path: Path) -> None:
    same = {"padding": "max_length", "prefix_cache": False}
    task = of_tokens(top_k=2, cost=0.1)
    result, config = run(task, epochs=3, output_dir=tmp_path / "run", keep_checkpoints=9, **same)
    metrics = result.metrics
    assert metrics is not None
    runs = task.route(*(torch.tensor(t) for t in _padded(task, config))).chosen
    shares = [metrics[f"expert_{i}"] for i in range(3)]
    tokens = sum(len(e.input_ids) for e in task.load(ROWS[:8], config, TOKENIZER))
    assert shares == pytest.approx([(runs == i).sum().item() / tokens for i in range(3)])
    assert metrics["experts_run"] == pytest.approx(sum(shares))
    assert metrics["skipped"] == pytest.approx(1 - (runs >= 0).any(-1).sum().item() / tokens)

    again, loaded = RoutedTask.from_pretrained(tiny_run.model().unload(), tmp_path / "run")
    assert again.routing == task.routing
    assert tiny_run.same_bits(everything(task), everything(again))
    scored = evaluate(again.model, ROWS[:8], loaded, tokenizer=TOKENIZER, task=again)
    assert scored["loss"] == pytest.approx(metrics["loss"], rel=1e-5)

    for newer in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        for file in newer.iterdir():
            file.unlink()
        newer.rmdir()
    with pytest.raises(CheckpointError, match=r"the run was begun with per='token', not None"):
        run(routed(top_k=2, cost=0.1), epochs=3, output_dir=tmp_path / "run", resume=True, **same)
    resumed = of_tokens(top_k=2, cost=0.1, sharp=False)
    run(resumed, epochs=3, output_dir=tmp_path / "run", resume=True, **same)
    cached = of_tokens(top_k=2, cost=0.1)
    assert run(cached, epochs=3, **(same | {"prefix_cache": True}))[0].prefix_layers == 3
    recomputed = of_tokens(top_k=2, cost=0.1)
    run(recomputed, epochs=3, checkpoint_activations=True, **same)
    for other in (resumed, cached, recomputed):
        assert tiny_run.same_bits(everything(task), everything(other))


def _padded(task: RoutedTask, config: TrainConfig) -> tuple[list[list[int]], list[list[int]]]:
    ids = [e.input_ids.tolist() for e in task.load(ROWS[:8], config, TOKENIZER)]
    return [row + [0] * (16 - len(row)) for row in ids], [[1] * len(row) + [0] * (16 - len(row)) for row in ids]


def test_settings_of_sequences_are_as_they_were() -> None:
    """So that earlier versions read what has them, and their checkpoints resume."""
    assert "per" not in routed().settings
    assert of_tokens().settings["per"] == "token"
    with pytest.raises(ValueError, match="per: expected one of sequence, token, got 'word'"):
        RoutingConfig(per="word")
