"""What soft labels are worth, and what they cost: ``python -m bench.distillation keep|student|memory``.

``keep``: SmolLM2-135M learns to name the topic of Reuters R8 texts, with and without being held to itself on newsgroup
texts; how many topics it names, and how far it has drifted on newsgroup texts that it has not seen.

``student``: the first 8 of its 30 layers, with adapters, learn on newsgroup texts: from the next token alone, or from
the whole model's logits; for as many tokens, and for as many seconds of CPU.

``memory``: peak memory, memory kept for the backward and time of the loss alone, forward and backward, by the size of
its chunks; and of the same from whole logits, as one would write it with torch's own functions.

Seconds are of this process's CPU, on one thread: a shared machine slows the clock on the wall, and that one less.
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.utils import get_commit_info

from adapterkern.files import write_json
from adapterkern.model.backbone import load_backbone
from adapterkern.model.config import AdapterConfig
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.demo import corpora
from adapterkern.recipes.distillation.soft_labels import Teacher, soft_label_loss
from adapterkern.recipes.distillation.task import Distillation, KeepBehaviour, WithKept, first_layers
from adapterkern.training import PrefixCache, TrainConfig, evaluate, train
from adapterkern.training.data.examples import Example, numbered
from adapterkern.training.task import Feed, Task, eval_batches
from bench.measure import kept_for_backward, machine, paired_ratio, peak_bytes

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "AMD-EPYC" / "distillation"
Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distillation", description=__doc__)
    parser.add_argument("use", choices=("keep", "student", "memory"))
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="student: of the shorter runs")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="keep: seeds 0 to N-1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = {
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": get_commit_info().get("id"),
        "machine": machine(torch.device("cpu")) | {"python": platform.python_version()},
    }
    if arguments.use == "memory":
        result = memory()
    else:
        result = keep(arguments.seeds) if arguments.use == "keep" else student(arguments.steps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / f"{arguments.use}.json", about | result)


def texts(table: corpora.Member, count: int) -> Rows:
    lines = corpora.draw_texts(table, count, seed=0).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def topics(table: corpora.Member, count: int) -> Rows:
    """R8 texts as questions: their first 24 words, and their topic as what follows."""
    return [
        {"prompt": f"{' '.join(row['text'].split()[:24])}\nTopic:", "completion": f" {row['label']}"}
        for row in texts(table, count)
    ]


def exact(task: Task, examples: Sequence[Example], feed: Feed, config: TrainConfig) -> float:
    """The share of examples whose every target token has the highest score: what greedy decoding would say."""
    head = task.model.base.get_output_embeddings()
    right = []
    task.eval()
    with torch.no_grad():
        for batch in eval_batches(examples, config):
            inputs = feed(batch)
            hidden = task.hidden(inputs).flatten(0, 1)
            hits = head(hidden[inputs["positions"]]).argmax(-1) == inputs["targets"]
            right += [bool(part.all()) for part in hits.split([len(e.targets) for e in batch])]
    return sum(right) / len(right)


def keep(seeds: int) -> dict[str, Any]:
    llama, tokenizer = load_backbone(corpora.obtain(corpora.MODEL))
    rows, unseen = topics(corpora.R8_TRAIN, 320), topics(corpora.R8_TEST, 200)
    kept = [{"text": row["text"]} for row in texts(corpora.NEWSGROUPS_TRAIN, 160)]
    others = [{"text": row["text"]} for row in texts(corpora.NEWSGROUPS_TEST, 100)]
    adapters = AdapterConfig(adapter_dim=64, layers=(-3, -2, -1))
    training = TrainConfig(
        task="causal-lm", epochs=2, batch_size=16, lr=2e-3, max_length=48, log_every=1, eval_every=10**6, plot=False
    )
    cache = PrefixCache()
    runs = []
    for seed in range(seeds):
        for weight in (None, 0.5):  # None is no kept text at all
            torch.manual_seed(seed)
            model = LlamaAdapter(llama, adapters)
            task = KeepBehaviour(model, weight=weight or 0.0)
            config = dataclasses.replace(training, seed=seed)
            data = rows if weight is None else WithKept(rows, kept)
            if not runs:  # fills the cache for all runs, and says where they begin
                before = evaluate(model, WithKept(unseen, others), config, tokenizer=tokenizer, cache=cache, task=task)
            started = time.process_time()
            result = train(model, data, config, tokenizer=tokenizer, cache=cache, task=task)
            seconds = time.process_time() - started
            after = evaluate(model, WithKept(unseen, others), config, tokenizer=tokenizer, cache=cache, task=task)
            examples, feed = numbered(task.load(unseen, config, tokenizer)), Feed(task, config, cache)
            feed.add(examples, cache.fill(model, examples, config) or [])
            run = {
                "seed": seed,
                "weight": weight,
                "steps": result.steps,
                "cpu_seconds": seconds,
                "topics_right": exact(task, examples, feed, config),
                "metrics": after,
                "losses": [record["loss"] for record in result.history if record["kind"] == "train"],
            }
            runs.append(run)
            print(
                f"seed {seed} weight {weight}: topics right {run['topics_right']:.3f}, {seconds:.0f} s, {after}",
                flush=True,
            )
            llama = model.unload()
    settings = {"adapters": adapters.to_dict(), "training": training.to_dict()}
    return {"use": "keep", **settings, "before": before, "runs": runs}


def student(steps: int) -> dict[str, Any]:
    whole, tokenizer = load_backbone(corpora.obtain(corpora.MODEL))
    others = [{"text": row["text"]} for row in texts(corpora.NEWSGROUPS_TEST, 40)]
    adapters = AdapterConfig(adapter_dim=64)
    training = TrainConfig(
        task="causal-lm", batch_size=8, lr=3e-3, max_length=48, log_every=1, eval_every=10**6, plot=False
    )
    runs: list[dict[str, Any]] = []
    budget = 0.0  # CPU seconds of the run with soft labels
    for name, weight in (("soft labels", 1.0), ("next token", 0.0), ("next token, as many seconds", 0.0)):
        count = steps
        if budget and name.endswith("seconds"):
            count = round(steps * budget / runs[-1]["cpu_seconds"])
        rows = [{"text": row["text"]} for row in texts(corpora.NEWSGROUPS_TRAIN, count * training.batch_size)]
        torch.manual_seed(0)
        model = LlamaAdapter(first_layers(whole, 8), adapters)
        task = Distillation(model, whole, weight=weight)
        config = dataclasses.replace(training, max_steps=count)
        if not runs:
            before = evaluate(model, others, config, tokenizer=tokenizer, task=task)
        started = time.process_time()
        result = train(model, rows, config, tokenizer=tokenizer, task=task)
        seconds = time.process_time() - started
        budget = budget or seconds
        after = evaluate(model, others, config, tokenizer=tokenizer, task=task)
        tokens = sum(len(e.input_ids) for e in task.load(rows, config, tokenizer))
        losses = [record["loss"] for record in result.history if record["kind"] == "train"]
        runs.append(
            {
                "name": name,
                "weight": weight,
                "steps": count,
                "tokens": tokens,
                "cpu_seconds": seconds,
                "metrics": after,
                "losses": losses,
            }
        )
        print(f"{name}: {count} steps, {tokens} tokens, {seconds:.0f} s, {after}", flush=True)
    settings = {"adapters": adapters.to_dict(), "training": training.to_dict()}
    return {"use": "student", **settings, "before": before, "runs": runs}


def memory(tokens: int = 1024, width: int = 576, vocabulary: int = 49152, rounds: int = 5) -> dict[str, Any]:
    """In the shapes of SmolLM2-135M; both heads the same, random, in fp32."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden, taught = (torch.randn(tokens, width) for _ in range(2))
    hidden.requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))

    def whole() -> torch.Tensor:
        logits = head(hidden)
        with torch.no_grad():
            log_p = head(taught).log_softmax(-1)
        log_q = logits.log_softmax(-1)
        return 0.5 * (
            F.nll_loss(log_q, targets, reduction="sum") + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        )

    def chunked(chunk_tokens: int) -> torch.Tensor:
        return soft_label_loss(hidden, head, Teacher(taught, head), targets, chunk_tokens=chunk_tokens).loss

    variants = {"whole": whole} | {f"chunks of {n}": functools.partial(chunked, n) for n in (16, 64, 256, 1024)}

    def step(loss: Callable[[], torch.Tensor]) -> None:
        hidden.grad = None
        loss().backward()

    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):  # the first round warms up
        for name, loss in variants.items():
            started = time.process_time()
            step(loss)
            if number:
                times[name].append(time.process_time() - started)
    device = torch.device("cpu")
    return {
        "use": "memory",
        "shape": {"tokens": tokens, "hidden_size": width, "vocabulary": vocabulary, "dtype": "float32"},
        "one_logits_bytes": 4 * tokens * vocabulary,
        "variants": {
            name: {
                "peak_bytes": peak_bytes(functools.partial(step, loss), device),
                **kept_for_backward(loss, [head.weight]),
                "cpu_seconds": statistics.median(times[name]),
                "over_whole": paired_ratio(times[name], times["whole"]),
            }
            for name, loss in variants.items()
        },
    }


if __name__ == "__main__":
    main()
