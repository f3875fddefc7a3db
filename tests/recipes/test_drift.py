"""Drift of every kind of task: of each adapter that it learns, and by the route that a text takes."""

from typing import Any

import pytest
import torch

import adapterkern as ak
from adapterkern.recipes.distillation import Distillation, KeepBehaviour, WithKept, first_layers
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.recipes.qa import QuestionAnswering
from adapterkern.training import train
from tests.support import tiny_qa, tiny_recipes, tiny_run
from tests.support.tiny_llama import draw

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(8)
TEXTS = [{"text": row["text"]} for row in tiny_run.rows(5, seed=2)]


def measured(model: ak.LlamaAdapter, task: Any = None, rows: Any = ROWS, **values: Any) -> dict[str, float]:
    config = tiny_run.quiet(**({"task": "causal-lm", "eval_batch_size": 2} | values))
    return ak.evaluate(model, rows, config, tokenizer=TOKENIZER, task=task, drift_data=TEXTS)


def test_of_several_tasks_each_has_its_own() -> None:
    model = tiny_recipes.many_adapters()
    alone = {}
    for name in tiny_recipes.ADAPTERS:
        draw(model, name)
        model.set_adapter(name)
        alone[name] = measured(model)["drift"]
    assert len(set(alone.values())) == 3
    data = dict.fromkeys(alone, ROWS)
    found = measured(model, MultiTask(model, list(alone)), data)
    for name, expected in alone.items():
        assert found[f"{name}/drift"] == pytest.approx(expected, rel=1e-5)
    assert found["drift"] == pytest.approx(sum(alone.values()) / 3, rel=1e-5)

    # In a run, from the prefix below the first adapter of all
    task = MultiTask(model, list(alone))
    config = tiny_run.quiet(task="causal-lm", lr=1e-12, max_steps=1, prefix_cache=True, best="b/drift")
    result = train(model, data, config, tokenizer=TOKENIZER, eval_data={"a": ROWS}, task=task, drift_data=TEXTS)
    assert result.prefix_layers == 2
    assert result.metrics is not None
    for name, expected in alone.items():
        assert result.metrics[f"{name}/drift"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_a_text_takes_its_route(per: str) -> None:
    task = tiny_recipes.routed(per=per)
    sums, tokens = 0.0, 0
    for row in TEXTS:
        ids = torch.tensor([[*TOKENIZER(row["text"]).input_ids, TOKENIZER.eos_token_id][:16]])
        with torch.no_grad(), task.routed(torch.ones_like(ids)):
            q = task.model(input_ids=ids).logits[0, :-1].double().softmax(-1)
        with torch.no_grad(), task.model.disable_adapter():
            p = task.model(input_ids=ids).logits[0, :-1].double().softmax(-1)
        sums += (p * (p.log() - q.log())).sum().item()
        tokens += len(p)
    assert sums / tokens > 1e-3
    assert measured(task.model, task)["drift"] == pytest.approx(sums / tokens, rel=1e-4)


def test_it_is_the_divergence_of_texts_that_are_kept_and_another_teacher_does_not_count() -> None:
    model = tiny_run.model()
    draw(model)
    metrics = measured(model, KeepBehaviour(model), WithKept(ROWS, TEXTS))
    assert metrics["drift"] == pytest.approx(metrics["kept_divergence"], rel=1e-5)
    alone = measured(model)["drift"]
    assert measured(model, Distillation(model, tiny_run.model(seed=1).base, top_k=3))["drift"] == alone
    cut = ak.LlamaAdapter(first_layers(tiny_run.model().unload(), 3), ak.AdapterConfig(adapter_dim=4))
    assert measured(cut, Distillation(cut, tiny_run.model().base))["drift"] == 0


def test_question_answering_has_it(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_qa.model()
    config = tiny_qa.quiet(max_steps=2, warmup=0)
    texts = [{"text": question.context, "topic": 1} for question in tiny_qa.examples()]
    how: dict[str, Any] = {"tokenizer": tiny_qa.TOKENIZER, "eval_data": tiny_qa.EXAMPLES, "drift_data": texts}
    result = train(model, tiny_qa.EXAMPLES, config, task=QuestionAnswering(model), **how)
    assert result.metrics is not None
    assert result.metrics["drift"] > 0
    assert "f1" in result.metrics
    assert "data: column not used: 'topic'" in caplog.messages
