"""A stack is saved and loaded as one: the top adapter's files, and in them the others', each whole."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkern as ak
from adapterkern.files import read_versioned
from adapterkern.model.files.card import CARD_NAME
from adapterkern.model.files.folder import CONFIG_NAME, WEIGHTS_NAME
from tests.model.test_stack import stacked
from tests.support.tiny_llama import IDS, draw, logits, tiny


def below(directory: Path) -> list[Path]:
    return sorted((directory / "below").iterdir())


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_stack_comes_back(tmp_path: Path) -> None:
    model = stacked("domain", "between", "task")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert described["format_version"] == 2
    assert [entry["name"] for entry in described["below"]] == ["domain", "between"]
    assert [path.name[:-9] for path in below(tmp_path)] == ["0-domain", "1-between"]
    assert "x → domain → between → this adapter" in (tmp_path / CARD_NAME).read_text()
    with pytest.raises(ValueError, match="expected format_version 1, got 2"):  # as an earlier version reads it
        read_versioned(tmp_path / CONFIG_NAME, 1, {"adapter": dict})

    again = ak.LlamaAdapter.from_pretrained(tiny(), tmp_path)
    assert again.active_adapters() == ["domain", "between", "default"]
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert tree(tmp_path / "again") == {k: v for k, v in tree(tmp_path).items() if not k.startswith("again")}

    other = stacked("task")  # which has all of the names
    alone = logits(other)
    other.load_adapter(tmp_path, "loaded")
    assert other.adapters_below("loaded") == ["domain-below-loaded", "between-below-loaded"]
    names = ["task", "loaded", ["loaded"]]  # the name stands for the stack, and in a list for the adapter
    with torch.no_grad():
        ids = IDS[:1].expand(3, -1)
        got = other(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            other.set_adapter(name)
            torch.testing.assert_close(got[row : row + 1], other(IDS[:1]).logits)
    other.set_adapter("loaded")
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(other.reference("loaded")), expected)
    other.set_adapter(["loaded"])
    assert torch.equal(logits(other), alone)
    assert other.adapters_below() == []
    with pytest.raises(ValueError, match=r"got 'domain-below-loaded': delete 'loaded' first"):
        other.delete_adapter("domain-below-loaded")
    other.delete_adapter("loaded")
    other.delete_adapter("domain-below-loaded")

    whole = ak.LlamaAdapter.from_pretrained(tiny(), below(tmp_path)[0])  # like any saved adapter's
    model.set_adapter("domain")
    assert torch.equal(logits(whole), logits(model))
    model.set_adapter("task")
    model.save_pretrained(tmp_path)  # over it, a plain one
    assert not (tmp_path / "below").exists()
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["format_version"] == 1


def test_a_save_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the files of the lower adapters and those of the top one, the old stack is still there."""
    model = stacked("domain", "task")
    model.save_pretrained(tmp_path)
    before = logits(model)
    draw(model, "domain")
    draw(model, "task")
    after = logits(model)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("adapterkern.model.saving.write_adapter", killed)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path)
    assert len(below(tmp_path)) == 2
    assert torch.equal(logits(ak.LlamaAdapter.from_pretrained(tiny(), tmp_path)), before)
    (tmp_path / "below" / ".0-domain.123").mkdir()  # what a killed process has left
    (tmp_path / "below" / "mine").mkdir()
    model.save_pretrained(tmp_path)
    assert [path.name[:-9] for path in below(tmp_path) if path.name != "mine"] == ["0-domain"]
    assert torch.equal(logits(ak.LlamaAdapter.from_pretrained(tiny(), tmp_path)), after)


def _other_weights(path: Path) -> None:
    """Another adapter of the same name and shape, itself whole."""
    model = stacked("domain")
    draw(model, "domain")
    model.save_pretrained(path)


def _changed_weights(path: Path) -> None:
    tensors = load_file(path / WEIGHTS_NAME)
    save_file({key: t + 1 for key, t in tensors.items()}, path / WEIGHTS_NAME)


def _edit(path: Path, **changes: Any) -> None:
    described = json.loads((path.parent.parent / CONFIG_NAME).read_text())
    described["below"][0] |= changes
    (path.parent.parent / CONFIG_NAME).write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            shutil.rmtree,
            FileNotFoundError,
            f"{CONFIG_NAME}: expected 'domain', which the adapter was saved on, got no ",
        ),
        (_other_weights, ValueError, "expected 'domain' as .* was saved on it, got another: its SHA-256 differs"),
        (_changed_weights, ValueError, "SHA-256 differs from the one in adapterkern.json: damaged"),
        (
            lambda p: _edit(p, folder="../domain"),
            ValueError,
            "field 'below': expected a folder in below, got '../domain'",
        ),
        (lambda p: _edit(p, name=3), ValueError, "field 'below': expected objects with name, folder, sha256, got"),
        (lambda p: _edit(p, name="a.b"), ValueError, f"{CONFIG_NAME}: below: expected a non-empty name without dots"),
    ],
)
def test_what_is_missing_or_another(tmp_path: Path, change: Any, error: type[Exception], message: str) -> None:
    stacked("domain", "task").save_pretrained(tmp_path)
    change(below(tmp_path)[0])
    model = stacked("other")
    for load in (
        lambda: model.load_adapter(tmp_path, "new"),
        lambda: ak.LlamaAdapter.from_pretrained(tiny(), tmp_path),
    ):
        with pytest.raises(error, match=message):
            load()
    assert list(model.adapters) == list(stacked().adapters)


def test_a_stack_that_cannot_be_loaded_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    stacked("domain", "task").save_pretrained(tmp_path)
    model = stacked("domain", "task")
    model.add_adapter("domain-below-new", ak.AdapterConfig(adapter_dim=4, layers=[1]))
    names = list(model.adapters)
    with pytest.raises(ValueError, match="name: expected a new name, got 'domain-below-new', which exists"):
        model.load_adapter(tmp_path, "new")
    assert list(model.adapters) == names
    with pytest.raises(
        ValueError, match=r"name: expected the name of one adapter of the stack domain → task, got None"
    ):
        model.save_adapterhub(tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_what_a_trainer_resumes_from_has_the_stack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = stacked("domain", "task")
    model.save_pretrained(tmp_path, state_dict=None)
    state = load_file(tmp_path / "model.safetensors")
    again = stacked("domain", "task")
    for name in ("domain", "task"):
        draw(again, name)
    assert not again.load_state_dict(dict(state), strict=False).unexpected_keys
    assert torch.equal(logits(again), logits(model))
    assert not caplog.records
    again.set_adapter("task")
    with caplog.at_level(logging.WARNING):
        again.load_state_dict(dict(state), strict=False)
    assert re.search(
        r"of the stack domain → task, and task is active: set_adapter\(\['domain', 'task'\]\)", caplog.text
    )


def test_the_names_of_folders(tmp_path: Path) -> None:
    model = ak.LlamaAdapter(tiny(), None)
    for name in ("größe/ 1", "top"):
        model.add_adapter(name, ak.AdapterConfig(adapter_dim=4, layers=[1]))
        draw(model, name)
    model.set_adapter(["größe/ 1", "top"])
    model.save_pretrained(tmp_path)
    assert below(tmp_path)[0].name.startswith("0-gr__e__1-")
    assert ak.LlamaAdapter.from_pretrained(tiny(), tmp_path).active_adapters() == ["größe/ 1", "default"]
