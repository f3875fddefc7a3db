"""Recipes in which all sequences share the backbone's modules refuse an adapter that trains some of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterkern.model.config import AdapterConfig
from adapterkern.recipes.ablation.runs import run_study
from adapterkern.recipes.ablation.study import Study
from adapterkern.recipes.distillation import Distillation, KeepBehaviour
from adapterkern.recipes.multitask import MultiTask
from adapterkern.recipes.routing import RoutedTask
from tests.support import tiny_run


def of(*names: str) -> Any:
    return tiny_run.model(modules_to_save=list(names))


REFUSALS: list[tuple[str, Callable[[], Any], str]] = [
    (
        "several tasks",
        lambda: MultiTask(of("norm"), ["default"]),
        "modules_to_save: expected none of an adapter that is",
    ),
    ("experts", lambda: RoutedTask(of("norm")), "modules_to_save: expected none of an adapter that is mixed"),
    (
        "its own teacher",
        lambda: Distillation(of("lm_head")),
        "modules_to_save: expected neither embeddings nor LM head",
    ),
    ("what is kept", lambda: KeepBehaviour(of("embed_tokens")), "modules_to_save: expected neither embeddings nor LM"),
    (
        "another teacher",
        lambda: Distillation(of("lm_head"), tiny_run.model().unload()),
        "modules_to_save: expected a frozen LM head, to which the loss of soft labels gives no gradient, got ",
    ),
]


@pytest.mark.parametrize(("call", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"model_type": "llama"}', "output: expected a folder without a model"),
        (
            "study.json",
            '{"theirs": 1}',
            r"study\.json: expected adapterkern's file or none, .* theirs",
        ),
    ],
)
def test_a_study_writes_into_no_folder_of_others(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    study = Study(adapter=AdapterConfig(adapter_dim=4), training=tiny_run.quiet(), vary={})
    with pytest.raises(ValueError, match=message):
        run_study(study, tiny_run.model().unload(), [], [], output=tmp_path, tokenizer=tiny_run.tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_modules_that_teacher_and_student_do_not_share_are_allowed() -> None:
    assert Distillation(of("norm")).model.adapter_config().modules_to_save == ("model.norm",)
