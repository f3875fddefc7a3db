"""A question-answering run of version 0.1 loads, scores as it did, and resumes."""

import importlib
import warnings
from pathlib import Path

import pytest

from adapterkern import AdapterConfig, LlamaAdapter
from adapterkern.recipes.qa import QuestionAnswering, SpanSettings
from adapterkern.training import evaluate, train
from tests.support import golden_runs

pytestmark = pytest.mark.slow

SETTINGS = SpanSettings(doc_stride=4, pointer_dim=2, null_threshold=1.0)


def test_a_saved_run_scores_as_it_did() -> None:
    llama, tokenizer = golden_runs.backbone()
    task, config = QuestionAnswering.from_pretrained(llama, golden_runs.RUNS / "qa")
    assert task.span_settings == SETTINGS
    metrics = evaluate(task.model, golden_runs.QUESTIONS, config, tokenizer=tokenizer, task=task)
    golden_runs.check("qa", metrics)


def test_a_checkpoint_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    folder = golden_runs.cut("qa", tmp_path / "qa")
    llama, tokenizer = golden_runs.backbone()
    model = LlamaAdapter(llama, AdapterConfig(adapter_dim=2, layers=[-1]))
    config = golden_runs.config(max_length=44, output_dir=folder, resume=True)
    task = QuestionAnswering(model, SETTINGS)
    assert train(model, golden_runs.QUESTIONS, config, tokenizer=tokenizer, task=task).steps == 4
    metrics = evaluate(model, golden_runs.QUESTIONS, config, tokenizer=tokenizer, task=task)
    golden_runs.check("qa", metrics)


def test_the_old_module_has_its_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module("adapterkern.training.qa")
    assert (module.QuestionAnswering, module.SpanSettings) == (QuestionAnswering, SpanSettings)
    assert module.SpanHead(4, 2).pointer_dim == 2
