"""TrainConfig: what it refuses, and its way through JSON."""

import dataclasses
import json
import math

import pytest

from adapterkern.training import TrainConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", "ranking"),
        ("pooling", "max"),
        ("padding_side", "middle"),
        ("padding", None),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("accumulation", True),
        ("epochs", -1),
        ("max_steps", 0),
        ("seed", -1),
        ("lr", -1e-3),
        ("lr", math.nan),
        ("weight_decay", "0.1"),
        ("max_norm", -1),
        ("warmup", 1.5),
        ("beta2", 1.0),
        ("resume", True),  # without an output_dir
    ],
)
def test_refuses_by_name(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{'output_dir' if name == 'resume' else name}: expected"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_every_field_is_checked(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        TrainConfig(**{name: object()})


def test_refuses_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="train_adapters"):
        TrainConfig(task="causal-lm", train_adapters=False)
    with pytest.raises(ValueError, match="overwrite"):
        TrainConfig(output_dir="x", resume=True, overwrite=True)


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(max_norm=math.inf, output_dir="x", prefix_cache=True)])
def test_survives_json(config: TrainConfig) -> None:
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert TrainConfig.from_dict(json.loads(text)) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 1e-3), ("epochs", "3"), ("epochs", 3.0), ("train_adapters", 1), ("task", None), ("lr", [1])],
)
def test_from_dict_names_a_wrong_field(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        TrainConfig.from_dict({name: value})
