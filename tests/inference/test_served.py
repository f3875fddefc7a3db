"""Runs as models of a server: their names, what is refused before a backbone is read, and where a turn ends."""

import shutil
from pathlib import Path

import pytest

import adapterkern as ak
from adapterkern.inference.server.models import find_models, load_models
from adapterkern.model.running import BASE_NAME
from adapterkern.recipes.multitask.task import MultiTask
from tests.support import tiny_chat, tiny_run, tiny_served

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    tiny_served.save_runs(made, 2)
    return made


def test_a_model_is_named_after_its_folder_or_as_the_user_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "run0")
    assert list(find_models([".", f"v1.5={folder / 'run1'}"])) == ["run0", "v1.5"]
    shutil.copytree(folder / "run1", folder / "run0" / "a=b")
    assert list(find_models(["a=b"])) == ["a=b"]


def test_a_run_of_several_tasks_gives_a_model_for_each(tmp_path: Path) -> None:
    model = tiny_run.model()
    for name in ("long", "short"):
        model.add_adapter(name, ak.AdapterConfig(adapter_dim=4, layers=(3,)))
    config = tiny_run.quiet(task="causal-lm", epochs=1, output_dir=tmp_path / "run")
    rows = {name: [{"text": "w1 w2 w3"}, {"text": "w4 w5"}] for name in ("long", "short")}
    ak.train(model, rows, config, tokenizer=tiny_run.tokenizer(), task=MultiTask(model, ["long", "short"]))
    model.unload().save_pretrained(tmp_path / "llama")
    tiny_run.tokenizer().save_pretrained(tmp_path / "llama")
    found = find_models([str(tmp_path / "run")])
    assert list(found) == ["run/long", "run/short"]
    served = load_models(found, model=tmp_path / "llama", dtype="fp32")
    assert list(served.adapters) == ["run/long", "run/short", BASE_NAME]
    assert set(served.model.adapters) == set(served.adapters.values()) - {BASE_NAME}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["classification"], "classification: expected a run of causal-lm, .*, got classification"),
        (["causal-lm", "routing"], "routing: expected a run of causal-lm, .*, got RoutedTask"),
        (["qa"], "qa: expected a run of causal-lm, .*, got QuestionAnswering"),
        (["multitask"], "multitask/.*: expected a run of causal-lm, .*, got classification"),
        (["causal-lm", "causal-lm"], "runs: expected models with names of their own, got 'causal-lm' twice"),
        (["__base__=causal-lm"], "runs: expected models with names of their own, got '__base__' twice"),
        (["=causal-lm"], "runs: expected FOLDER or NAME=FOLDER, got '=causal-lm'"),
        (["x="], "runs: expected FOLDER or NAME=FOLDER, got 'x='"),
    ],
)
def test_refused_before_a_backbone_is_read(sources: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    with pytest.raises(ValueError, match=message):
        find_models(sources)


def test_modules_of_the_backbone_are_refused(tmp_path: Path) -> None:
    model = tiny_run.model(modules_to_save=("lm_head",))
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: expected an adapter without modules of the backbone .*, got lm_head"):
        find_models([str(tmp_path / "run")])


def test_an_adapter_of_another_backbone_is_refused(folder: Path, tmp_path: Path) -> None:
    other = ak.LlamaAdapter(tiny_served.tiny(vocab_size=106), ak.AdapterConfig(adapter_dim=4))
    other.save_pretrained(tmp_path / "other")
    found = find_models([str(folder / "run0"), str(tmp_path / "other")])
    with pytest.raises(ValueError, match="other"):
        load_models(found, model=folder / "llama", dtype="fp32")


def test_a_turn_ends_where_the_template_ends_it(folder: Path) -> None:
    served = load_models(find_models([str(folder / "run0")]), model=folder / "llama", dtype="fp32")
    assert served.ends == frozenset()
    assert served.chat_ends == {tiny_chat.tokenizer().convert_tokens_to_ids("<|im_end|>")}
    assert served.context == tiny_served.CONTEXT
