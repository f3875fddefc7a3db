"""Atomic files, pairs and versioned JSON: complete or absent, and refused by name. See also test_faults.py."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from adapterkern.files import (
    check_owner,
    find_weights,
    read_json,
    read_tensors,
    read_versioned,
    remove_temporaries,
    replacing,
    sha256,
    write_json,
    write_pair,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_on_success_and_kept_on_error(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"  # the folder is created
    for text in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == path.parent
        assert path.read_text() == text
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_bytes(b"half" + "\ud800".encode())
    assert path.read_text() == "second"
    assert names(path.parent) == ["a.txt"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json(tmp_path / "written", {})
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_error_without_a_name_gets_the_file_s(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match=r"not written: No space.*a\.txt") as raised, replacing(path):
        raise OSError(28, "No space left on device")
    assert raised.value.filename == os.fspath(path)


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def write(directory: Path, content: bytes, **fields: Any) -> tuple[Path, Path]:
    weights, config = directory / "weights", directory / "config.json"

    def save(path: Path) -> None:
        path.write_bytes(content)

    write_pair(weights, config, save, fields)
    return weights, config


def content(directory: Path) -> tuple[bytes, Any]:
    """What a reader finds."""
    weights, config = directory / "weights", directory / "config.json"
    saved = read_json(config)
    return find_weights(weights, config, saved["weights_sha256"]).read_bytes(), saved["number"]


def test_a_pair_comes_back(tmp_path: Path) -> None:
    for number in (1, 2):
        weights, config = write(tmp_path, b"w%d" % number, number=number)
        assert content(tmp_path) == (b"w%d" % number, number)
        assert read_json(config) == {"number": number, "weights_sha256": sha256(weights)}
        assert names(tmp_path) == ["config.json", "weights"]


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_pair_of_a_killed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """The first rename is that of the hidden weights, the second, of the configuration, decides."""
    write(tmp_path, b"w1", number=1)
    replace, left = Path.replace, [stop_after]

    def killing(path: Path, target: Any) -> Path:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killing)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, b"w2", number=2)
    assert content(tmp_path) == ((b"w1", 1) if stop_after == 1 else (b"w2", 2))
    write(tmp_path, b"w3", number=3)
    assert content(tmp_path) == (b"w3", 3)
    assert names(tmp_path) == ["config.json", "weights"]


def test_weights_of_another_save_are_refused(tmp_path: Path) -> None:
    weights, config = write(tmp_path, b"w1", number=1)
    weights.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"weights: SHA-256 differs from the one in config\.json"):
        content(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="weights"):
        find_weights(weights, config, "0" * 64)


def test_temporaries_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".weights.a1b2c3d4", "..weights.next.a1b2c3d4", ".other.a1b2c3d4", "weights"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path / "weights")
    assert names(tmp_path) == [".other.a1b2c3d4", "weights"]


GOOD: dict[str, Any] = {"format_version": 2, "names": ["a"], "seed": None}
KINDS = {"names": list, "seed": int | None}


@pytest.mark.parametrize("changes", [{}, {"seed": 3}, {"more": 1}])
def test_versioned_json_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_json(tmp_path / "a.json", GOOD | changes)
    assert read_versioned(tmp_path / "a.json", 2, KINDS) == GOOD | changes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not a JSON file: "),
        ("[1]", "expected a JSON object, got list"),
        ('{"format_version": 2, "names": [], "seed": 1, "seed": 2}', "not a JSON file: key 'seed' is there twice"),
        ('{"format_version": 2, "names": [{"a": 1, "a": 1}], "seed": 1}', "not a JSON file: key 'a' is there twice"),
        ("[" * 100_000, "not a JSON file: "),
        ('{"format_version": ' + "9" * 5000 + "}", "not a JSON file: "),
        (json.dumps(GOOD | {"format_version": 3}), "expected format_version 2, got 3"),
        (json.dumps({"names": [], "seed": 1}), "expected format_version 2, got None"),
        ('{"format_version": 2, "seed": 1}', "field 'names' is missing"),
        (json.dumps(GOOD | {"names": "a"}), "field 'names': expected list, got 'a'"),
        (json.dumps(GOOD | {"seed": "1"}), "field 'seed': expected int | None, got '1'"),
        (json.dumps(GOOD | {"seed": True}), "field 'seed': expected int | None, got True"),
    ],
)
def test_versioned_json_is_refused_by_file_and_field(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a.json'}: {problem}")):
        read_versioned(tmp_path / "a.json", 2, KINDS)
    (tmp_path / "a.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.json"):
        read_versioned(tmp_path / "a.json", 2, KINDS)


def test_a_file_of_another_program_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    check_owner(path, "the owner", lambda saved: "ours" in saved)  # there is none
    for text in ('{"ours": 1}', "damaged"):
        path.write_text(text)
        check_owner(path, "the owner", lambda saved: "ours" in saved)
    for text in ('{"theirs": 1}', '{"theirs": 1, "theirs": 2}'):  # not damaged: other programs read it
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json: expected the owner's file or none, .* the fields theirs"):
            check_owner(path, "the owner", lambda saved: "ours" in saved)


WEIGHTS = {"a": torch.ones(2), "b": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content[:20], "not a safetensors file: "),
        (lambda _: b"", "not a safetensors file: "),
        (lambda _: save(WEIGHTS | {"b": torch.ones(1).long()}), "tensor b: expected 16, 32 or 64 bits of floating"),
        (lambda _: save(WEIGHTS | {"b": torch.ones(1).to(torch.float8_e5m2)}), "tensor b: expected 16, 32 or 64 bits"),
        (lambda _: save(WEIGHTS | {"b": torch.ones(1).to(torch.complex64)}), "tensor b: expected 16, 32 or 64 bits"),
    ],
)
def test_tensors_are_refused_by_file_and_name(tmp_path: Path, change: Callable[[bytes], bytes], problem: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(WEIGHTS))
    assert {name: tensor.tolist() for name, tensor in read_tensors(path).items()} == {"a": [1, 1], "b": [1]}
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {problem}")):
        read_tensors(path)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e300])
def test_tensors_that_are_not_finite_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(WEIGHTS | {"b": torch.tensor([value, 1.0], dtype=torch.float64)}))
    assert str(read_tensors(path)["b"].tolist()) == str([value, 1.0])
    assert f"{path}: tensor b: 1 of its 2 values are not finite" in caplog.text


def test_a_folder_is_no_file_of_tensors(tmp_path: Path) -> None:
    """What safetensors says of it is "No such device"."""
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        read_tensors(tmp_path)
