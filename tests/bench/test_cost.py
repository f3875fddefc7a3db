"""What a 7B costs: every row is of the size that it says, and an iteration is LitGPT's."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cost, engine, published, report
from bench.cases import relative_error
from bench.llama_step import Step, StepSpec, make_llama

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def trainable(spec: StepSpec) -> dict[str, int]:
    """Each row's number of parameters, by hand."""
    d, layers, heads = spec.hidden_size, spec.num_hidden_layers, spec.num_attention_heads
    kv = d * spec.num_key_value_heads // heads
    outputs = 2 * d + 2 * kv + 2 * spec.intermediate_size + d  # of a layer's seven projections
    adapters = len(spec.sites) * (spec.adapter_dim * (2 * d + 1) + 3 * d)
    prompt = 10 * d + heads
    return {
        cost.FROZEN: 0,
        cost.EAGER: adapters,
        cost.OURS: adapters,
        cost.LORA: layers * 8 * (2 * d + d + kv),
        cost.PROMPTS: (layers - 2) * prompt,
        cost.PEFT_PROMPTS: (layers - 2) * (10 * d + 1),
        cost.V2: layers * (prompt + 2 * outputs + 2 * d) + d,
    }


def test_each_row_has_as_many_parameters_as_it_says_and_at_7b_litgpts() -> None:
    case = cost.cases(CPU, quick=True)[1]
    made = {v.name: v.info["trainable"] for v in cost.build(case, CPU, cost.names(case, CPU))}
    assert made == trainable(StepSpec(**case.shape))
    whole = cost.of_7b(torch.device("cuda"))
    specs = [StepSpec(**c.shape) for c in whole]
    assert [(s.batch, s.length, s.accumulate) for s in specs] == [
        (1, 1304, 128), (1, 110, 128), (2, 1304, 64), (2, 110, 64), (4, 1304, 32), (4, 110, 32),
    ]  # fmt: skip
    litgpt = {row.name: row.trainable for row in published.LITGPT}
    counted = trainable(specs[0])
    assert counted[cost.LORA] == litgpt["LitGPT LoRA"]
    assert counted[cost.PROMPTS] == litgpt["LitGPT adapter"]
    # prompts and gates in the first two layers as well, but no bias and scale of the LM head
    assert counted[cost.V2] == litgpt["LitGPT adapter v2"] + 2 * (10 * 4096 + 32) - 2 * 32_000
    assert 0.98 < counted[cost.OURS] / counted[cost.LORA] <= 1


def test_an_update_takes_the_mean_of_its_batches_gradients() -> None:
    case = cost.cases(CPU, quick=True)[1]
    spec = StepSpec(**{**case.shape, "accumulate": 3})
    made = cost._STEPS[cost.EAGER](spec, make_llama(spec))
    seen: list[list[torch.Tensor]] = []

    def recording(parameters: list[torch.Tensor]) -> Any:
        return lambda: seen.append([p.grad.clone() for p in parameters])

    step = Step(spec, made.llama, made.hidden_states, made.parameters, recording)
    expected = torch.autograd.grad(step.loss(), step.trained)
    for updates in (0, 0, 1, 1, 1, 2):
        step()
        assert len(seen) == updates
    for got, one in zip(seen[1], expected, strict=True):
        assert relative_error(got, one) < 1e-6  # element by element the rounding depends on the CPU
    assert all(p.grad is None for p in step.trained)


def test_a_rehearsal_measures_every_row_and_a_card_that_is_too_small_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(spec: StepSpec, llama: Any) -> Step:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(cost._STEPS, cost.V2, too_large)
    case = cost.cases(CPU, quick=True)[0]
    plan = [(dataclasses.replace(case, shape={**case.shape, "batch": 1}), cost.names(case, CPU))]
    path = tmp_path / "cost.json"
    options = engine.Options(("cost",), CPU, True, path, None, plan=plan, case_seconds=0.01, case_rounds=2, roofs=False)
    assert engine.run(options) == 0
    run = report.load(path)
    ((_, entries),) = run.groups.items()
    assert [e.variant for e in entries] == [name for name in cost.names(case, CPU) if name != cost.V2]
    assert [(m["variant"], m["reason"]) for m in run.data["missing"]] == [(cost.V2, "out of memory")]
    lora = next(e for e in entries if e.variant == cost.LORA)
    lora.info["update_seconds"] = 0.64  # of 64 batches
    timed = dataclasses.replace(lora, times=[0.05, 0.05, 0.2])
    assert report.minutes(timed) == pytest.approx((0.05 + 0.01) * 1000 / 60)
    # fp32: the backbone, and what is trained with its gradient and both moments
    held = make_llama(StepSpec(**case.shape)).num_parameters() + 4 * lora.info["trainable"]
    assert lora.info["model_bytes"] == pytest.approx(4 * held, rel=1e-3)
    assert json.loads(path.read_text())["benchmarks"][0]["extra_info"]["published"] == [
        dataclasses.asdict(row) for row in published.LITGPT[:3]
    ]


def test_litgpts_minutes_stand_beside_short_texts_and_its_gigabytes_beside_long_ones() -> None:
    def entry(length: int, batch: int) -> report.Entry:
        shape = {"length": length, "accumulate": 128 // batch}
        info: dict[str, Any] = {"case": {"shape": shape}, "model_bytes": 13e9, "peak_bytes": 6e9, "trainable": 1}
        rows = [dataclasses.asdict(row) for row in published.of_litgpt(batch)]
        return report.Entry("ours", [0.06] * 5, info | {"update_seconds": 0.0, "error": None, "published": rows})

    def shown(length: int, batch: int) -> str:
        return re.sub(" +", " ", report.cost_table([entry(length, batch)], None))

    assert "| ours | 1 | 19.00 | 1.00 |" in shown(1304, 1)
    assert "LoRA, Llama 2 7B, A100-SXM4-40GB (published) | 4,194,304 | 21.30 | – |" in shown(1304, 1)
    assert "LoRA, Llama 2 7B, A100-SXM4-40GB (published) | 4,194,304 | – | 2.36 |" in shown(110, 1)
    assert "LoRA, Llama 2 7B, A100-SXM4-40GB (published) | 4,194,304 | out of memory | – |" in shown(1304, 4)


def test_a_parameter_without_a_gradient_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(spec: StepSpec, llama: Any) -> Step:
        step = cost._frozen(spec, llama)
        step.trained = [torch.nn.Parameter(torch.ones(1))]
        return step

    monkeypatch.setitem(cost._STEPS, cost.OURS, idle)
    (variant,) = cost.build(cost.cases(CPU, quick=True)[1], CPU, [cost.OURS])
    assert variant.failed
    assert "expected a gradient of all 1 parameters, got none of 1" in variant.missing
