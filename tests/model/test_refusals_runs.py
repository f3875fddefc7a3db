"""What is refused as a backbone: one row each. No hub is asked (see conftest.py)."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from adapterkern.model import backbone
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


def not_there(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # made of a response, of which each version of the hub's client has its own kind
    Exception.__init__(error, "404")
    return error


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


class ConnectError(Exception):
    """As httpx and requests name what they raise without a network."""


@pytest.mark.parametrize(
    ("raised", "asked", "message"),
    [
        (
            ConnectError("no name"),
            2,
            "model: no folder some/name here, and the hub could not be asked for some/name, of",
        ),
        (not_there(RepositoryNotFoundError), 1, "and the hub has no model some/name, or it is private"),
        (not_there(GatedRepoError), 1, "and the hub gives some/name only to users who have accepted its terms"),
        (TimeoutError("slow"), 1, "the loader's own"),  # the client tries again
        (None, 1, "the loader's own"),
    ],
)
def test_the_hub_is_asked_before_its_client_tries_for_a_minute(
    raised: Exception | None, asked: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def ask(url: str) -> None:
        calls.append(url)
        if raised is not None:
            raise raised

    def read(*_: object, **__: object) -> None:
        raise OSError("the loader's own")

    monkeypatch.setattr(backbone, "get_hf_file_metadata", ask)
    monkeypatch.setattr(backbone, "_read", read)
    monkeypatch.setattr(backbone, "_PAUSE", 0.0)
    with pytest.raises(OSError, match=message):
        load_backbone("some/name")
    assert len(calls) == asked
    assert calls[0].endswith("some/name/resolve/main/config.json")


def test_what_the_cache_has_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached = tmp_path / "models--some--name"
    shutil.copytree(whole, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(backbone, "cached_file", partial(backbone.cached_file, cache_dir=tmp_path))
    assert asked_once(monkeypatch, ConnectError("no name")) is True  # there is no network: the cache alone
    assert "some/name: the hub cannot be asked, so this is the copy in the cache" in caplog.text
    assert asked_once(monkeypatch, None) is False
    assert asked_once(monkeypatch, TimeoutError("slow")) is False  # the client tries again
    assert asked_once(monkeypatch, not_there(RepositoryNotFoundError)) is False


def asked_once(monkeypatch: pytest.MonkeyPatch, raised: Exception | None) -> bool:
    calls = []

    def ask(url: str) -> None:
        calls.append(url)
        if raised is not None:
            raise raised

    monkeypatch.setattr(backbone, "get_hf_file_metadata", ask)
    alone = backbone.check_hub("some/name")
    assert len(calls) == 1
    return alone
