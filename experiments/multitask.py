"""Many tasks on one backbone: accuracy against training each alone, and throughput against the other ways to do it.

    python -m experiments.multitask accuracy
    python -m experiments.multitask throughput

``accuracy``: Reuters R8 and 20 newsgroups on the first 8 layers of SmolLM2-135M, together and each alone, on the same
rows in the same steps. ``throughput``: rows per second for the same rows as one mixed batch, as one batch per task on
one model, as one batch per task on a model per task, and, as the bound, as one task that has all the rows. Seconds are
CPU seconds on one thread, since the machine is shared.
"""

import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.model.mixing import Mixture
from adapterkern.recipes.demo import corpora
from adapterkern.recipes.multitask.task import MultiTask, TaskExample
from adapterkern.training import ClassificationHead, PrefixCache, TrainConfig
from adapterkern.training.task import Task
from bench.cases import Case, Variant
from bench.measure import interleave, paired_ratio, quartiles
from experiments.common import CPU, backbone, cpu_timed, make_parser, parse, record, show, texts

NUM_LAYERS = 8
BACKBONE = f"SmolLM2-135M-Instruct, first {NUM_LAYERS} layers, fp32"

# R8 is the easier one: fewer layers and dimensions are enough.
ADAPTERS = {
    "r8": ak.AdapterConfig(adapter_dim=32, layers=[-2, -1]),
    "newsgroups": ak.AdapterConfig(adapter_dim=64, layers=[-3, -2, -1]),
}
TABLES = {
    "r8": (corpora.R8_TRAIN, corpora.R8_TEST, 800, 400),
    "newsgroups": (corpora.NEWSGROUPS_TRAIN, corpora.NEWSGROUPS_TEST, 1600, 800),
}
ROWS_PER_STEP = {"r8": 8, "newsgroups": 16}
TRAINING: dict[str, Any] = {"epochs": 3, "lr": 2e-3, "max_length": 48, "batch_size": 8, "log_every": 100}


def adapted(llama: Any, configs: dict[str, ak.AdapterConfig], seed: int) -> ak.LlamaAdapter:
    """A model with these adapters and no other, each begun from the same seed."""
    model = ak.LlamaAdapter(llama, None)
    for name, config in configs.items():
        torch.manual_seed(seed)
        model.add_adapter(name, config)
    return model


# Accuracy


def accuracy(output: Path, seeds: int) -> None:
    """Train together and alone, per seed; ``output`` gets accuracy.json."""
    llama, tokenizer = backbone(NUM_LAYERS)
    train, test = {}, {}
    for name, (train_table, test_table, train_count, test_count) in TABLES.items():
        train[name] = texts(train_table, train_count)
        known = frozenset(row["text"] for row in train[name])
        test[name] = texts(test_table, test_count, exclude=known)
    how: dict[str, Any] = {"tokenizer": tokenizer, "cache": PrefixCache()}
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        # One batch size for all: the cached prefix is computed with it, so that all runs start from the same bits.
        def config(rows_per_step: int, seed: int = seed) -> TrainConfig:
            return TrainConfig(**TRAINING, accumulation=rows_per_step // TRAINING["batch_size"], seed=seed)

        model = adapted(llama, ADAPTERS, seed)
        task: Any = MultiTask(model, list(ADAPTERS))
        both = config(sum(ROWS_PER_STEP.values()))
        result = ak.train(model, train, both, eval_data=test, task=task, **how)
        model.unload()
        for name in ADAPTERS:
            single = adapted(llama, {name: ADAPTERS[name]}, seed)
            single.set_adapter(name)
            alone = ak.train(single, train[name], config(ROWS_PER_STEP[name]), eval_data=test[name], **how)
            single.unload()
            assert alone.metrics is not None
            assert alone.head is not None
            assert result.metrics is not None
            own = [*single.adapter_parameters(), *alone.head.parameters()]
            shared = [*model.adapter_parameters(name), *task.heads[name].parameters()]
            start = adapted(llama, {name: ADAPTERS[name]}, seed)
            start.unload()
            moved = torch.cat([(a - b).flatten() for a, b in zip(own, start.adapter_parameters(name), strict=False)])
            apart = torch.cat([(a - b).flatten() for a, b in zip(own, shared, strict=True)])
            rows.append(
                {
                    "seed": seed,
                    "task": name,
                    "steps": [result.steps, alone.steps],
                    "parameters": alone.trainable_parameters,
                    "accuracy_together": result.metrics[f"{name}/accuracy"],
                    "accuracy_alone": alone.metrics["accuracy"],
                    "loss_together": result.metrics[f"{name}/loss"],
                    "loss_alone": alone.metrics["loss"],
                    "distance_moved": moved.norm().item(),
                    "distance_apart": apart.norm().item(),
                    "train_seconds_together": round(result.seconds, 1),
                    "train_seconds_alone": round(alone.seconds, 1),
                }
            )
            show(rows[-1])
        described = {"training": TRAINING, "rows_per_step": ROWS_PER_STEP, "texts": {n: TABLES[n][2:] for n in TABLES}}
        adapters = {name: config.to_dict() for name, config in ADAPTERS.items()}
        record(output / "accuracy.json", backbone=BACKBONE, **described, adapters=adapters, rows=rows)


# Throughput


def examples(names: list[str], rows: int, length: int, vocabulary: int) -> list[TaskExample]:
    """Rows of random tokens, the tasks in alternation."""
    made = []
    for row in range(rows):
        ids = torch.randint(1, vocabulary, (length,)).numpy()
        made.append(TaskExample(ids, torch.randint(0, 8, (1,)).numpy(), torch.empty(0).numpy(), row % len(names)))
    return made


def ways(llama: Any, tasks: int, rows: int, length: int, train: bool) -> list[Variant]:
    """Each way to make a step (forward, backward, optimizer) or a forward of ``rows`` rows of ``tasks`` tasks."""
    names = [f"task{n}" for n in range(tasks)]
    configs = {name: ak.AdapterConfig(adapter_dim=64, layers=[-3, -2, -1]) for name in names}
    config = TrainConfig(batch_size=rows, max_length=length, lr=1e-3)
    every = examples(names, rows, length, llama.config.vocab_size)

    def head() -> ClassificationHead:
        return ClassificationHead(llama.config.hidden_size, [str(i) for i in range(8)])

    def runner(task: Task[Any], batch: list[Any], name: str | None) -> Callable[[], object]:
        if name is not None:
            task.model.set_adapter(name)
        optimizer = task.optimizer(task.trained(config), config)
        task.begin_step(batch, config, 0, 0)
        inputs = task.train(train).collate(batch, config)

        def run() -> None:
            if name is not None:
                task.model.set_adapter(name)
            with torch.set_grad_enabled(train):
                loss, _ = task(inputs)
            if train:
                (loss / len(batch)).backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    def one_after_another(runs: list[Callable[[], object]]) -> Callable[[], None]:
        def run_all() -> None:
            for run in runs:
                run()

        return run_all

    def plain(number: int) -> list[Any]:
        return [e for e in every if e.task == number]

    copies = [copy.deepcopy(llama) for _ in names]
    mixed = MultiTask(adapted(llama_copy(llama), configs, 0), names, heads={name: head() for name in names})
    shared = adapted(llama_copy(llama), configs, 0)
    loop = [runner(Task(shared, head()), plain(n), name) for n, name in enumerate(names)]
    apart = [
        runner(Task(adapted(copies[n], {name: configs[name]}, 0), head()), plain(n), name)
        for n, name in enumerate(names)
    ]
    bound = runner(Task(adapted(llama_copy(llama), {"all": configs[names[0]]}, 0), head()), every, "all")
    size = sum(p.numel() * p.element_size() for p in llama.parameters())
    runs = {
        "mixed": (runner(mixed, every, None), size),
        "loop over tasks": (one_after_another(loop), size),
        "model a task": (one_after_another(apart), size * tasks),
        "one task, all rows": (bound, size),
    }
    return [
        Variant(way, clock=functools.partial(cpu_seconds, run), info={"backbone_bytes": held})
        for way, (run, held) in runs.items()
    ]


def cpu_seconds(run: Callable[[], object]) -> float:
    """The CPU seconds of one call."""
    return cpu_timed(run)[1]


def llama_copy(llama: Any) -> Any:
    """A copy that shares the weights and can be adapted separately."""
    memo: dict[int, Tensor] = {id(t): t for t in (*llama.parameters(), *llama.buffers())}
    return copy.deepcopy(llama, memo)


def stacking_seconds(llama: Any, tasks: int) -> float:
    """Seconds to build all the stacks of one mixed forward: the minimum of 20 times."""
    configs = {f"task{n}": ak.AdapterConfig(adapter_dim=64, layers=[-3, -2, -1]) for n in range(tasks)}
    model = adapted(llama_copy(llama), configs, 0)
    resolved = {name: model.adapter_config(name) for name in configs}
    mixture = Mixture(dict(model.adapters.items()), resolved, torch.zeros(1, dtype=torch.int64))  # type: ignore[arg-type]
    groups = [g for n in range(NUM_LAYERS) for g in mixture._at(str(n), "layer")]
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for group in groups:
            mixture._stack(group)
        times.append(time.perf_counter() - started)
    return min(times)


def throughput(output: Path, rows: int, length: int, rounds: int) -> None:
    """Time each way, interleaved; ``output`` gets throughput.json."""
    llama, _ = backbone(NUM_LAYERS)
    torch.set_num_threads(1)
    measured: list[dict[str, Any]] = []
    for train, tokens in ((True, length), (False, length), (False, 1)):
        for tasks in (2, 8):
            variants = ways(llama, tasks, rows, tokens, train)
            shape = {"pass": "step" if train else "forward", "tasks": tasks, "rows": rows, "tokens": tokens}
            times = interleave(Case("multitask", "", shape, wall=True), variants, CPU, rounds, 30.0)
            for variant in variants:
                low, middle, high = quartiles(times[variant.name])
                ratio = paired_ratio(times[variant.name], times["mixed"])
                measured.append(
                    {
                        **shape,
                        "way": variant.name,
                        "rows_per_second": rows / middle,
                        "seconds": {"lower_quartile": low, "median": middle, "upper_quartile": high},
                        "times_of_mixed": ratio,
                        "rounds": len(times[variant.name]),
                        **variant.info,
                    }
                )
                show(measured[-1])
            about = {"backbone": BACKBONE, "note": "CPU seconds of one thread"}
            stacking = {str(n): stacking_seconds(llama, n) for n in (2, 8)}
            record(output / "throughput.json", **about, stacking_seconds=stacking, rows=measured)


def main() -> None:
    """Run one of the two studies and write its file."""
    parser = make_parser("multitask", __doc__)
    parser.add_argument("part", choices=("accuracy", "throughput"))
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="accuracy: seeds 0 to N-1")
    parser.add_argument("--rows", type=int, default=16, help="throughput: rows per step, all tasks together")
    parser.add_argument("--length", type=int, default=48, help="throughput: tokens per row")
    parser.add_argument("--rounds", type=int, default=7, help="throughput: at most this many")
    arguments = parse(parser)
    if arguments.part == "accuracy":
        accuracy(arguments.output, arguments.seeds)
    else:
        throughput(arguments.output, arguments.rows, arguments.length, arguments.rounds)


if __name__ == "__main__":
    main()
