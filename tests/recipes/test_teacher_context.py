"""A teacher that reads more than its student: against whole logits of each text alone."""

from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from adapterkern.recipes.distillation import Distillation
from adapterkern.training import train
from adapterkern.training.feed import Feed
from tests.support import tiny_run
from tests.support.soft_label_reference import plain

QA = [{"prompt": " ".join(f"w{i + k}" for k in range(2 + i % 4)), "completion": f"w{i + 40} w{i}"} for i in range(8)]
CONTEXT = [13, 14, 15]  # w10 w11 w12
LM: dict[str, Any] = {"task": "causal-lm"}


def tokenizer(begins: bool) -> Any:
    made = tiny_run.tokenizer()
    if begins:
        made._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_the_teacher_reads_the_context_before_each_text(side: str, begins: bool, on_policy: float) -> None:
    model = tiny_run.model(init="xavier")
    task = Distillation(model, weight=1.0, divergence="reverse-kl", teacher_context="w10 w11 w12", on_policy=on_policy)
    config = tiny_run.quiet(**LM, padding_side=side, padding="max_length" if side == "left" else "longest")
    examples = task.load(QA[:4], config, tokenizer(begins))
    examples = task.step_examples(examples, config, 0, 0, torch.no_grad)
    expected = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids, start = example.input_ids.tolist(), int(begins)
        assert (ids[0] == 1) == begins
        z = model(torch.tensor([ids])).logits[0, example.positions].double()
        with torch.no_grad(), model.disable_adapter():
            read = torch.tensor([[*ids[:start], *CONTEXT, *ids[start:]]])
            t = model(read).logits[0, example.positions + 3].double()
        expected = expected + plain(z, t, 1.0, "reverse-kl").sum()
    loss, _ = task(Feed(task, config, None)(examples))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = model.adapter_parameters()
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_context_moves_into_the_adapter() -> None:
    """Also with the prefix cache, which holds what the student reads alone."""
    model = tiny_run.model()
    task = Distillation(model, weight=1.0, teacher_context="w10 w11 w12")
    config = tiny_run.quiet(**LM, epochs=8, lr=3e-2, eval_every=2)
    result = train(model, QA, config, tokenizer=tokenizer(False), eval_data=QA, task=task)
    first, *_, last = [record for record in result.history if "divergence" in record]
    assert result.prefix_layers == 3
    assert last["divergence"] < 0.7 * first["divergence"]


def test_what_cannot_be_is_refused() -> None:
    model = tiny_run.model()
    with pytest.raises(ValueError, match="teacher_context: expected a text, got ' '"):
        Distillation(model, teacher_context=" ")
    with pytest.raises(TypeError, match="teacher_context: expected a text, got 3"):
        Distillation(model, teacher_context=3)
    task = Distillation(model, teacher_context="w1")
    with pytest.raises(ValueError, match="packing: expected False beside teacher_context"):
        task.load(QA, tiny_run.quiet(**LM, packing=True), tokenizer(False))
    with pytest.raises(TypeError, match="tokenizer: expected a transformers tokenizer with teacher_context, got None"):
        task.load([{"input_ids": [3, 4, 5]}], tiny_run.quiet(**LM), None)
