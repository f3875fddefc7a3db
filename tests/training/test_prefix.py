"""The frozen-prefix cache: the same numbers as without, in memory and on disk, and never another model's."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import PrefixCache, TrainConfig, evaluate, train
from adapterkern.training.data.examples import Example, load_examples
from adapterkern.training.data.prefix import choose_cache, prefix_fingerprint
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(24)
EVAL_ROWS = tiny_run.rows(8, seed=1)


def examples(config: TrainConfig) -> list[Example]:
    return load_examples(ROWS, config, TOKENIZER)[0]


def outcome(config: TrainConfig, cache: PrefixCache | None = None, **adapter: Any) -> tuple[list[Tensor], list[Any]]:
    model = tiny_run.model(**adapter)
    result = train(model, ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS, cache=cache)
    losses = [(r["loss"], r.get("accuracy")) for r in result.history]
    assert (result.prefix_layers > 0) == bool(config.prefix_cache)
    return tiny_run.weights(model, result.head), losses


@pytest.mark.parametrize("memory", [1 << 30, 2000, 0], ids=["memory", "both", "disk"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("adapter", [{}, {"position": "attention"}], ids=["layer", "attention"])
def test_same_bits_as_without(memory: int, side: str, adapter: dict[str, Any]) -> None:
    fixed = {"padding": "max_length", "padding_side": side, "log_every": 1}
    cache = PrefixCache(memory)
    weights, losses = outcome(tiny_run.quiet(prefix_cache=True, **fixed), cache, **adapter)
    plain_weights, plain_losses = outcome(tiny_run.quiet(prefix_cache=False, **fixed), **adapter)
    assert losses == plain_losses
    assert tiny_run.same_bits(weights, plain_weights)
    assert (cache.bytes_in_memory > 0, cache.bytes_on_disk > 0) == (memory > 0, memory < 1 << 20)


@pytest.mark.parametrize("values", [{}, {"task": "causal-lm"}, {"train_adapters": False}, {"precision": "bf16"}])
def test_same_numbers_with_other_shapes(values: dict[str, Any]) -> None:
    """Padded to the longest row, the cache's batches have other shapes than the run's."""
    tolerance = 2e-2 if "precision" in values else 1e-4
    _, losses = outcome(tiny_run.quiet(prefix_cache=True, **values))
    _, plain = outcome(tiny_run.quiet(prefix_cache=False, **values))
    assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in plain], rel=tolerance)


def test_head_alone_runs_the_backbone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    layer = tiny_run.model().layers[0].__class__
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x, **kw: (texts.append(len(x)), forward(self, x, **kw))[1])
    config = tiny_run.quiet(train_adapters=False, prefix_cache=True, epochs=3)
    result = train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS)
    assert result.prefix_layers == 4
    assert sum(n for n in texts if n > 1) == 4 * (len(ROWS) + len(EVAL_ROWS))  # single rows are the questions before


def test_a_second_run_computes_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, config = tiny_run.model(), PrefixCache(), tiny_run.quiet(prefix_cache=True)
    train(model, ROWS, config, tokenizer=TOKENIZER, cache=cache)
    monkeypatch.setattr(LlamaAdapter, "run_prefix", None)
    train(model, ROWS, config, tokenizer=TOKENIZER, cache=cache)
    assert len(cache) == len(ROWS)


def test_a_longer_prefix_starts_from_a_shorter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config, starts = tiny_run.quiet(prefix_cache=True), []
    rows = examples(config)
    short, long, direct, cache = tiny_run.model(layers=(1,)), tiny_run.model(), PrefixCache(), PrefixCache()
    cache.fill(short, rows, config)
    cache.fill(short, load_examples(EVAL_ROWS, config, TOKENIZER)[0], config)
    run_prefix = LlamaAdapter.run_prefix
    monkeypatch.setattr(LlamaAdapter, "run_prefix", lambda *inputs: (starts.append(inputs[-1]), run_prefix(*inputs))[1])
    slots = cache.fill(long, rows, config)
    assert set(starts) == {2}
    expected = direct.fill(long, rows, config)
    assert set(starts) == {2, 0}
    assert slots is not None
    assert expected is not None
    for a, b in zip(slots, expected, strict=True):
        assert torch.equal(cache.gather([a], a.length, config), direct.gather([b], b.length, config))


def test_evaluation_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, config = tiny_run.model(), PrefixCache(), tiny_run.quiet(prefix_cache=True, padding="max_length")
    result = train(model, ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS, cache=cache)
    plain = evaluate(model, EVAL_ROWS, config, tokenizer=TOKENIZER, head=result.head)
    monkeypatch.setattr(LlamaAdapter, "run_prefix", None)
    cached = evaluate(model, EVAL_ROWS, config, tokenizer=TOKENIZER, head=result.head, cache=cache)
    assert result.metrics is not None
    assert cached["loss"] == plain["loss"] == result.metrics["loss"]


def changed_config(name: str, value: Any) -> Any:
    return lambda model: setattr(model.config, name, value)


def changed_weight(model: LlamaAdapter) -> None:
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3  # type: ignore[operator]  # Tensor | Module to torch


@pytest.mark.parametrize(
    "change", [changed_weight, changed_config("rms_norm_eps", 1e-3), lambda model: model.bfloat16()]
)
def test_another_model_has_another_key(change: Any) -> None:
    model, config = tiny_run.model(), tiny_run.quiet()
    before = prefix_fingerprint(model, config, model.prefix_length)
    assert prefix_fingerprint(tiny_run.model(), config, model.prefix_length) == before
    change(model)
    assert prefix_fingerprint(model, config, model.prefix_length) != before


def test_what_the_prefix_does_not_depend_on_keeps_the_key() -> None:
    model, config = tiny_run.model(), tiny_run.quiet()
    before = prefix_fingerprint(model, config, model.prefix_length)
    with torch.no_grad():
        model.layers[3].mlp.up_proj.weight.zero_()  # type: ignore[operator]  # Tensor | Module to torch
        for parameter in model.adapter_parameters():
            parameter.zero_()
    assert prefix_fingerprint(model, config, model.prefix_length) == before
    for other in (tiny_run.quiet(precision="bf16"), tiny_run.quiet(padding_side="left")):
        assert prefix_fingerprint(model, other, model.prefix_length) != before
    assert prefix_fingerprint(model, config, 2) != before


def test_changed_weights_are_never_served_old_activations() -> None:
    config = tiny_run.quiet(prefix_cache=True, padding="max_length")
    cache = PrefixCache()
    outcome(config, cache)
    model, fresh = tiny_run.model(seed=5), tiny_run.model(seed=5)
    train(model, ROWS, config, tokenizer=TOKENIZER, cache=cache)
    train(fresh, ROWS, config, tokenizer=TOKENIZER)
    assert tiny_run.same_bits(tiny_run.weights(model), tiny_run.weights(fresh))


@pytest.mark.parametrize("values", [{}, {"padding_side": "left"}, {"precision": "bf16"}], ids=["right", "left", "bf16"])
def test_the_activations_of_a_text_do_not_depend_on_other_texts(values: dict[str, Any]) -> None:
    """Otherwise a resumed run, or one with other evaluation data, would differ by rounding."""
    config = tiny_run.quiet(max_length=32, **values)
    data = load_examples(tiny_run.rows(20, low=3, high=30), config, TOKENIZER)[0]
    model, together, alone = tiny_run.model(), PrefixCache(), PrefixCache()
    slots = together.fill(model, data, config)
    assert slots is not None
    for example, slot in zip(data, slots, strict=True):
        own = alone.fill(model, [example], config)
        assert own is not None
        n = len(example.input_ids)
        assert torch.equal(alone.gather(own, n, config), together.gather([slot], n, config))


def test_nothing_is_left_on_disk(tmp_path: Path) -> None:
    config = tiny_run.quiet(prefix_cache=True)
    cache = PrefixCache(0, tmp_path)
    assert cache.fill(tiny_run.model(), examples(config), config)
    assert cache.bytes_on_disk > 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    config = tiny_run.quiet()
    cache = PrefixCache(0, tmp_path)
    with pytest.raises(OSError, match=rf"prefix_cache: .*{tmp_path}.*No space left.*TMPDIR"):
        cache.fill(tiny_run.model(), examples(config), config)
    assert list(tmp_path.iterdir()) == []
    assert len(cache) == 0


def test_a_fill_that_is_given_up_leaves_nothing() -> None:
    config = tiny_run.quiet()
    cache = PrefixCache(2000)
    assert cache.fill(tiny_run.model(), examples(config), config, on_batch=lambda count: False) is None
    assert (len(cache), cache.bytes_in_memory, cache.bytes_on_disk) == (0, 0, 0)
    assert len(cache.fill(tiny_run.model(), examples(config), config) or []) == len(ROWS)


def test_when_it_cannot_be() -> None:
    data = examples(tiny_run.quiet())
    adapted_first = tiny_run.model(layers=(0,), position="attention")
    dropout = tiny_run.model()
    for layer in dropout.layers:
        layer.self_attn.attention_dropout = 0.1
    for model, why in ((adapted_first, "first layer is adapted"), (dropout, "draw random numbers in training")):
        use, reason = choose_cache(model, tiny_run.quiet(), data, 3)
        assert not use
        assert why in reason
        with pytest.raises(ValueError, match=f"prefix_cache: .*{why}"):
            choose_cache(model, tiny_run.quiet(prefix_cache=True), data, 3)


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_run.model(), examples(tiny_run.quiet())
    assert choose_cache(model, tiny_run.quiet(), data, passes=2)[0]
    assert not choose_cache(model, tiny_run.quiet(), data, passes=1)[0]
    assert choose_cache(model, tiny_run.quiet(prefix_cache=True), data, passes=1)[0]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    assert choose_cache(model, tiny_run.quiet(), data, passes=2)[0]
    assert not choose_cache(model, tiny_run.quiet(prefix_cache_bytes=0), data, passes=2)[0]
