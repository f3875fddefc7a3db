"""The documentation: links lead somewhere, examples run as they are printed, every public name is in the API."""

import dataclasses
import importlib
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkern import cli
from tests.support import tiny_qa
from tests.support.tiny_llama import tiny

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
# One per job that a user has; each begins with the shortest thing that works.
PAGES = (
    "index",
    "classify",
    "labels-and-numbers",
    "instruct-tune",
    "generate",
    "own-loop",
    "multitask",
    "routing",
    "distillation",
    "qa",
    "memory",
    "scale",
    "positions",
    "adapters",
    "stacks",
)
ALONE = ("instruct-tune",)  # each block of Python runs without those before it
RECIPES = ("multitask", "routing", "distillation", "qa")
PACKAGES = ("", ".ops", ".optim", ".training", *(f".recipes.{recipe}" for recipe in RECIPES))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.M)


def blocks(path: Path, language: str) -> list[str]:
    return [code for name, code in _BLOCK.findall(path.read_text()) if name == language]


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings; the site's are the same."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path: Path) -> None:
    for link in _LINK.findall(_BLOCK.sub("", path.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_compile(path: Path) -> None:
    for code in blocks(path, "python"):
        compile(code, str(path), "exec")


@pytest.mark.parametrize("page", PAGES[1:])
def test_a_page_begins_with_the_shortest_thing_that_works(page: str) -> None:
    first = re.match(r"# [^\n]+\n\n```(sh|python)\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S)
    assert first
    assert len(first[2].splitlines()) <= 10


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random models of ten and two layers with one tokenizer, and the files that the pages name."""
    folder = tmp_path_factory.mktemp("user")
    for name, layers in (("llama", 10), ("another", 2)):
        tiny(vocab_size=len(tiny_qa.TOKENIZER), num_hidden_layers=layers).save_pretrained(folder / name)
        tiny_qa.TOKENIZER.save_pretrained(folder / name)
    table = "text,label\n" + "".join(f'"{("Great", "Bad")[i % 2]}, said {i}",{"pn"[i % 2]}\n' for i in range(8))
    for name in ("train", "test", "mixed", "reviews", "reviews-test", "topics", "topics-test"):
        (folder / f"{name}.csv").write_text(table)
    for name, labels in (("tags", ("[]", '"[""a"", ""b""]"')), ("ratings", ("1", "2.5"))):
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(f"Said {i},{labels[i % 2]}\n" for i in range(8)))
    rows: dict[str, dict[str, Any]] = {
        "train": {"prompt": "Who came?", "completion": " Ann."},
        "test": {"prompt": "Who came late?", "completion": " Bo."},
        "qa": {"prompt": "Who came?", "completion": " Ann."},
        "texts": {"text": "Ann came by the old road."},
        "questions": {"id": "1", "question": "Who came?", "context": "Ann came late."},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * (1 if name == "questions" else 8))
    for name in ("train", "dev"):
        shutil.copy(tiny_qa.EXAMPLES, folder / f"{name}.json")
    return folder


def commands(path: Path) -> Iterator[list[str]]:
    """Those of a page that need nothing but the user's folder."""
    for code in blocks(path, "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["adapterkern"] and ("./llama" in words or words[1] in ("eval", "qa", "generate")):
                yield words[1:]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_and_code_run_as_printed(
    page: str, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / f"docs/{page}.md"
    monkeypatch.chdir(shutil.copytree(user, tmp_path / "user"))
    for command in commands(path):
        status = cli.main(command)
        assert status == 0, (command, capsys.readouterr().err)
    namespace: dict[str, Any] = {}
    for code in blocks(path, "python"):
        if page in ALONE:
            namespace = {}
        torch.manual_seed(0)
        exec(compile(code, str(path), "exec"), namespace)


DOCUMENTED = [name for page in sorted(ROOT.glob("docs/api/*.md")) for name in _DIRECTIVE.findall(page.read_text())]


def documented(name: str) -> Any:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute) if module else importlib.import_module(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_api(package: str) -> None:
    found = [documented(name) for name in DOCUMENTED]
    module = importlib.import_module(f"adapterkern{package}")
    missing = [name for name in module.__all__ if not any(getattr(module, name) is each for each in found)]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_arguments_exist(name: str) -> None:
    """mkdocstrings does not check it where one line describes several."""
    thing = documented(name)
    members = [m for n, m in vars(thing).items() if callable(m) and n[0] != "_"] if inspect.isclass(thing) else []
    for each in [thing, *members]:
        sections = re.findall(r"^Args:.*\n((?:\n|    .*\n?)+)", inspect.getdoc(each) or "", re.M)
        described = re.findall(r"^    (\w[\w, ]*):", "\n".join(sections), re.M)
        names = {name for line in described for name in line.split(", ")}
        known = {field.name for field in dataclasses.fields(each)} if dataclasses.is_dataclass(each) else set()
        if names:
            known |= set(inspect.signature(each).parameters)
        assert names <= known, each
