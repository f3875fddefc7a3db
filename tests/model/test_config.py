"""AdapterConfig: sites, budgets, what it refuses, and where it used to be imported from."""

import importlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterkern as ak
from adapterkern.model.adapter import INITS
from adapterkern.model.config import POSITIONS, adapter_num_params


def test_num_params() -> None:
    assert adapter_num_params(4096, 64) == 536_640
    assert sum(p.numel() for p in ak.Adapter(40, 7).parameters()) == adapter_num_params(40, 7)


@pytest.mark.parametrize(
    ("config", "sites"),
    [
        (ak.AdapterConfig(), (0, 1, 2, 3)),
        (ak.AdapterConfig(every=2), (1, 3)),
        (ak.AdapterConfig(every=3), (2,)),
        (ak.AdapterConfig(layers=[3, 0]), (0, 3)),
        (ak.AdapterConfig(layers=[-1, -2]), (2, 3)),
    ],
)
def test_sites(config: ak.AdapterConfig, sites: tuple[int, ...]) -> None:
    assert config.site_layers(4) == sites


def test_budget_of_llama_7b(caplog: pytest.LogCaptureFixture) -> None:
    resolved = ak.AdapterConfig(every=2, max_params=8_000_000).resolve(hidden_size=4096, num_layers=32)
    assert resolved.adapter_dim == 59
    assert resolved.num_params(4096, 32) == 16 * (59 * 8193 + 3 * 4096)
    assert "adapter_dim=59" in caplog.text


@given(hidden=st.integers(1, 600), every=st.integers(1, 4), depth=st.integers(1, 3), budget=st.integers(1, 3_000_000))
def test_budget_is_met_and_not_beatable(hidden: int, every: int, depth: int, budget: int) -> None:
    config = ak.AdapterConfig(every=every, depth=depth, max_params=budget)
    count = (8 // every) * depth
    if count * adapter_num_params(hidden, 1) > budget:
        with pytest.raises(ValueError, match="max_params: expected at least"):
            config.resolve(hidden, 8)
        return
    resolved = config.resolve(hidden, 8)
    assert resolved.num_params(hidden, 8) <= budget
    larger = count * adapter_num_params(hidden, resolved.adapter_dim + 1)
    assert larger > budget or resolved.adapter_dim == 512


def test_config_dict_round_trip() -> None:
    config = ak.AdapterConfig(adapter_dim=3, layers=(1, 2), position="attention", depth=2, eps=1e-6)
    assert ak.AdapterConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="rank: unknown field"):
        ak.AdapterConfig.from_dict({"rank": 3})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"adapter_dim": 0}, ValueError, "adapter_dim: expected an integer from 1 to 512, got 0"),
        ({"adapter_dim": 1.0}, TypeError, "adapter_dim: expected an integer from 1 to 512, got 1.0"),
        ({"every": 0}, ValueError, "every: expected an integer >= 1, got 0"),
        ({"depth": True}, TypeError, "depth: expected an integer >= 1, got True"),
        (
            {"position": "mlp"},
            ValueError,
            "position: expected one of layer, attention, parallel-mlp, parallel-attention, got",
        ),
        ({"activation": None}, ValueError, "activation: expected one of .* got None"),
        ({"init": "zero"}, ValueError, "init: expected one of identity, xavier, svd, got 'zero'"),
        ({"eps": float("nan")}, ValueError, r"eps: expected a number in \[0, inf\), got nan"),
        ({"x_free": 1}, TypeError, "x_free: expected True or False, got 1"),
        ({"layers": 3}, TypeError, "layers: expected a list of layer numbers, got 3"),
        (
            {"layers": [1], "every": 2},
            ValueError,
            r"layers: expected layers or every, not both: each says which layers have adapters; got layers=\[1\] and "
            r"every=2$",
        ),
    ],
)
def test_config_errors(fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ak.AdapterConfig(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ak.AdapterConfig(every=5), "every: expected at most the 4 layers of the model, got 5"),
        (ak.AdapterConfig(layers=[4]), "layers: expected numbers from -4 to 3, got 4"),
        (ak.AdapterConfig(layers=[3, -1]), "layers: expected at least one layer and none twice"),
        (ak.AdapterConfig(layers=[]), "layers: expected at least one layer and none twice"),
    ],
)
def test_site_errors(config: ak.AdapterConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.site_layers(4)


def test_the_old_module_still_has_adapter_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "adapterkern.modules", raising=False)
    with pytest.warns(DeprecationWarning, match=r"modules is now adapterkern\.model\.adapter and .*\.model\.config"):
        old = importlib.import_module("adapterkern.modules")
    assert (old.Adapter, old.AdapterConfig) == (ak.Adapter, ak.AdapterConfig)
    assert (old.INITS, old.POSITIONS, old.adapter_num_params) == (INITS, POSITIONS, adapter_num_params)
    assert importlib.import_module("adapterkern.model.adapter").__spec__.name == "adapterkern.model.adapter"
