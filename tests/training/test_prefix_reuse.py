"""The prefix cache is exact or off: what makes two passes differ is found by running the backbone."""

from typing import Any

import pytest
import torch
from torch import nn

import adapterkern as ak
from adapterkern.training import PrefixCache
from adapterkern.training.data.examples import load_examples
from adapterkern.training.data.prefix import choose_cache
from tests.support import families, tiny_run

pytestmark = families.LISTED
ROWS = [{"input_ids": list(range(3, 3 + n)), "label": "ab"[i % 2]} for i, n in enumerate((30, 20, 13, 5))]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LONG = ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
DYNAMIC = {"max_position_embeddings": 16, "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}}
LONGROPE = {"rope_parameters": LONG, "original_max_position_embeddings": 16}
RANDOM = "draw random numbers in training"
LENGTH = "other activations in a longer batch"
CUT = "cannot be run in two calls"
# name, fields, why there is no cache
OFF = {
    "attention dropout": ("Llama", {"attention_dropout": 0.1}, RANDOM),
    "residual dropout": ("SeedOss", {"residual_dropout": 0.1}, RANDOM),
    "embedding dropout": ("Starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.1}, RANDOM),
    "rare dropout": ("Phi3", {"resid_pdrop": 0.001}, RANDOM),
    "router jitter": ("Mixtral", {"router_jitter_noise": 0.1}, RANDOM),
    "dynamic NTK": ("Llama", DYNAMIC, LENGTH),
    "LongRoPE": ("Phi3", LONGROPE, LENGTH),
    "no setter": ("Bamba", {}, CUT),
    "layers that share": ("HYV4", {}, CUT),
    "own embeddings": ("Granite", {"embedding_multiplier": 12.0}, "does more than run its layers"),
}


def adapted(family: str, layers: Any = (2, 3), **fields: Any) -> ak.LlamaAdapter:
    llama = families.tiny(f"{family}ForCausalLM", **fields)
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=4, layers=layers))
    families.draw(model)
    return model


def config(**values: Any) -> ak.TrainConfig:
    return tiny_run.quiet(**({"max_length": 32, "max_steps": 2, "log_every": 1} | values))


def choice(model: ak.LlamaAdapter, rows: Any = ROWS, **values: Any) -> tuple[bool, str]:
    examples = load_examples(rows, config())[0]
    return choose_cache(model, config(**values), examples, passes=2)


@pytest.mark.parametrize("kind", OFF)
def test_off_with_its_reason(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, fields, why = OFF[kind]
    model = adapted(family, **fields)
    with pytest.raises(ValueError, match=f"prefix_cache: expected None or False, because .*{why}.*; got True"):
        choice(model, prefix_cache=True)
    outcomes = []
    for cache in (False, None):
        trained = adapted(family, **fields)
        result = ak.train(trained, ROWS, config(prefix_cache=cache, progress=True))
        assert result.prefix_layers == 0
        outcomes.append(tiny_run.weights(trained, result.head))
    assert tiny_run.same_bits(*outcomes)
    lines = [line for line in capsys.readouterr().err.splitlines() if why in line]
    assert len(lines) == 1
    assert lines[0].startswith("prefix cache: off, since ")


def test_on_where_the_randomness_is_above() -> None:
    model = adapted("Llama", layers=[1, 3])
    model.layers[2].self_attn.attention_dropout = 0.5
    model.layers[3].register_forward_hook(lambda *_: torch.rand(1) and None)
    assert choice(model, prefix_cache=True)[0]
    model.layers[1].register_forward_pre_hook(lambda *_: torch.rand(1) and None)  # drawn, and of no effect
    assert RANDOM in choice(model)[1]


@pytest.mark.parametrize(("family", "fields"), [("Llama", DYNAMIC), ("Phi3", LONGROPE)])
def test_on_where_no_batch_is_long_enough(family: str, fields: dict[str, Any]) -> None:
    short = [row for row in ROWS if len(row["input_ids"]) <= 16]
    model = adapted(family, **fields)
    assert choice(model, short)[0]
    assert choice(model, padding="max_length")[0]
    assert not choice(model)[0]
    assert choice(model, short)[0]  # the question about a long batch left nothing behind
    numbers = []
    for cache in (False, True):
        trained = adapted(family, **fields)
        result = ak.train(trained, ROWS, config(prefix_cache=cache, padding="max_length"))
        assert result.prefix_layers == (3 if cache else 0)
        numbers.append(tiny_run.weights(trained, result.head))
    assert tiny_run.same_bits(*numbers)


def test_asking_changes_nothing() -> None:
    model = adapted("Llama", attention_dropout=0.1)
    model.base.train()
    model.layers[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    choice(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_another_answer_in_training() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.training else 2 * x

    model = adapted("Llama")
    model.layers[0].mlp.act_fn = Scaled()
    assert "compute something else in training than in evaluation" in choice(model)[1]


def test_a_resumed_run_without_what_it_cached_goes_on() -> None:
    examples = load_examples(ROWS, config())[0]
    dropout, plain = adapted("Llama", attention_dropout=0.1), adapted("Llama")
    assert choose_cache(plain, config(), examples, passes=1, before=True)[0]
    assert choose_cache(plain, config(), examples, passes=2, before=False) == (
        False,
        "the run that is resumed has none",
    )
    use, why = choose_cache(dropout, config(), examples, passes=2, before=True)
    assert not use
    assert RANDOM in why


def test_each_cut_is_asked_for() -> None:
    """HYV4's last two layers use what the second chose: they can be cut before the second, but not after it."""
    llama = families.tiny("HYV4ForCausalLM")
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=4, layers=[1]))
    assert CUT in model.split_obstacle
    assert model.prefix_length == 2


@pytest.mark.parametrize("family", ["ModernBertDecoder", "NemotronH", "GraniteMoeHybrid", "KimiLinear", "Inkling"])
def test_decoders_without_llama_s_modules_have_a_key(family: str) -> None:
    """Their embeddings or RoPE have other names, or there are none."""
    cache = PrefixCache()
    model = adapted(family)
    result = ak.train(model, ROWS, config(prefix_cache=None), cache=cache)
    assert (len(cache) > 0) == (result.prefix_layers > 0) == (not model.split_obstacle)
