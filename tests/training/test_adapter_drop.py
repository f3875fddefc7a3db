"""AdapterDrop: the first sites of an adapter skipped, in training steps and after it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkern as ak
from adapterkern.training import TrainResult
from adapterkern.training.optimization import sites_to_skip
from tests.support import tiny_run
from tests.support.runs import cut, records, same

IDS = torch.randint(3, 100, (3, 7), generator=torch.Generator().manual_seed(1))


def without(model: ak.LlamaAdapter, sites: list[int]) -> torch.Tensor:
    """The logits with the branches of these sites set to 0."""
    zeroed = []
    for site in sites:
        for p in model.adapters["default"][str(site)][0].up.parameters():
            zeroed.append((p, p.detach().clone()))
            p.data.zero_()
    logits = model(IDS).logits
    for p, value in zeroed:
        p.data.copy_(value)
    return logits


@pytest.mark.parametrize("position", ["layer", "attention"])
@torch.no_grad()
def test_skipped_sites_do_nothing(position: str) -> None:
    model = tiny_run.model(init="xavier", layers=(0, 2, 3), position=position)
    for skip in range(4):
        with model.skipping(skip):
            assert torch.equal(model(IDS).logits, without(model, [0, 2, 3][:skip]))
    model.skip_sites(1)
    assert torch.equal(model(IDS).logits, without(model, [0]))
    with model.skipping(0):
        assert torch.equal(model(IDS).logits, without(model, []))
    model.skip_sites(0)
    assert torch.equal(model(IDS).logits, without(model, []))


@torch.no_grad()
def test_each_adapter_of_a_mixed_batch_skips_its_own_first_sites() -> None:
    model = tiny_run.model(init="xavier", layers=(2, 3))
    model.add_adapter("low", ak.AdapterConfig(adapter_dim=8, layers=(0, 3), init="xavier"))
    names = ["default", "low", "__base__"]
    with model.skipping(1):
        mixed = model(IDS, adapter_names=names).logits
        decided = torch.tensor([0, 1, -1])
        with model.mixing(["default", "low"], lambda hidden: (decided, None)):
            torch.testing.assert_close(model(IDS).logits, mixed)
        for row, name in enumerate(names[:2]):
            model.set_adapter(name)
            torch.testing.assert_close(model(IDS[row : row + 1]).logits[0], mixed[row])
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS[2:]).logits[0], mixed[2])


def test_a_recomputed_layer_skips_as_its_forward_did() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_run.model(init="xavier").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with model.skipping(1):
            loss = model(IDS, labels=IDS).loss
        loss.backward()  # outside the block
        gradients.append({name: p.grad for name, p in model.adapters.named_parameters()})
    skipped = {name for name, grad in gradients[0].items() if grad is None}
    assert skipped == {name for name in gradients[0] if name.startswith("default.2.")}
    for name, grad in gradients[0].items():
        assert grad is None or torch.equal(grad, gradients[1][name])


def run(folder: Path | None, **settings: Any) -> tuple[ak.LlamaAdapter, TrainResult]:
    model = tiny_run.model(layers=(1, 2, 3))
    settings = {"adapter_drop": 2, "max_steps": 6, "batch_size": 4, "checkpoint_every": 3, "log_every": 1} | settings
    config = tiny_run.quiet(output_dir=folder, keep_checkpoints=9, eval_every=3, **settings)
    rows = tiny_run.rows(24)
    return model, ak.train(model, rows, config, tokenizer=tiny_run.tokenizer(), eval_data=rows[:6])


def test_a_step_trains_the_sites_that_it_does_not_skip(tmp_path: Path) -> None:
    """With the prefix cache and without; a resumed run draws what the uninterrupted one drew."""
    config = tiny_run.quiet(adapter_drop=2)
    drawn = [sites_to_skip(config, step) for step in range(300)]
    assert all(80 < drawn.count(n) < 120 for n in range(3))
    assert drawn != [sites_to_skip(tiny_run.quiet(adapter_drop=2, seed=1), step) for step in range(300)]

    model, result = run(tmp_path / "whole", prefix_cache=True)
    cut(tmp_path / "whole", tmp_path / "resumed")
    run(tmp_path / "resumed", prefix_cache=True, resume=True)
    same(tmp_path / "resumed", tmp_path / "whole", 0)
    other = run(None, prefix_cache=False)[1]
    losses = [record["loss"] for record in records(tmp_path / "whole") if record["kind"] == "train"]
    assert [r["loss"] for r in other.history if r["kind"] == "train"] == pytest.approx(losses, rel=1e-5)
    # The evaluation runs every site.
    assert result.metrics is not None
    rows = tiny_run.rows(24)[:6]
    found = ak.evaluate(model, rows, tiny_run.quiet(), tokenizer=tiny_run.tokenizer(), head=result.head)
    assert found["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
    with model.skipping(2):
        skipped = ak.evaluate(model, rows, tiny_run.quiet(), tokenizer=tiny_run.tokenizer(), head=result.head)
    assert skipped["loss"] != pytest.approx(found["loss"], rel=1e-4)


def test_a_step_that_skips_sites_leaves_them_as_they_are() -> None:
    step = next(n for n in range(9) if sites_to_skip(tiny_run.quiet(adapter_drop=2, seed=n), 0) == 2)
    model, _ = run(None, seed=step, max_steps=1, warmup=0.0, weight_decay=0.0)
    fresh = tiny_run.model(layers=(1, 2, 3)).adapters
    moved = {name for name, p in model.adapters.named_parameters() if not torch.equal(p, fresh.get_parameter(name))}
    assert {name.split(".")[1] for name in moved} == {"3"}


def test_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"adapter_drop: expected fewer than the 3 sites of the adapter, .* got 3"):
        run(None, adapter_drop=3)
    with pytest.raises(ValueError, match="adapter_drop: expected an integer >= 0, got -1"):
        tiny_run.quiet(adapter_drop=-1)
    with pytest.raises(ValueError, match="sites: expected an integer >= 0, got -1"):
        tiny_run.model().skipping(-1)
    with caplog.at_level(logging.WARNING):
        run(None, train_adapters=False, max_steps=1)
    assert "config: adapter_drop=2 has no effect without adapters to train" in caplog.messages
