"""A saved adapter's folder beside others: a model's, PEFT's, and the one of 0.1.0."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import adapterkern as ak
from adapterkern.model.files.folder import (
    CONFIG_NAME,
    OLD_CONFIG_NAME,
    OLD_WEIGHTS_NAME,
    WEIGHTS_NAME,
    adapter_files,
    read_adapter,
)
from tests.support.tiny_llama import IDS, adapted, draw, logits, tiny

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "runs"
OLD = {OLD_WEIGHTS_NAME, OLD_CONFIG_NAME}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def old_folder(folder: Path, model: ak.LlamaAdapter) -> Path:
    """``model`` as 0.1.0 would have saved it."""
    model.save_pretrained(folder)
    (folder / WEIGHTS_NAME).rename(folder / OLD_WEIGHTS_NAME)
    (folder / CONFIG_NAME).rename(folder / OLD_CONFIG_NAME)
    return folder


@pytest.fixture(params=[LlamaForCausalLM, ak.LlamaAdapter], ids=["plain", "with an adapter beside it"])
def backbone(request: Any, tmp_path: Path) -> Path:
    """A backbone's folder; in the second case an adapter's files have been copied into it."""
    tiny().save_pretrained(tmp_path / "base")
    if request.param is ak.LlamaAdapter:
        adapted().save_pretrained(tmp_path / "adapter")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            shutil.copy(tmp_path / "adapter" / name, tmp_path / "base")
    return tmp_path / "base"


def test_what_is_not_saved_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    model.add_adapter("other", ak.AdapterConfig(adapter_dim=2))
    model.save_pretrained(tmp_path)
    assert [record.message for record in caplog.records] == [
        "save_pretrained: saves 'default', the active adapter, and not 'other'"
    ]
    caplog.clear()
    model.save_pretrained(tmp_path / "other", "other")
    assert not caplog.records


def test_transformers_loads_the_backbone_as_before(backbone: Path) -> None:
    pytest.importorskip("peft", reason="transformers looks for PEFT's files only if peft is installed")
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        assert torch.equal(logits(cls.from_pretrained(backbone)), logits(tiny()))


def test_peft_and_transformers_say_what_they_miss(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="it is PEFT's message")
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at"):
        peft.PeftModel.from_pretrained(tiny(), str(tmp_path))
    with pytest.raises((OSError, ValueError), match=r"config\.json|[Uu]nrecognized model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_old_names_are_read_and_replaced(tmp_path: Path) -> None:
    model = adapted()
    old_folder(tmp_path, model)
    assert adapter_files(tmp_path) == (OLD_WEIGHTS_NAME, OLD_CONFIG_NAME)
    loaded = ak.LlamaAdapter.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    draw(loaded)
    loaded.save_pretrained(tmp_path)
    assert not OLD & content(tmp_path).keys()
    assert torch.equal(logits(ak.LlamaAdapter.from_pretrained(tiny(), tmp_path).eval()), logits(loaded))


def test_the_new_pair_wins_over_an_old_one(tmp_path: Path) -> None:
    """As after a save that was killed before its last step."""
    new = adapted()
    new.save_pretrained(tmp_path / "new")
    draw(new)
    old_folder(tmp_path / "both", new)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        shutil.copy(tmp_path / "new" / name, tmp_path / "both")
    got, expected = (read_adapter(tiny(), tmp_path / name)[1] for name in ("both", "new"))
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_a_golden_folder_still_loads(tmp_path: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(GOLDEN / "backbone")
    model = ak.LlamaAdapter.from_pretrained(llama, GOLDEN / "classification")
    assert model.adapter_config().layers == (1,)


FOREIGN = {
    "a model": lambda folder: tiny().save_pretrained(folder),
    "a sharded model": lambda folder: tiny().save_pretrained(folder, max_shard_size="20KB"),
    "a model's weights alone": lambda folder: _model_without(folder, "config.json"),
    "a model's configuration alone": lambda folder: tiny().config.save_pretrained(folder),
    "pickled weights": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"weights"),
    "pickled shards": lambda folder: (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"weights"),
    "an index": lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}"),
    "another precision": lambda folder: tiny().save_pretrained(folder, variant="fp16"),
    "PEFT's adapter": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "AdapterHub's adapter": lambda folder: adapted(layers=[1]).save_adapterhub(folder),
    "a file of our name": lambda folder: (folder / "adapterkern.json").write_text('{"theirs": 1}'),
}


def _model_without(folder: Path, name: str) -> None:
    tiny().save_pretrained(folder)
    (folder / name).unlink()


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("how", ["save_pretrained", "Trainer"])
def test_nothing_is_written_into_a_folder_of_others(tmp_path: Path, what: str, how: str) -> None:
    FOREIGN[what](tmp_path)
    before = content(tmp_path)
    model = adapted()
    given = {} if how == "save_pretrained" else {"state_dict": None, "is_main_process": True}
    with pytest.raises(ValueError, match=r"directory: expected a folder without a model|expected adapterkern's file"):
        model.save_pretrained(tmp_path, **given)
    assert content(tmp_path) == before


def test_trainer_saves_over_its_own(tmp_path: Path) -> None:
    """Its weights have only our keys, and its other files are not a model's."""
    model = adapted()
    (tmp_path / "training_args.bin").write_bytes(b"Trainer's")
    for _ in range(2):
        model.save_pretrained(tmp_path, state_dict=None)
        draw(model)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("PEFT's adapter", r"PEFT's adapter \(peft_type 'LORA'\), which peft.PeftModel.from_pretrained"),
        ("AdapterHub's adapter", r"AdapterHub's adapter, which LlamaAdapter.from_adapterhub loads"),
        ("a model", r"with a model \(config.json\), which transformers loads"),
    ],
)
def test_loading_says_what_the_folder_holds(tmp_path: Path, what: str, message: str) -> None:
    FOREIGN[what](tmp_path)
    with pytest.raises(ValueError, match=f"directory: expected an adapter that this package saved, got .*{message}"):
        ak.LlamaAdapter.from_pretrained(tiny(), tmp_path)


def test_an_empty_folder_has_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"directory: expected {CONFIG_NAME} in "):
        ak.LlamaAdapter.from_pretrained(tiny(), tmp_path)


def test_old_weights_that_are_not_ours_stay(tmp_path: Path) -> None:
    (tmp_path / OLD_WEIGHTS_NAME).write_bytes(b"another library's")
    adapted().save_pretrained(tmp_path)
    assert (tmp_path / OLD_WEIGHTS_NAME).read_bytes() == b"another library's"
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["format_version"] == 1
    assert logits(ak.LlamaAdapter.from_pretrained(tiny(), tmp_path).eval()).shape == (*IDS.shape, 128)
