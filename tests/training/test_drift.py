"""Drift: the KL divergence from the untouched model, against whole fp64 logits; what it costs, and where it is said."""

import copy
import itertools
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor

import adapterkern as ak
from adapterkern.training import CheckpointError, DataError, NonFiniteError, drift, train
from adapterkern.training.drift import Drift, kl, kl_sums
from tests.support import tiny_run
from tests.support.runs import records
from tests.support.tiny_llama import adapted, tiny

TOKENIZER = tiny_run.tokenizer()
ROWS, EVAL_ROWS = tiny_run.rows(12), tiny_run.rows(6, seed=1)
TEXTS = [{"text": row["text"]} for row in tiny_run.rows(7, seed=2, high=30)]  # some longer than max_length


def whole(model: ak.LlamaAdapter, texts: Any = TEXTS, max_length: int = 16) -> tuple[float, int]:
    """The definition, in fp64, text by text; and the number of tokens."""
    exact = copy.deepcopy(model).double().eval()
    sums, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*TOKENIZER(text["text"]).input_ids, TOKENIZER.eos_token_id][:max_length]])
        with torch.no_grad():
            q = exact(input_ids=ids).logits[0, :-1].double().softmax(-1)
            with exact.disable_adapter():
                p = exact(input_ids=ids).logits[0, :-1].double().softmax(-1)
        sums += (p * (p.log() - q.log())).sum().item()
        tokens += len(p)
    return sums / tokens, tokens


def measured(model: ak.LlamaAdapter, texts: Any = TEXTS, **values: Any) -> float:
    config = tiny_run.quiet(task="causal-lm", **values)
    return ak.evaluate(model, EVAL_ROWS, config, tokenizer=TOKENIZER, drift_data=texts)["drift"]


BACKBONES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Llama", {}, {}),
    ("Llama", {"tie_word_embeddings": False}, {"modules_to_save": ("lm_head", "norm")}),
    ("Llama", {"tie_word_embeddings": False}, {"modules_to_save": ("embed_tokens",)}),
    ("Llama", {}, {"position": "attention"}),
    ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}, {}),
    ("Cohere", {"logit_scale": 4.0}, {}),
]


@pytest.mark.parametrize(("family", "fields", "adapter"), BACKBONES)
def test_it_is_the_divergence_of_whole_logits(
    family: str, fields: dict[str, Any], adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[int] = []

    def counted(log_p: Tensor, log_q: Tensor, p: Tensor) -> Tensor:
        chunks.append(len(log_p))
        return kl(log_p, log_q, p)

    monkeypatch.setattr(drift, "_CHUNK", 5)
    monkeypatch.setattr(drift, "kl", counted)
    model = adapted(tiny(family, initializer_range=0.3, **fields), **adapter)
    expected, tokens = whole(model)
    assert expected > 4e-3
    for values in ({"eval_batch_size": 3}, {"padding": "max_length"}, {"packing": True}, {"padding_side": "left"}):
        chunks.clear()
        assert measured(model, **values) == pytest.approx(expected, rel=2e-5)
        assert (max(chunks), sum(chunks)) == (5, tokens)
    model.skip_sites(1)
    assert measured(model) != pytest.approx(expected, rel=1e-4)


def test_it_is_zero_to_the_bit_where_nothing_was_learned_and_small_where_little_was() -> None:
    model = tiny_run.model()
    assert measured(model) == 0
    assert measured(model, precision="bf16") == 0
    with torch.no_grad():
        for p in model.adapter_parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    expected, _ = whole(model)
    assert 1e-7 < expected < 1e-4
    assert measured(model) == pytest.approx(expected, rel=1e-2, abs=2e-8)


FAR: dict[str, Any] = {"initializer_range": 1.0, "tie_word_embeddings": False}  # logits of ±50


@pytest.mark.parametrize(
    ("family", "fields", "cap"),
    [
        ("Llama", {}, lambda logits: logits),
        ("Gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}, lambda logits: 30 * torch.tanh(logits / 30)),
        ("Cohere", {"logit_scale": 0.5}, lambda logits: logits / 2),
    ],
)
def test_a_small_one_is_not_the_rounding_of_the_lm_head(
    family: str, fields: dict[str, Any], cap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "_WIDENED", 40 * 32)  # the last slice of rows is smaller
    model = ak.LlamaAdapter(tiny(family, **FAR, **fields), ak.AdapterConfig(adapter_dim=4))
    draw = torch.Generator().manual_seed(0)
    bare = 2 * torch.randn(20, 32, generator=draw)
    states = [s.bfloat16() for s in (bare, bare * (1 + 0.004 * torch.randn(bare.shape, generator=draw)))]
    for dtype in (torch.float32, torch.bfloat16):
        model.base.to(dtype)
        head = model.get_output_embeddings().weight.double()
        log_p, log_q = (cap(s.double() @ head.T).log_softmax(-1) for s in states)
        expected = (log_p.exp() * (log_p - log_q)).sum().item()
        assert 1e-5 < expected / 20 < 1e-3  # rounded logits would make it two or three times as much
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, dtype == torch.float32):
            found = kl_sums(model, states[0], states[1:])
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected, rel=1e-3)


def test_a_token_that_the_head_masks_adds_nothing_and_an_infinite_one_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = torch.tensor([[0.0, 0.25, 0.75]])
    for masked in (-math.inf, -3.0):
        log_q = torch.tensor([[masked, math.log(0.5), math.log(0.5)]])
        assert kl(p.log(), log_q, p).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    monkeypatch.setattr(drift, "kl", lambda log_p, log_q, p: torch.full(log_p.shape[:1], math.inf))
    config = tiny_run.quiet(max_steps=1)
    with pytest.raises(NonFiniteError, match="step 1: the evaluation's drift is inf"):
        train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS, drift_data=TEXTS)


def test_all_adapters_of_a_stack_are_off_in_the_untouched_model() -> None:
    model = adapted(tiny())
    model.add_adapter("top", ak.AdapterConfig(adapter_dim=4, layers=[2]))
    model.set_adapter(["default", "top"])
    assert measured(model) == pytest.approx(whole(model)[0], rel=2e-5)


def test_each_evaluation_of_a_run_has_it_for_one_pass_of_the_layers_above_the_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: Counter[int] = Counter()
    calls: dict[str, list[Counter[int]]] = {"prepare": [], "measure": []}

    def counting(name: str) -> Any:
        original = getattr(Drift, name)

        def counted(self: Drift, *args: Any) -> Any:
            before = ran.copy()
            result = original(self, *args)
            calls[name].append(ran - before)
            return result

        return counted

    for name in calls:
        monkeypatch.setattr(Drift, name, counting(name))

    def run(model: ak.LlamaAdapter, texts: Any = TEXTS, **values: Any) -> Any:
        settings = {"prefix_cache": True, "eval_every": 2, "max_steps": 6, "warmup": 0, "checkpoint_every": 2}
        config = tiny_run.quiet(**(settings | {"output_dir": tmp_path / "run"} | values))
        data = {"eval_data": EVAL_ROWS, "drift_data": texts}
        return train(model, ROWS, config, tokenizer=TOKENIZER, **data)

    model = tiny_run.model()
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.update([number]))
    result = run(model)
    assert result.prefix_layers == 3
    batches = math.ceil(len(TEXTS) / 4)
    assert calls["prepare"] == [Counter({3: batches})]
    assert calls["measure"] == 3 * [Counter({3: batches})]

    # What it says: history, metrics.jsonl, the result, and the card.
    evaluations = [r for r in result.history if r["kind"] == "eval"]
    assert [r["drift"] for r in records(tmp_path / "run") if r["kind"] == "eval"] == [r["drift"] for r in evaluations]
    assert 0 < evaluations[0]["drift"] < evaluations[-1]["drift"]
    assert result.metrics["drift"] == evaluations[-1]["drift"] == pytest.approx(whole(model)[0], rel=1e-4)
    card: Any = ModelCard.load(tmp_path / "run" / "README.md")
    assert f"| drift | {result.metrics['drift']:.6g} |" in card.text
    assert "in nats per token, is measured on ``drift_data``: 7 texts." in card.text
    scores = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert scores["drift"] == pytest.approx(result.metrics["drift"], abs=1e-6)

    # The same from the saved run, without the prefix; and no other number of the run depends on it.
    config, head = ak.training.load_run(tmp_path / "run")
    loaded = ak.LlamaAdapter.from_pretrained(tiny_run.model().unload(), tmp_path / "run")
    again = ak.evaluate(loaded, EVAL_ROWS, config, tokenizer=TOKENIZER, head=head, drift_data=TEXTS)
    assert again["drift"] == pytest.approx(result.metrics["drift"], rel=1e-5)
    without = tiny_run.model()
    plain = run(without, None, output_dir=None)
    assert "drift" not in plain.metrics
    assert {name: result.metrics[name] for name in ("loss", "accuracy")} == {
        name: plain.metrics[name] for name in ("loss", "accuracy")
    }
    assert tiny_run.same_bits(tiny_run.weights(without), tiny_run.weights(model))

    # Resumed, it goes on as it was; other texts are another series, also after steps without any.
    def refuse_others(**values: Any) -> None:
        with pytest.raises(CheckpointError, match="measured on other texts so far: resume with the same, or with drif"):
            run(tiny_run.model(), TEXTS[1:], resume=True, **values)

    refuse_others()
    shutil.rmtree(result.checkpoint)
    resumed = run(tiny_run.model(), resume=True)
    assert [r["drift"] for r in resumed.history if r["kind"] == "eval"] == [r["drift"] for r in evaluations]
    assert "drift" not in run(tiny_run.model(), None, resume=True, max_steps=8).metrics
    refuse_others(max_steps=10)
    assert run(tiny_run.model(), resume=True, max_steps=10).metrics["drift"] > 0


def test_the_best_by_drift_is_the_lowest() -> None:
    config = tiny_run.quiet(eval_every=1, max_steps=3, warmup=0, best="drift")
    result = train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS, drift_data=TEXTS)
    assert result.best_step == 1
    with pytest.raises(ValueError, match="best: expected a metric of the evaluations: loss or accuracy; got 'drift'"):
        train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS)


def test_a_dry_run_measures_a_batch_of_it_from_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Counter[int] = Counter()
    model = tiny_run.model()
    rehearsals: list[Counter[int]] = []
    original = Drift.rehearse

    def counted(self: Drift, run: Any) -> Any:
        before = ran.copy()
        found = original(self, run)
        rehearsals.append(ran - before)
        lengths = sorted(min(len(row["text"].split()) + 1, 16) for row in TEXTS)
        assert found == pytest.approx(2 * [sum(lengths) / sum(lengths[4:])])  # of two batches, at a tick per part
        return found

    monkeypatch.setattr(Drift, "rehearse", counted)
    monkeypatch.setattr(drift, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.update([number]))
    config = tiny_run.quiet(eval_every=1, max_steps=3, warmup=0, best="drift", prefix_cache=True)
    data = {"eval_data": EVAL_ROWS, "drift_data": TEXTS}
    dry = train(model, ROWS, config, tokenizer=TOKENIZER, **data, dry_run=True).dry_run
    assert dry is not None
    assert rehearsals == [Counter({3: 4})]  # twice, untouched and adapted
    assert dry.eval_seconds > 1
    assert dry.seconds > 3 * dry.eval_seconds + 1


@pytest.mark.parametrize(
    ("values", "data", "message"),
    [
        ({"train_adapters": False}, EVAL_ROWS, "drift_data: expected None beside a head alone, which leaves"),
        ({}, None, "drift_data: expected eval_data beside it, since evaluations measure drift, got data alone"),
    ],
)
def test_refusals(values: dict[str, Any], data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_run.model(), ROWS, tiny_run.quiet(**values), tokenizer=TOKENIZER, eval_data=data, drift_data=TEXTS)


def test_texts_that_are_learned_are_named_and_so_is_the_argument_of_bad_ones(caplog: pytest.LogCaptureFixture) -> None:
    learned = [{"text": f"w{number} w7 w9"} for number in (60, 61, 62)]
    labeled = [{**row, "label": "a"} for row in learned] + ROWS  # without the token that ends a text
    long, longer = ({"text": " ".join(["w3"] * count)} for count in (40, 41))  # the same after the cut

    def run(rows: Any, texts: Any, **values: Any) -> None:
        config = tiny_run.quiet(max_steps=1, **values)
        train(tiny_run.model(), rows, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS, drift_data=texts, dry_run=True)

    run([*labeled, {**long, "label": "a"}], [*TEXTS[:1], *learned[1:], longer, {"text": long["text"][:-2] + "w4"}])
    assert "drift_data: 2 of 5 texts are training texts, too (row 1)" in caplog.messages
    run([*learned, longer], [*TEXTS[:1], long, *learned], task="causal-lm")
    assert "drift_data: 3 of 5 texts are training texts, too (row 2)" in caplog.messages
    caplog.clear()
    run([*labeled, {**long, "label": "a"}], [*TEXTS[:2], long])
    assert "drift_data: 1 of 3 texts are training texts, too (row 2)" in caplog.messages
    caplog.clear()
    run(labeled, TEXTS)
    assert not [message for message in caplog.messages if "training texts" in message]
    for texts, message in ([{"a": 1}], "column 'text' is missing"), ([{"text": ""}], "1 bad row:\n  row 0: "):
        with pytest.raises(DataError, match=f"^drift_data: {message}"):
            run(ROWS, texts)
    with pytest.raises(TypeError, match=r"^drift_data: expected a path or a list of rows, got int"):
        run(ROWS, 3)
