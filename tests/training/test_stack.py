"""``ak.train`` on a stack: the adapters below are frozen or trained, saved with the top one, and resumed."""

import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkern as ak
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.recipes.routing.task import RoutedTask
from adapterkern.training.run.results import CheckpointError
from tests.support import tiny_run
from tests.support.runs import same

ROWS = tiny_run.rows(24)


def stacked(seed: int = 0) -> ak.LlamaAdapter:
    """``task``, after layers 2 and 3, on ``domain``, after layers 1 and 3 of 4."""
    model = tiny_run.model()
    model.delete_adapter("default")
    for name, layers, dim in (("domain", (1, 3), 4), ("task", (2, 3), 8)):
        model.add_adapter(name, ak.AdapterConfig(adapter_dim=dim, layers=layers))
    torch.manual_seed(seed)
    for p in model.adapter_parameters("domain"):
        nn.init.normal_(p, std=0.2)
    model.set_adapter(["domain", "task"])
    return model


def domain(model: ak.LlamaAdapter) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.adapter_parameters("domain")]


def run(output: Path, model: ak.LlamaAdapter, **changes: Any) -> Any:
    config = tiny_run.quiet(output_dir=str(output), checkpoint_every=3, keep_checkpoints=9, log_every=1, **changes)
    return ak.train(model, ROWS, config, tokenizer=tiny_run.tokenizer(), eval_data=ROWS[:8])


@pytest.mark.parametrize("train_stack", [False, True])
def test_learn_save_and_resume(tmp_path: Path, train_stack: bool) -> None:
    model = stacked()
    before, top = domain(model), tiny_run.weights(model)
    seen: list[bool] = []
    model.adapters["domain"]["3"][0].down.weight.register_hook(lambda _: seen.append(True))
    result = run(tmp_path / "one", model, train_stack=train_stack)
    assert bool(seen) is train_stack  # no gradient is computed for what is frozen
    assert tiny_run.same_bits(domain(model), before) is not train_stack
    assert not any(torch.equal(a, b) for a, b in zip(tiny_run.weights(model), top, strict=True))
    assert all(p.requires_grad and p.grad is None for p in model.adapters.parameters())
    counted = ("domain", "task") if train_stack else ("task",)
    head = sum(p.numel() for p in result.head.parameters())
    assert result.trainable_parameters - head == sum(p.numel() for n in counted for p in model.adapter_parameters(n))

    again = ak.LlamaAdapter.from_pretrained(tiny_run.model().unload(), tmp_path / "one")
    assert again.active_adapters() == ["domain", "default"]
    assert tiny_run.same_bits(domain(again), domain(model))
    scores = ak.evaluate(again, ROWS[:8], tiny_run.quiet(), tokenizer=tiny_run.tokenizer(), head=result.head)
    assert scores["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)

    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for checkpoint in sorted((tmp_path / "two" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    resumed = stacked()
    run(tmp_path / "two", resumed, train_stack=train_stack, resume=True)
    same(tmp_path / "two", tmp_path / "one", 0.0)
    assert tiny_run.same_bits(domain(resumed), domain(model))
    assert "x → domain → this adapter" in (tmp_path / "two" / "README.md").read_text()
    for other, problem in _others(train_stack):
        with pytest.raises(CheckpointError, match=problem):
            run(tmp_path / "two", other, train_stack=train_stack, resume=True)
    run(tmp_path / "one", stacked(1), overwrite=True)
    assert len(list((tmp_path / "one" / "below").iterdir())) == 1


def _others(train_stack: bool) -> list[tuple[ak.LlamaAdapter, str]]:
    """Models that cannot go on with the run: the top adapter alone, and one on other values."""
    alone = stacked()
    alone.set_adapter("task")
    if train_stack:
        return [(alone, "another model: parameter below.0.1.0.down.bias had shape")]
    begun = r"the run was begun with below=\['\w{16}'\], not "
    return [(alone, f"{begun}None"), (stacked(1), rf"{begun}\['\w{{16}}'\]")]


def test_the_frozen_prefix_ends_below_the_stack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the cache and without, and with recomputed layers, the numbers are the same."""
    results: list[list[torch.Tensor]] = []
    for changes in (
        {"prefix_cache": True},
        {"prefix_cache": False},
        {"prefix_cache": True, "checkpoint_activations": True},
    ):
        model = stacked()
        assert model.prefix_length == 2
        run(tmp_path / str(len(results)), model, **changes, max_steps=3)
        results.append(tiny_run.weights(model))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_what_a_stack_cannot_be_given_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = stacked()
    with pytest.raises(ValueError, match="model: expected one adapter as the first expert, got one on domain, a stack"):
        RoutedTask(model)
    with pytest.raises(ValueError, match="names: expected adapters without others below, got 'task' on domain"):
        MultiTask(model, ["task"])
    model.set_adapter("task")
    ak.train(model, ROWS, tiny_run.quiet(max_steps=1, train_stack=True), tokenizer=tiny_run.tokenizer())
    assert "config: train_stack=True has no effect without a stack" in caplog.messages
    assert re.fullmatch(r".*trainable%: \d\.\d{4}\n", _printed(model))
    model.set_adapter(["domain", "task"])
    assert _printed(model).endswith(" || stack: domain → task\n")


def _printed(model: ak.LlamaAdapter) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        model.print_trainable_parameters()
    return out.getvalue()
