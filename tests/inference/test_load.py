"""``ak.load`` on saved runs of every kind, of an earlier version too, and on adapters alone."""

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import adapterkern as ak
from adapterkern.inference import runs
from adapterkern.inference.classifier import Classifier
from adapterkern.recipes.multitask import MultiTask
from adapterkern.recipes.qa import QuestionAnswering
from adapterkern.recipes.routing import RoutedTask
from adapterkern.training.run.lock import in_one_thread

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)  # where the runs' sources.json has their backbone and data


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("classification", Classifier),
        ("classification/checkpoints/step-00000004", Classifier),
        ("routing", Classifier),
        ("keeping", Classifier),
        ("multitask/tasks/small", Classifier),
        ("causal-lm", ak.LlamaAdapter),
        ("distillation", ak.LlamaAdapter),
        ("multitask", MultiTask),
        ("qa", QuestionAnswering),
    ],
)
def test_every_kind(name: str, kind: type) -> None:
    model, tokenizer = ak.load(name)
    assert not any(module.training for module in model.modules())
    assert isinstance(model, kind)
    assert tokenizer("red")["input_ids"]
    if isinstance(model, Classifier):
        assert isinstance(model.task, RoutedTask) == (name == "routing")


@pytest.mark.parametrize("name", ["classification", "routing", "multitask"])
def test_what_is_drawn_next_does_not_depend_on_it(name: str) -> None:
    before = torch.get_rng_state()
    ak.load(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_classifier_is_one_of_transformers() -> None:
    model, tokenizer = ak.load("classification")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.id2label == {0: "no", 1: "yes"}
    texts = ["red blue", "red", "black green white"]
    found = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, batch_size=3)
    expected = ak.predict(model, [{"text": text} for text in texts])
    assert [one["label"] for one in found] == [p.label for p in expected]
    assert [one["score"] for one in found] == pytest.approx([p.probability for p in expected])
    inside = r"got LlamaForSequenceClassification: give the one inside, model\.task\.model, with head=model\.task\.head"
    with pytest.raises(TypeError, match=inside):
        ak.evaluate(model, [{"text": "red", "label": "no"}], ak.TrainConfig(), tokenizer=tokenizer)


def test_a_classifier_pads_on_either_side_and_gives_a_loss() -> None:
    model, tokenizer = ak.load("classification")
    ids = tokenizer("red blue green", return_tensors="pt")["input_ids"].to(model.device)
    alone = model(ids).logits
    padding = torch.zeros_like(ids)
    for sides in ([ids, padding], [padding, ids]):
        mask = torch.cat([torch.ones_like(s) if s is ids else s for s in sides], dim=1)
        assert torch.allclose(model(torch.cat(sides, dim=1), mask).logits, alone, atol=1e-5)
    loss = model(ids, labels=torch.tensor([1], device=model.device)).loss
    assert loss.item() == pytest.approx(-alone.log_softmax(-1)[0, 1].item())
    with pytest.raises(TypeError, match="forward: expected input_ids, attention_mask and labels, got 'inputs_embeds'"):
        model(ids, inputs_embeds=None)


def test_a_classifier_cuts_a_text_as_predict_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree("classification", tmp_path / "run")
    settings = json.loads((folder / "task.json").read_text())
    settings["config"]["max_length"] = 9
    (folder / "task.json").write_text(json.dumps(settings))
    model, tokenizer = ak.load(folder, model="backbone")
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["red blue green white", "red", "black green white red blue"]
    expected = ak.predict(model, [{"text": text} for text in texts])
    uncut = ak.predict(
        model, [{"text": text} for text in texts], dataclasses.replace(model._trained_with, max_length=99)
    )
    assert all(abs(a.probability - b.probability) > 1e-4 for a, b in zip(expected[::2], uncut[::2], strict=True))
    caplog.clear()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True).to(model.device)).logits
        found = [dict(zip(model.task.head.labels, row, strict=True)) for row in logits.softmax(-1).tolist()]
        assert [pytest.approx(one, abs=1e-6) for one in found] == [one.probabilities for one in expected]
    assert "texts are cut to the 9 tokens (max_length)" in caplog.text


def test_a_classifier_computes_in_the_precision_of_the_training() -> None:
    model, tokenizer = ak.load("classification")
    task, config = model.task, model._trained_with
    low = Classifier(task, dataclasses.replace(config, precision="bf16"))
    (expected,) = ak.predict(model, [{"text": "red blue"}], low._trained_with)
    inputs = tokenizer("red blue", return_tensors="pt").to(model.device)
    found, exact = (each(**inputs).logits.softmax(-1).amax().item() for each in (low, model))
    assert found == expected.probability
    assert found != exact


@pytest.mark.parametrize("name", ["classification", "routing"])
def test_threads_share_a_classifier_whose_adapters_are_not_switched(name: str) -> None:
    model, tokenizer = ak.load(name)
    inputs = tokenizer("red blue", return_tensors="pt").to(model.device)
    with in_one_thread(model.task.model), ThreadPoolExecutor(1) as other:
        problem = other.submit(lambda: model(**inputs)).exception()
    assert isinstance(problem, RuntimeError) == (name == "routing")


def test_a_classifier_saves_what_the_training_saved(tmp_path: Path) -> None:
    model, _ = ak.load("classification")
    model.save_pretrained(tmp_path / "again")
    again, _ = ak.load(tmp_path / "again", model="backbone")
    assert torch.equal(again.task.head.linear.weight, model.task.head.linear.weight)
    assert again._trained_with == model._trained_with
    for name, tensor in model.task.model.adapters.state_dict().items():
        assert torch.equal(again.task.model.adapters.state_dict()[name], tensor)
    assert not (tmp_path / "again" / "model.safetensors").exists()
    with pytest.raises(NotImplementedError, match=r"ak\.load"):
        Classifier.from_pretrained("classification")


def test_a_language_model_generates_in_a_pipeline() -> None:
    model, tokenizer = ak.load("causal-lm")
    (found,) = pipeline("text-generation", model=model, tokenizer=tokenizer)("red: ", max_new_tokens=3, do_sample=False)
    inputs = tokenizer("red: ", return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert found["generated_text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_an_adapter_saved_by_itself(tmp_path: Path) -> None:
    llama: Any = AutoModelForCausalLM.from_pretrained("backbone")
    torch.manual_seed(0)
    adapted = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=2, init="xavier"))
    adapted.save_pretrained(tmp_path / "mine")
    model, _ = ak.load(tmp_path / "mine", model="backbone", device="cpu", dtype="fp32")  # auto: bf16 where that is fast
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, adapted.eval()(ids).logits)
    named, _ = ak.load(tmp_path / "mine", device="cpu", dtype="fp32")  # the file says "backbone", a folder
    assert torch.equal(named(ids).logits, model(ids).logits)


def test_the_backbone_keeps_the_layers_that_were_trained_on(tmp_path: Path) -> None:
    llama: Any = AutoModelForCausalLM.from_pretrained("backbone", num_hidden_layers=1)
    ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=2)).save_pretrained(tmp_path / "mine")
    model, _ = ak.load(tmp_path / "mine", model="backbone")
    assert len(model.layers) == 1


def test_the_backbone_is_named_or_nowhere(tmp_path: Path) -> None:
    run = shutil.copytree("classification", tmp_path / "run")
    (run / "sources.json").write_text(json.dumps({"model": str(tmp_path / "gone"), "dtype": "fp32"}))
    with pytest.raises(FileNotFoundError, match=r"model: .* was trained on .*gone, which is not there"):
        ak.load(run)
    assert isinstance(ak.load(run, model="backbone")[0], Classifier)
    (run / "sources.json").unlink()
    assert isinstance(ak.load(run)[0], Classifier)  # adapter_config.json names it
    (run / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"model: expected the backbone, since .*sources\.json is not"):
        runs.find_run(run).backbone()


def test_a_run_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["local_files_only"]))
        return str(GOLDEN / "classification")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(runs, "check_hub", lambda *args: True)
    model, _ = ak.load("someone/adapter", model="backbone")
    assert isinstance(model, Classifier)
    assert asked == [("someone/adapter", True)]


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no: no such folder; expected the output folder of a training"):
        ak.load("no")
    with pytest.raises(FileNotFoundError, match=r"expected a finished training .*; got a folder with no files"):
        ak.load(tmp_path)
    with pytest.raises(NotADirectoryError, match="got a file"):
        ak.load("colors.jsonl")
    with pytest.raises(TypeError, match=r"base_model.*model"):
        ak.load("classification", **{"base_model": "backbone"})


def test_the_tokenizer_is_the_backbone_s() -> None:
    _, tokenizer = ak.load("causal-lm")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained("backbone").get_vocab()
