"""Import paths of earlier versions."""

import importlib
import sys

import pytest

import adapterkern as ak
from adapterkern import _moved

# What README and docs of version 0.1.0 imported.
DOCUMENTED = [
    ("adapterkern.ops", "adapter"),
    ("adapterkern.optim", "ClippedAdamW"),
    ("adapterkern.modules", "AdapterConfig"),
    ("adapterkern.modules", "Adapter"),
    ("adapterkern.llama", "LlamaAdapter"),
    ("adapterkern.low_rank", "init_from_weights"),
    ("adapterkern.training", "load_task"),
    ("adapterkern.training.ablation", "run_study"),
    ("adapterkern.training.ablation_report", "report"),
    ("adapterkern.training.backbone", "load_backbone"),
    ("adapterkern.training.backbone", "save_sources"),
    ("adapterkern.training.data", "load_examples"),
    ("adapterkern.training.outputs", "load_config"),
    ("adapterkern.training.distillation", "Distillation"),
    ("adapterkern.training.distillation", "KeepBehaviour"),
    ("adapterkern.training.distillation", "WithKept"),
    ("adapterkern.training.distillation", "first_layers"),
    ("adapterkern.training.multitask", "MultiTask"),
    ("adapterkern.training.qa", "QuestionAnswering"),
    ("adapterkern.training.qa", "SpanSettings"),
    ("adapterkern.training.router", "RoutingConfig"),
    ("adapterkern.training.routing", "RoutedTask"),
    ("adapterkern.training.study", "Study"),
]


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_documented_names_import(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("old", [old for old, now in _moved._NOW.items() if isinstance(now, str)])
def test_an_old_module_is_the_new_one_and_warns(old: str) -> None:
    sys.modules.pop(f"adapterkern.{old}", None)
    now = importlib.import_module(f"adapterkern.{_moved._NOW[old]}")
    with pytest.warns(DeprecationWarning, match=f"adapterkern.{old} is now {now.__name__}"):
        assert importlib.import_module(f"adapterkern.{old}") is now
    assert now.__spec__ is not None
    assert now.__spec__.name == now.__name__


def test_a_module_that_was_parted_gives_the_names_of_both() -> None:
    sys.modules.pop("adapterkern.modules", None)
    with pytest.warns(DeprecationWarning, match=r"is now adapterkern\.model\.adapter and adapterkern\.model\.config"):
        modules = importlib.import_module("adapterkern.modules")
    assert (modules.Adapter, modules.AdapterConfig) == (ak.Adapter, ak.AdapterConfig)
