"""What a backbone is asked before a run, and what is refused by its answer: one line each."""

from collections.abc import Callable
from typing import Any

import pytest

import adapterkern as ak
from tests.support import families, tiny_run
from tests.support.families import IDS

pytestmark = families.LISTED
ROWS = [{"input_ids": IDS[0, :n].tolist(), "label": label} for n, label in ((12, "a"), (5, "b"))]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
DYNAMIC = {"max_position_embeddings": 4, "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}}


def model(name: str, **fields: Any) -> ak.LlamaAdapter:
    llama = families.tiny(name, **fields)
    return ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=4, layers=[2]))


def train(name: str, fields: dict[str, Any] | None = None, **values: Any) -> Callable[[], Any]:
    return lambda: ak.train(model(name, **(fields or {})), ROWS, tiny_run.quiet(**values))


def without_head() -> Any:
    adapted = model("LlamaForCausalLM")
    adapted.base.lm_head = None
    return ak.train(adapted, ROWS, tiny_run.quiet(task="causal-lm"))


def by_name() -> Any:
    return model("Gemma3nForCausalLM")(IDS, adapter_names=["default"] * 3, use_cache=False)


CACHE = "prefix_cache: expected None or False, because .*"
REFUSED = [
    (
        "no head",
        without_head,
        ValueError,
        "model: expected a backbone with an LM head for causal-lm, but LlamaForCausalLM has no LM head",
    ),
    (
        "several streams as one",
        train("Qwen4ExpForCausalLM"),
        ValueError,
        r"model: expected a backbone that runs on token ids alone, got Qwen4ExpForCausalLM \(ValueError: .* on 32 ",
    ),
    (
        "left padding",
        train("Llama4ForCausalLM", {"attn_scale": 0.5}, padding_side="left"),
        ValueError,
        "padding_side: expected 'right' for Llama4ForCausalLM, in which a row has other states if .*; got 'left'",
    ),
    (
        "cache, dropout",
        train("LlamaForCausalLM", {"attention_dropout": 0.1}, prefix_cache=True),
        ValueError,
        f"{CACHE} draw random numbers in training .*; got True",
    ),
    (
        "cache, length",
        train("LlamaForCausalLM", DYNAMIC, prefix_cache=True),
        ValueError,
        f"{CACHE} give a text other activations in a longer batch .*; got True",
    ),
    (
        "cache, no two calls",
        train("BambaForCausalLM", prefix_cache=True),
        ValueError,
        rf"{CACHE}BambaModel cannot be run in two calls \(AttributeError: .*\); got True",
    ),
    (
        "adapters per row",
        by_name,
        ValueError,
        "adapter_names: expected None for Gemma3nForCausalLM, whose layers pass on several streams",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)
