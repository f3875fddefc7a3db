"""Question answering on newswire: ``python -m experiments.qa data|heads``.

``data`` writes train.json and test.json, in SQuAD 2.0 format, from Reuters R8. Many of its texts begin with a headline
that begins with a company's name, which the first sentence repeats ("brown forman bfdb sets stock split brown forman
inc said …"). So the spans of the name and of what is said about it are known without a human reader. Three questions:

    What does the headline say about brown forman?      the rest of the headline; what follows it shows where it ends
    Which company is the headline about?                the name
    What does the headline say about ivaco?             no answer: the text does not name it

``heads`` trains on them, on the first 8 layers of SmolLM2-135M: the span head with and without its pointer, with and
without adapters. The first run's model (adapters and pointer) also answers the tests' examples, which differ much from
newswire.
"""

import functools
import itertools
import random
from pathlib import Path
from typing import Any

import torch

import adapterkern as ak
from adapterkern.files import write_json
from adapterkern.recipes.demo import corpora
from adapterkern.recipes.qa.squad import read_questions, score
from adapterkern.recipes.qa.task import QuestionAnswering, SpanSettings
from adapterkern.training import PrefixCache, TrainConfig, train
from adapterkern.training.data.rows import BadRows
from experiments.common import backbone, cpu_timed, make_parser, parse, record, show, texts

OWN_EXAMPLES = Path(__file__).parents[1] / "tests" / "support" / "qa_examples.json"
TEXTS = {"train": (corpora.R8_TRAIN, 5400, 350), "test": (corpora.R8_TEST, 2100, 120)}  # drawn, used at most
WORDS = 40
FORMS = ("inc", "corp", "co", "ltd", "plc", "group", "bank")
VERBS = ("said", "reported", "has", "says")
TRAINING: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 2e-3, "max_length": 128, "eval_every": 10_000}


def main() -> None:
    """Write the questions, or train the heads and write their scores."""
    parser = make_parser("qa", __doc__)
    parser.add_argument("action", choices=("data", "heads"))
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="heads: seeds 0 to N-1; default 2")
    arguments = parse(parser)
    if arguments.action == "data":
        for name in TEXTS:
            write_json(arguments.output / f"{name}.json", squad(name))
        return
    torch.set_num_threads(1)
    heads(arguments.seeds, arguments.output / "heads.json")


def name_and_body(words: list[str]) -> tuple[int, int] | None:
    """The number of words of the company's name, and the word at which the body repeats it; None if it does not."""
    for body in range(3, min(len(words), WORDS) - 2):
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words[:body], words[body:WORDS], strict=False))
        name = sum(1 for _ in same)
        after = words[body + name : body + name + 2]
        if name and body >= name + 2 and len(after) == 2 and after[0] in FORMS and after[1] in VERBS:
            return name, body
    return None


def squad(part: str) -> dict[str, Any]:
    """The questions on one part of R8, in SQuAD 2.0 format."""
    table, drawn, count = TEXTS[part]
    draw = random.Random(part)
    known = set() if part == "train" else {p["context"] for p in squad("train")["data"][0]["paragraphs"]}
    starts = [row["text"].split()[:WORDS] for row in texts(table, drawn)]
    starts = [words for words in starts if " ".join(words) not in known]
    found = [(words, place) for words in starts if (place := name_and_body(words))][:count]
    names = [" ".join(words[: place[0]]) for words, place in found]
    paragraphs = []
    for number, (words, (length, body)) in enumerate(found):
        context, name, said = " ".join(words), names[number], " ".join(words[length:body])
        second = len(name) + len(said) + 2
        other = draw.choice([n for n in names if n not in context])
        ask = "What does the headline say about {}?".format
        qas = [(f"headline-{number}", ask(name), [{"text": said, "answer_start": len(name) + 1}])]
        if draw.random() < 0.5:
            golds = [{"text": name, "answer_start": 0}, {"text": name, "answer_start": second}]
            qas.append((f"company-{number}", "Which company is the headline about?", golds))
        if draw.random() < 0.5:
            qas.append((f"none-{number}", ask(other), []))
        rows = [{"id": i, "question": q, "answers": a, "is_impossible": not a} for i, q, a in qas]
        paragraphs.append({"context": context, "qas": rows})
    return {"version": "v2.0", "data": [{"title": f"Reuters R8, {part}", "paragraphs": paragraphs}]}


def heads(seeds: int, target: Path) -> None:
    """Write each head's scores on the test questions, per kind of question and seed, to ``target`` after each run."""
    folder = corpora.cache_folder()
    files = {name: folder / f"r8-qa-{name}.json" for name in TEXTS}
    for name, path in files.items():
        write_json(path, squad(name))
    llama, tokenizer = backbone(num_layers=8)
    bad = BadRows("test")
    questions = read_questions(files["test"], bad)
    bad.settle(skip=False)
    cache = PrefixCache()
    nothing = score(questions, {question.id: "" for question in questions})
    settings = {
        "backbone": "SmolLM2-135M-Instruct, first 8 layers, fp32",
        "adapters": "dim 64 after layers 5, 6, 7 (from 0)",
        "training": TRAINING,
    }
    on_own_examples = None
    runs: list[dict[str, Any]] = []
    for seed, train_adapters, pointer_dim in itertools.product(range(seeds), (True, False), (64, 0)):
        torch.manual_seed(seed)
        model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=64, layers=(-3, -2, -1)))
        task = QuestionAnswering(model, SpanSettings(null_threshold=0.0, pointer_dim=pointer_dim))
        config = TrainConfig(**TRAINING, seed=seed, train_adapters=train_adapters, progress=False)
        how: dict[str, Any] = {"tokenizer": tokenizer, "task": task, "cache": cache}
        trained, cpu_seconds = cpu_timed(functools.partial(train, model, files["train"], config, **how))
        answers = {id_: p.text for id_, p in task.answer(files["test"], config, tokenizer).items()}
        kinds = {kind: [q for q in questions if q.id.startswith(kind)] for kind in ("headline", "company", "none")}
        run: dict[str, Any] = {"seed": seed, "adapters": train_adapters, "pointer_dim": pointer_dim}
        run |= {"cpu_seconds": cpu_seconds, "parameters": trained.trainable_parameters, "steps": trained.steps}
        run |= score(questions, answers) | {kind: score(chosen, answers) for kind, chosen in kinds.items()}
        if not runs:
            predicted = {id_: p.text for id_, p in task.answer(OWN_EXAMPLES, config, tokenizer).items()}
            on_own_examples = score(read_questions(OWN_EXAMPLES, bad), predicted)
        model.unload()
        runs.append(run)
        scores = {"always_nothing": nothing, "newswire_head_on_own_examples": on_own_examples}
        record(target, **settings, **scores, runs=runs)
        show(run)


if __name__ == "__main__":
    main()
