"""What soft labels gain and what they cost: ``python -m experiments.distillation keep|student|memory``.

``keep``: SmolLM2-135M learns to name the topic of Reuters R8 texts, with and without a term that keeps its behavior on
newsgroup texts. Measured: topics named correctly, and how far the model drifted on unseen newsgroup texts.

``student``: the first 8 of its 30 layers, with adapters, learn newsgroup texts: from the next token alone, or from the
whole model's logits; for the same number of tokens, and for the same CPU seconds.

``memory``: peak memory, memory kept for the backward, and time of the loss alone, forward and backward, by chunk size;
and the same for whole logits, as written with torch's own functions.

Seconds are CPU seconds of this process on one thread: load on a shared machine slows wall-clock time more.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import adapterkern as ak
from adapterkern.recipes.demo import corpora
from adapterkern.recipes.distillation.soft_labels import Teacher, soft_label_loss
from adapterkern.recipes.distillation.task import Distillation, KeepBehaviour, WithKept, first_layers
from adapterkern.training import PrefixCache, TrainConfig, evaluate, train
from adapterkern.training.data.examples import Example, numbered
from adapterkern.training.feed import Feed, eval_batches
from adapterkern.training.task import Task
from bench.measure import kept_for_backward, paired_ratio, peak_bytes
from experiments.common import CPU, Rows, backbone, cpu_timed, make_parser, parse, record, texts


def main() -> None:
    """Run one of the three studies and write its file."""
    parser = make_parser("distillation", __doc__)
    parser.add_argument("use", choices=("keep", "student", "memory"))
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="student: steps of the shorter runs")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="keep: seeds 0 to N-1")
    arguments = parse(parser)
    torch.set_num_threads(1)
    if arguments.use == "memory":
        result = memory()
    else:
        result = keep(arguments.seeds) if arguments.use == "keep" else student(arguments.steps)
    record(arguments.output / f"{arguments.use}.json", use=arguments.use, **result)


def plain(table: corpora.Member, count: int) -> Rows:
    """Texts without their labels."""
    return [{"text": row["text"]} for row in texts(table, count)]


def topics(table: corpora.Member, count: int) -> Rows:
    """R8 texts as questions: their first 24 words as the prompt, their topic as the completion."""
    return [
        {"prompt": f"{' '.join(row['text'].split()[:24])}\nTopic:", "completion": f" {row['label']}"}
        for row in texts(table, count)
    ]


def exact(task: Task, examples: Sequence[Example], feed: Feed, config: TrainConfig) -> float:
    """The share of examples in which every target token has the highest score, as greedy decoding needs."""
    head = task.model.base.get_output_embeddings()
    right = []
    task.eval()
    with torch.no_grad():
        for batch in eval_batches(examples, config):
            inputs = feed(batch)
            hidden = task.hidden(inputs).flatten(0, 1)
            hits = head(hidden[inputs["positions"]]).argmax(-1) == inputs["targets"]
            right += [bool(own.all()) for own in hits.split([len(e.targets) for e in batch])]
    return sum(right) / len(right)


def losses(history: Sequence[dict[str, Any]]) -> list[float]:
    """The training loss of each logged step."""
    return [entry["loss"] for entry in history if entry["kind"] == "train"]


def keep(seeds: int) -> dict[str, Any]:
    """Train with and without kept texts, per seed."""
    llama, tokenizer = backbone()
    rows, unseen = topics(corpora.R8_TRAIN, 320), topics(corpora.R8_TEST, 200)
    kept, others = plain(corpora.NEWSGROUPS_TRAIN, 160), plain(corpora.NEWSGROUPS_TEST, 100)
    adapters = ak.AdapterConfig(adapter_dim=64, layers=(-3, -2, -1))
    training = TrainConfig(
        task="causal-lm", epochs=2, batch_size=16, lr=2e-3, max_length=48, log_every=1, eval_every=10**6, plot=False
    )
    cache = PrefixCache()
    tested: Any = WithKept(unseen, others)
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        for weight in (None, 0.5):  # None: no kept texts at all
            torch.manual_seed(seed)
            model = ak.LlamaAdapter(llama, adapters)
            task = KeepBehaviour(model, weight=weight or 0.0)
            config = dataclasses.replace(training, seed=seed)
            data: Any = rows if weight is None else WithKept(rows, kept)
            how: dict[str, Any] = {"tokenizer": tokenizer, "cache": cache, "task": task}
            if not runs:  # fills the cache for all runs; the untrained scores are the same for all
                before = evaluate(model, tested, config, **how)
            result, seconds = cpu_timed(functools.partial(train, model, data, config, **how))
            after = evaluate(model, tested, config, **how)
            examples, feed = numbered(task.load(unseen, config, tokenizer)), Feed(task, config, cache)
            feed.add(examples, cache.fill(model, examples, config) or [])
            run = {
                "seed": seed,
                "weight": weight,
                "steps": result.steps,
                "cpu_seconds": seconds,
                "topics_right": exact(task, examples, feed, config),
                "metrics": after,
                "losses": losses(result.history),
            }
            runs.append(run)
            print(
                f"seed {seed} weight {weight}: topics right {run['topics_right']:.3f}, {seconds:.0f} s, {after}",
                flush=True,
            )
            llama = model.unload()
    return {"adapters": adapters.to_dict(), "training": training.to_dict(), "before": before, "runs": runs}


def student(steps: int) -> dict[str, Any]:
    """Train the 8-layer student in three ways."""
    whole, tokenizer = backbone()
    others = plain(corpora.NEWSGROUPS_TEST, 40)
    adapters = ak.AdapterConfig(adapter_dim=64)
    training = TrainConfig(
        task="causal-lm", batch_size=8, lr=3e-3, max_length=48, log_every=1, eval_every=10**6, plot=False
    )
    runs: list[dict[str, Any]] = []
    budget = 0.0  # CPU seconds of the run with soft labels
    for name, weight in (("soft labels", 1.0), ("next token", 0.0), ("next token, as many seconds", 0.0)):
        count = steps
        if budget and name.endswith("seconds"):
            count = round(steps * budget / runs[-1]["cpu_seconds"])
        rows = plain(corpora.NEWSGROUPS_TRAIN, count * training.batch_size)
        torch.manual_seed(0)
        model = ak.LlamaAdapter(first_layers(whole, 8), adapters)
        task = Distillation(model, whole, weight=weight)
        config = dataclasses.replace(training, max_steps=count)
        how: dict[str, Any] = {"tokenizer": tokenizer, "task": task}
        if not runs:
            before = evaluate(model, others, config, **how)
        result, seconds = cpu_timed(functools.partial(train, model, rows, config, **how))
        budget = budget or seconds
        after = evaluate(model, others, config, **how)
        tokens = sum(len(e.input_ids) for e in task.load(rows, config, tokenizer))
        runs.append(
            {
                "name": name,
                "weight": weight,
                "steps": count,
                "tokens": tokens,
                "cpu_seconds": seconds,
                "metrics": after,
                "losses": losses(result.history),
            }
        )
        print(f"{name}: {count} steps, {tokens} tokens, {seconds:.0f} s, {after}", flush=True)
    return {"adapters": adapters.to_dict(), "training": training.to_dict(), "before": before, "runs": runs}


def memory(tokens: int = 1024, width: int = 576, vocabulary: int = 49152, rounds: int = 5) -> dict[str, Any]:
    """The loss alone, in the shapes of SmolLM2-135M; teacher and student share one random fp32 head."""
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

    variants: dict[str, Callable[[], torch.Tensor]] = {"whole": whole}
    variants |= {f"chunks of {n}": functools.partial(chunked, n) for n in (16, 64, 256, 1024)}

    def step(loss: Callable[[], torch.Tensor]) -> None:
        hidden.grad = None
        loss().backward()

    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):  # the first round warms up
        for name, loss in variants.items():
            _, seconds = cpu_timed(functools.partial(step, loss))
            if number:
                times[name].append(seconds)
    return {
        "shape": {"tokens": tokens, "hidden_size": width, "vocabulary": vocabulary, "dtype": "float32"},
        "one_logits_bytes": 4 * tokens * vocabulary,
        "variants": {
            name: {
                "peak_bytes": peak_bytes(functools.partial(step, loss), CPU),
                **kept_for_backward(loss, [head.weight]),
                "cpu_seconds": statistics.median(times[name]),
                "over_whole": paired_ratio(times[name], times["whole"]),
            }
            for name, loss in variants.items()
        },
    }


if __name__ == "__main__":
    main()
