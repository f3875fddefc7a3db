"""What goes wrong outside: killed processes, full disks, folders that may not be written, files that are damaged.

Nothing may be half-written or lost, and every complaint names the file, and the field where there is one. The inputs
that once got through without such a complaint stand as ``@example``.
"""

import ast
import contextlib
import copy
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from safetensors.torch import load_file

import adapterkern as ak
from adapterkern.files import sha256
from adapterkern.model.files.adapterhub import BIN_NAME
from adapterkern.model.files.folder import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from adapterkern.recipes.qa.squad import read_questions
from adapterkern.training import ClassificationHead, TrainConfig, load_examples, load_run, read_metrics, train
from adapterkern.training.data.rows import BadRows, DataError, read_rows
from adapterkern.training.run import checkpoint
from adapterkern.training.run.checkpoint import TrainingState, checkpoints
from adapterkern.training.run.results import CheckpointError
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS = tiny_run.rows(12)
PACKAGE = Path(ak.__file__).parent


def drawn(value: float) -> ak.LlamaAdapter:
    """An adapter all of whose numbers are ``value``."""
    model = tiny_run.model()
    with torch.no_grad():
        for p in model.adapter_parameters():
            p.fill_(value)
    return model


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# Death


@pytest.mark.slow
def test_kill_9(tmp_path: Path) -> None:
    """The script checks what a kill has left; a longer run of it is among the results of the bench."""
    command = [sys.executable, "-m", "tests.package.kill_runs", "--output", str(tmp_path / "out.json")]
    options = {"kills": 4, "events": 4, "saves": 5, "seed": 1}
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["training"]["kills"] >= options["events"] + 2
    assert found["training"]["runs that ended with an undisturbed run's weights"] >= options["events"]
    assert found["saving"]["kills"] == options["saves"]


def test_a_resumed_run_clears_up(tmp_path: Path) -> None:
    config = tiny_run.quiet(output_dir=tmp_path, max_steps=2, checkpoint_every=1)
    train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER)
    before = files(tmp_path).keys()
    (tmp_path / "checkpoints" / ".step-00000003.77").mkdir()
    (tmp_path / "checkpoints" / ".old-step-00000001.77" / "sub").mkdir(parents=True)
    (tmp_path / ".head_config.json.a1b2c3d4").write_bytes(b"half")
    (tmp_path / "..head.safetensors.next.a1b2c3d4").write_bytes(b"half")
    (tmp_path / ".mine").write_text("no business of ours")
    train(tiny_run.model(), ROWS, tiny_run.quiet(**(vars(config) | {"resume": True})), tokenizer=TOKENIZER)
    assert files(tmp_path).keys() == before | {".mine"}
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-00000001", "step-00000002"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_death_between_the_renames_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A save renames three times: before the second the old adapter is there, and after it the new one."""
    drawn(1.0).save_pretrained(tmp_path)
    replace, left = Path.replace, [number]

    class Killed(BaseException):
        pass

    def die(path: Path, target: Any) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        if number < 3:  # a killed process tidies nothing up
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            drawn(2.0).save_pretrained(tmp_path)
    for value in (1.0 if number < 3 else 2.0, 3.0):
        loaded = ak.LlamaAdapter.from_pretrained(tiny_run.model().unload(), tmp_path)
        assert tiny_run.same_bits(tiny_run.weights(loaded), tiny_run.weights(drawn(value)))
        drawn(3.0).save_pretrained(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".next")]


def test_an_interrupt_right_after_a_save_s_decisive_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn(1.0).save_pretrained(tmp_path)
    replace = Path.replace

    def interrupted(path: Path, target: Any) -> Path:
        replaced = replace(path, target)
        if Path(target).name == CONFIG_NAME:
            raise KeyboardInterrupt
        return replaced

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drawn(2.0).save_pretrained(tmp_path)
    loaded = ak.LlamaAdapter.from_pretrained(tiny_run.model().unload(), tmp_path)
    assert tiny_run.same_bits(tiny_run.weights(loaded), tiny_run.weights(drawn(2.0)))


# Disks


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: a write fails as on a full disk, whoever runs this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The configuration has some 500 bytes, the weights 5,632.
@pytest.mark.parametrize(("size", "name"), [(0, WEIGHTS_NAME), (100, WEIGHTS_NAME), (5000, WEIGHTS_NAME)])
def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path, size: int, name: str) -> None:
    drawn(1.0).save_pretrained(tmp_path)
    before = files(tmp_path)
    with files_up_to(size), pytest.raises(OSError, match=rf"{name}.*not written|not written.*{name}"):
        drawn(2.0).save_pretrained(tmp_path)
    assert files(tmp_path) == before


def test_a_full_disk_for_the_configuration_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger file fits, the smaller one does not: a pair of two saves would be of no use."""
    drawn(1.0).save_pretrained(tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr("adapterkern.files.json_text", lambda value: "x" * 50_000)
    with files_up_to(20_000), pytest.raises(OSError, match=CONFIG_NAME):
        drawn(2.0).save_pretrained(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("save", ["save_adapterhub", "safetensors"])
def test_a_full_disk_for_adapterhub(tmp_path: Path, save: str) -> None:
    with files_up_to(300), pytest.raises(OSError, match=r"adapter\.(bin|safetensors)"):
        tiny_run.model().save_adapterhub(tmp_path, safetensors=save == "safetensors")
    assert not files(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_training_until_the_disk_is_full(small_disk: Path, tmp_path: Path) -> None:
    """It stops with an error that names the file; with more room it goes on from its last checkpoint."""
    values = {"checkpoint_every": 1, "keep_checkpoints": 99, "epochs": 4, "log_every": 1}
    whole, model = tiny_run.model(), tiny_run.model()
    train(whole, ROWS, tiny_run.quiet(output_dir=tmp_path / "whole", **values), tokenizer=TOKENIZER)
    config = tiny_run.quiet(output_dir=small_disk, **values)
    with pytest.raises(OSError, match=rf"{small_disk}/.*not written|not written.*{small_disk}"):
        train(model, ROWS, config, tokenizer=TOKENIZER)
    assert 1 <= len(checkpoints(small_disk)) < 12
    for path in checkpoints(small_disk):
        load_run(path)
        read_adapter(model.base, path)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    train(model, ROWS, tiny_run.quiet(output_dir=small_disk, resume=True, **values), tokenizer=TOKENIZER)
    assert tiny_run.same_bits(tiny_run.weights(model), tiny_run.weights(whole))


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process may not write into; root becomes nobody for that long."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "locked"
        path.mkdir()
        os.chmod(name, 0o755)
        path.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield path
        finally:
            if root:
                os.seteuid(0)
            path.chmod(0o755)


@pytest.mark.parametrize(
    "save",
    [
        lambda model, path: model.save_pretrained(path),
        lambda model, path: model.save_adapterhub(path),
        lambda model, path: ClassificationHead(4, ["a", "b"]).save_pretrained(path),
        lambda model, path: train(model, ROWS, tiny_run.quiet(output_dir=path), tokenizer=TOKENIZER),
        lambda model, path: train(model, ROWS, tiny_run.quiet(output_dir=path / "new"), tokenizer=TOKENIZER),
    ],
    ids=["adapter", "adapterhub", "head", "run", "run in a new folder"],
)
def test_a_folder_that_may_not_be_written(read_only: Path, save: Callable[[Any, Path], Any]) -> None:
    """A run says so before its first step."""
    model = tiny_run.model()
    before = tiny_run.weights(model)
    with pytest.raises(PermissionError, match=str(read_only)):
        save(model, read_only)
    assert tiny_run.same_bits(tiny_run.weights(model), before)


# Damaged files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one checkpoint, and the same adapter in AdapterHub's files."""
    path = tmp_path_factory.mktemp("saved")
    model = tiny_run.model()
    train(model, ROWS, tiny_run.quiet(output_dir=path, max_steps=2), tokenizer=TOKENIZER)
    model.save_adapterhub(path / "hub")
    return path


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """The file with other content, for so long."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def damage(content: bytes, where: float, bit: int | None) -> bytes:
    """One bit the other way, or (None) cut there."""
    at = min(int(where * len(content)), len(content) - 1)
    return content[:at] if bit is None else content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


@contextlib.contextmanager
def refusing(*names: object) -> Iterator[None]:
    """What is read in it may be refused, by one of these names; any other error comes through."""
    try:
        yield
    except (TypeError, ValueError, FileNotFoundError) as error:
        if not any(str(name) in str(error) for name in names):
            raise


def read_all(saved: Path) -> None:
    load_run(saved)
    read_adapter(LLAMA, saved)


LLAMA = tiny_run.model().unload()
PLACES = st.floats(0, 1, exclude_max=True)
BITS = st.none() | st.integers(0, 7)
CONFIGS = st.sampled_from([CONFIG_NAME, "head_config.json", "task.json"])


@given(st.sampled_from([WEIGHTS_NAME, "head.safetensors"]), PLACES, BITS)
def test_damaged_weights(saved: Path, name: str, where: float, bit: int | None) -> None:
    path = saved / name
    with changed(path, damage(path.read_bytes(), where, bit)), pytest.raises(ValueError, match=rf"{name}: SHA-256"):
        read_all(saved)


@given(PLACES, BITS, st.booleans())
def test_weights_that_are_none_but_have_the_hash(saved: Path, where: float, bit: int | None, in_header: bool) -> None:
    weights, config = saved / WEIGHTS_NAME, json.loads((saved / CONFIG_NAME).read_text())
    shapes = {name: tensor.shape for name, tensor in load_file(weights).items()}
    with changed(weights, damage(weights.read_bytes(), where * (0.2 if in_header else 1), bit)):
        config["weights_sha256"] = sha256(weights)
        with changed(saved / CONFIG_NAME, json.dumps(config).encode()), refusing(weights):
            tensors = read_adapter(LLAMA, saved)[1]
            assert {name: tensor.shape for name, tensor in tensors.items()} == shapes  # a number among the weights


def read_changed(saved: Path, name: str) -> None:
    with refusing(name, WEIGHTS_NAME, "head.safetensors"):
        config, _ = load_run(saved)
        ak.LlamaAdapter.from_pretrained(LLAMA, saved).unload()
        json.dumps(config.to_dict(), allow_nan=False)


@given(CONFIGS, st.lists(st.integers(0, 40), min_size=1, max_size=2), st.booleans() | JSON)
@example(CONFIG_NAME, [1, 4], 10**9)  # depth: was taken for a model to build
@example(CONFIG_NAME, [1, 7], 10**400)  # eps: was larger than any float
@example(CONFIG_NAME, [2], "text")  # base: was "string indices must be integers"
@example("head_config.json", [2], 10**12)  # hidden_size: was allocated
def test_any_value_in_a_configuration(saved: Path, name: str, keys: list[int], value: Any) -> None:
    """``keys`` are numbers of fields: one of the file, or one and another inside it."""
    path = saved / name
    content = json.loads(path.read_text())
    fields = content
    for number in keys[:-1]:
        inner = list(fields.values())[number % len(fields)]
        fields = inner if isinstance(inner, dict) else fields
    fields[list(fields)[keys[-1] % len(fields)]] = value
    with changed(path, json.dumps(content).encode()):
        read_changed(saved, name)


@given(CONFIGS, PLACES, BITS)
def test_a_damaged_configuration(saved: Path, name: str, where: float, bit: int | None) -> None:
    path = saved / name
    with changed(path, damage(path.read_bytes(), where, bit)):
        read_changed(saved, name)


@given(CONFIGS, st.binary(max_size=40))
@example(CONFIG_NAME, b"[" * 100_000)
@example(CONFIG_NAME, b'{"format_version": ' + b"9" * 5000 + b"}")  # int() refuses more than 4300 digits
@example("task.json", b"\xff\xfe{\x00}\x00")
def test_any_bytes_as_a_configuration(saved: Path, name: str, content: bytes) -> None:
    with changed(saved / name, content), pytest.raises(ValueError, match=name):
        read_all(saved)


@given(PLACES, BITS, st.integers(0, 5))
def test_a_damaged_checkpoint(saved: Path, where: float, bit: int | None, number: int) -> None:
    """Any bit of any file: refused by name, and the run's state is as it was."""
    directory = checkpoints(saved)[0]
    path = sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors"))[number]
    parameter = torch.nn.Parameter(torch.zeros(1))
    state = TrainingState({"p": parameter}, torch.optim.SGD([parameter]), None, None, TrainConfig(), "")
    with changed(path, damage(path.read_bytes(), where, bit)), pytest.raises(CheckpointError, match=path.name):
        checkpoint.load_checkpoint(directory, state)
    assert (state.step, parameter.item()) == (0, 0)


@given(st.dictionaries(st.sampled_from([*TrainConfig.__dataclass_fields__, "x"]), JSON, max_size=3))
@example({"lr": float("inf")})  # was accepted, and then no file could hold it
@example({"weight_decay": 10**400})
def test_any_training_configuration(values: dict[str, Any]) -> None:
    with refusing(*values):
        config = TrainConfig.from_dict(values)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


@given(st.dictionaries(st.sampled_from([*ak.AdapterConfig.__dataclass_fields__, "x"]), JSON, max_size=3))
@example({"eps": 10**400})
def test_any_adapter_configuration(values: dict[str, Any]) -> None:
    with refusing(*values):
        config = ak.AdapterConfig.from_dict(values)
        assert ak.AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


@given(st.lists(st.binary(max_size=30) | JSON.map(lambda v: json.dumps(v).encode()), max_size=4))
@example([b'{"step": 1}'])  # without "kind": was a KeyError on resuming
@example([b"\xff"])  # was a UnicodeDecodeError without the file's name
@example([b"9" * 5000])
def test_any_metrics(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"kind": "train", "st']))  # the last line cut off
    with refusing(path):
        assert all("kind" in record for record in read_metrics(path))


@given(PLACES, BITS)
@example(0.5, None)  # was an OSError without a name
def test_a_damaged_adapterhub_file(saved: Path, where: float, bit: int | None) -> None:
    """Zip's checksums find most of it; what is left is a tensor of the right shape or an error by file."""
    path = saved / "hub" / BIN_NAME
    with changed(path, damage(path.read_bytes(), where, bit)), refusing(path):
        ak.LlamaAdapter.from_adapterhub(LLAMA, saved / "hub").unload()


# Data


def load(path: Path) -> Any:
    return load_examples(path, TrainConfig(max_length=16), TOKENIZER, ["no", "yes"])


@given(
    st.sampled_from([".jsonl", ".csv", ".tsv"]),
    st.lists(st.binary(max_size=20) | st.just(b"text,label") | JSON.map(lambda v: json.dumps({"text": v}).encode())),
)
@example(".jsonl", [b'{"text": "\\ud800", "label": "no"}'])  # half a surrogate pair: was the tokenizer's own error
@example(".jsonl", [b'{"text": "w1", "label": ' + b"9" * 5000 + b"}"])  # int()'s limit: was an error without place
@example(".csv", [b"text,label", b"w1,no\r\xff"])
def test_any_bytes_as_data(tmp_path_factory: pytest.TempPathFactory, kind: str, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("data") / f"data{kind}"
    path.write_bytes(b"\n".join(lines))
    with refusing(path):
        assert load(path)[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"text,label\nw1 w2,no\nw1\x00,no\n", r"data\.csv:3: not text: it has a NUL byte"),
        ("text,label\nw1 é,no\n".encode("latin-1"), r"data\.csv:2: not UTF-8"),
        ("text,label\nw1,no\n".encode("utf-16"), r"data\.csv:1: not UTF-8"),
        ("text,label\nw1,no\n".encode("utf-16-le"), r"data\.csv:1: not text: it has a NUL byte"),
        (
            b"text,label\nw1,perhaps\n",
            r"data\.csv:2: column 'label': label 'perhaps' is not one of the training's labels 'no', 'yes'",
        ),
        (b"text,label\n,no\n", r"data\.csv:2: column 'text': expected a non-empty string, got an empty one"),
        (b"text\nw1\n", r"data\.csv: column 'label' is missing; there are 'text'"),
        (b'text,label\n"w1,no\n' + b"w2 " * 4_000_000, r"data\.csv:2: "),
    ],
    ids=["NUL", "Latin-1", "UTF-16", "UTF-16 without a mark", "label", "empty", "no label", "12 MB in open quotes"],
)
def test_data_by_line_and_column(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load(tmp_path / "data.csv")


def key_of(container: Any, number: int) -> Any:
    return list(container)[number % len(container)] if isinstance(container, dict) else number % len(container)


SQUAD = {"context": "a b", "qas": [{"id": "1", "question": "q", "answers": [{"text": "b", "answer_start": 2}]}]}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), JSON)
@example([0, 0, 0, 0, 0], "\ud800")  # half a surrogate pair as context: was the tokenizer's own error
@example([0, 0, 0, 0, 1, 0, 0], 10**400)
def test_any_value_in_questions(tmp_path_factory: pytest.TempPathFactory, keys: list[int], value: Any) -> None:
    path = tmp_path_factory.mktemp("data") / "squad.json"
    document: Any = copy.deepcopy({"data": [{"paragraphs": [SQUAD]}]})
    inner = document
    for number in keys[:-1]:
        child = inner[key_of(inner, number)]
        inner = child if child and isinstance(child, dict | list) else inner
    inner[key_of(inner, keys[-1])] = value
    path.write_text(json.dumps(document))
    bad = BadRows(str(path))
    with refusing(path):
        for question in read_questions(path, bad):
            (question.id + question.question + question.context).encode()
        bad.settle(False)


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_a_line_of_10_mb_is_a_line(tmp_path: Path, kind: str) -> None:
    path, text = tmp_path / f"data{kind}", "w1 " * 3_400_000
    lines = {".jsonl": json.dumps({"text": text, "label": "no"}) + "\n", ".csv": f"text,label\n{text},no\n"}
    path.write_text(lines[kind])
    (row,) = read_rows(path, BadRows("data"))
    assert row.values["text"] == text


def test_half_a_surrogate_pair_in_a_label() -> None:
    """Was noticed after the training, by the file that could not hold it."""
    rows = [{"text": "w1", "label": label} for label in ("no", "\ud800", "yes")]
    with pytest.raises(DataError, match="row 1: column 'label': half a surrogate pair"):
        load_examples(rows, TrainConfig(), TOKENIZER)


def test_labels_that_only_look_like_numbers() -> None:
    """``--5`` was taken for a number, and 5,000 digits for one that int() reads."""
    rows = [{"text": "w1", "label": label} for label in ("--5", "3", "9" * 5000)]
    assert load_examples(rows, TrainConfig(), TOKENIZER)[1] == ["--5", "3", "9" * 5000]


# Nothing that is read is run


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_pickle_is_not_run(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the one file that is a pickle by its format, nor in place of any other."""
    evil = tmp_path / "evil.bin"
    torch.save({"model.layers.2.output_adapters.adapters.default.adapter_up.bias": Evil(tmp_path / "ran")}, evil)
    for content in (evil.read_bytes(), pickle.dumps(Evil(tmp_path / "ran"))):
        with changed(saved / "hub" / BIN_NAME, content), pytest.raises(ValueError, match=BIN_NAME):
            ak.LlamaAdapter.from_adapterhub(LLAMA, saved / "hub")
        for name in (WEIGHTS_NAME, CONFIG_NAME, "head.safetensors", "head_config.json", "task.json"):
            with changed(saved / name, content), pytest.raises(ValueError, match=name):
                read_all(saved)
    assert not (tmp_path / "ran").exists()
    torch.load(evil, weights_only=False)
    assert (tmp_path / "ran").exists()  # and it would have

    def unpickled(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, unpickled)
    load_run(saved)
    read_metrics(saved / "metrics.jsonl")
    ak.LlamaAdapter.from_pretrained(LLAMA, saved).unload()
    ak.LlamaAdapter.from_adapterhub(LLAMA, saved / "hub").unload()
    train(tiny_run.model(), ROWS, tiny_run.quiet(output_dir=saved, max_steps=2, resume=True), tokenizer=TOKENIZER)


_FORBIDDEN = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads"}
_FORBIDDEN |= {"marshal.load", "yaml.load", "shelve.open", "joblib.load", "__import__", "os.system", "torch.jit.load"}


# The cut of a layer's forward compiles what the layer's own class has as its source, which Python has run already.
_OWN_SOURCE = [("sites.py", "exec"), ("sites.py", "compile")]


def test_no_code_that_could() -> None:
    loads, own = 0, []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, given_ = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (path.name, name) in _OWN_SOURCE:
                own.append((path.name, name))
                continue
            assert name not in _FORBIDDEN, f"{path}:{node.lineno}: {name}"
            assert given_.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
            assert given_.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
            assert given_.get("shell", "False") == "False", f"{path}:{node.lineno}"
            if name == "torch.load":
                loads += 1
                assert given_.get("weights_only") == "True", f"{path}:{node.lineno}"
    assert loads  # the one of AdapterHub's .bin
    assert sorted(own) == sorted(_OWN_SOURCE)
