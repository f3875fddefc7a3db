"""What is refused as a backbone: one row each. No hub is asked (see conftest.py)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adapterkern.model.backbone import load_backbone
from tests.support import tiny_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny_run.tokenizer().save_pretrained(folder)
    tiny_run.model().unload().save_pretrained(folder)
    return folder


def without(pattern: str) -> Callable[[Path], str]:
    def spoil(folder: Path) -> str:
        for path in folder.glob(pattern):
            path.unlink()
        return str(folder)

    return spoil


def of_adapters(folder: Path) -> str:
    (folder / "config.json").rename(folder / "task.json")
    return str(folder)


def cut(folder: Path) -> str:
    os.truncate(folder / "model.safetensors", 5000)
    return str(folder)


def incomplete(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def no_gguf(folder: Path) -> str:
    (folder / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    return str(folder / "x.gguf")


EXPECTED = "model: expected a .gguf file, a transformers folder or a name on the hub, got "
ROWS: list[tuple[str, Callable[[Path], str], type[Exception], str]] = [
    (
        "no tokenizer",
        without("tokenizer*"),
        ValueError,
        "expected a tokenizer beside the weights in .*; got none",
    ),
    ("no config", without("config.json"), FileNotFoundError, EXPECTED + "the folder .* without a config.json$"),
    ("a run", of_adapters, FileNotFoundError, r"without a config.json \(it holds adapters: name the backbone"),
    ("no weights", without("*.safetensors"), ValueError, "model: the weights could not be read from .*: Error no file"),
    ("cut short", cut, ValueError, "model: the weights could not .*: model.safetensors is damaged or cut short"),
    (
        "incomplete",
        incomplete,
        ValueError,
        "all weights of the decoder in .*, which lacks 1: model.layers.1.mlp",
    ),
    ("no GGUF", no_gguf, ValueError, "model: expected a tokenizer beside the weights in .*x.gguf"),
    ("a file", lambda folder: str(folder / "config.json"), NotADirectoryError, EXPECTED + "the file .*config.json"),
    ("no file", lambda folder: str(folder / "no.gguf"), FileNotFoundError, "model: no file .*/no.gguf"),
    ("no folder", lambda folder: str(folder / "no"), FileNotFoundError, "model: no folder .*/no"),
    (
        "typo",
        lambda folder: "llamma",
        OSError,
        "no folder llamma here, and the hub could not be asked for llamma",
    ),
    (
        "no name",
        lambda folder: "a name",
        OSError,
        "no folder a name here, and a name cannot be a name on the hub",
    ),
]


@pytest.mark.parametrize(("spoil", "error", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_refused(
    spoil: Callable[[Path], str], error: type[Exception], message: str, whole: Path, tmp_path: Path
) -> None:
    source = spoil(shutil.copytree(whole, tmp_path / "model"))
    with pytest.raises(error, match=message) as raised:
        load_backbone(source)
    assert "\n" not in str(raised.value)


def test_layers_are_counted_before_the_weights_are_read(whole: Path, tmp_path: Path) -> None:
    source = cut(shutil.copytree(whole, tmp_path / "model"))
    with pytest.raises(ValueError, match="num_layers: expected an integer from 1 to 4, got 5"):
        load_backbone(source, num_layers=5)
