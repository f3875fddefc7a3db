"""Many tasks on one backbone: accuracy against training each alone, and throughput against the other ways to do it.

    python -m bench.multitask accuracy --output FOLDER
    python -m bench.multitask throughput --output FOLDER

``accuracy``: Reuters R8 and 20 newsgroups on the first 8 layers of SmolLM2-135M, together and each alone, on the same
rows in the same steps. ``throughput``: rows a second of the same rows by one mixed batch, by a batch a task on one
model, by a batch a task on a model each, and, as the bound, by one task that has all the rows; seconds are those of the
CPU, on one thread, since the machine is shared.
"""

import argparse
import copy
import json
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapterkern as ak
from adapterkern.files import write_json
from adapterkern.model.backbone import load_backbone
from adapterkern.model.mixing import Mixture
from adapterkern.recipes.demo import corpora
from adapterkern.recipes.multitask.task import MultiTask, TaskExample
from adapterkern.training import ClassificationHead, PrefixCache, TrainConfig
from adapterkern.training.task import Task
from bench.cases import Case, Variant
from bench.measure import interleave, machine, paired_ratio, quartiles

NUM_LAYERS = 8
CPU = torch.device("cpu")

# R8 is the easier one: it does with fewer layers and dimensions.
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


def about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    backbone = f"SmolLM2-135M-Instruct, first {NUM_LAYERS} layers, fp32"
    return {"date": date, "commit": commit, "backbone": backbone} | machine(CPU)


def adapted(llama: Any, configs: dict[str, ak.AdapterConfig], seed: int) -> ak.LlamaAdapter:
    model = ak.LlamaAdapter(llama, None)
    for name, config in configs.items():
        torch.manual_seed(seed)
        model.add_adapter(name, config)
    return model


# Accuracy


def draw(table: corpora.Member, count: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    lines = corpora.draw_texts(table, count, 0, exclude).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def accuracy(output: Path, seeds: int) -> None:
    llama, tokenizer = load_backbone(corpora.obtain(corpora.MODEL), num_layers=NUM_LAYERS)
    train, test = {}, {}
    for name, (train_table, test_table, train_count, test_count) in TABLES.items():
        train[name] = draw(train_table, train_count)
        test[name] = draw(test_table, test_count, frozenset(row["text"] for row in train[name]))
    how: dict[str, Any] = {"tokenizer": tokenizer, "cache": PrefixCache()}
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        # One batch size for all: the cached prefix is computed in it, and together and alone begin from the same bits.
        def config(rows_per_step: int, seed: int = seed) -> TrainConfig:
            return TrainConfig(**TRAINING, accumulation=rows_per_step // TRAINING["batch_size"], seed=seed)

        model = adapted(llama, ADAPTERS, seed)
        task: Any = MultiTask(model, list(ADAPTERS))
        both = config(sum(ROWS_PER_STEP.values()))
        result = ak.train(model, train, both, eval_data=test, task=task, **how)  # type: ignore[arg-type]
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
            print(json.dumps(rows[-1]), flush=True)
        described = {"training": TRAINING, "rows_per_step": ROWS_PER_STEP, "texts": {n: TABLES[n][2:] for n in TABLES}}
        adapters = {name: config.to_dict() for name, config in ADAPTERS.items()}
        write_json(output / "accuracy.json", {"about": about(), **described, "adapters": adapters, "rows": rows})


# Throughput


def examples(names: list[str], rows: int, length: int, vocabulary: int) -> list[TaskExample]:
    """Rows of random tokens, the tasks in turn."""
    made = []
    for row in range(rows):
        ids = torch.randint(1, vocabulary, (length,)).numpy()
        made.append(TaskExample(ids, torch.randint(0, 8, (1,)).numpy(), torch.empty(0).numpy(), row % len(names)))
    return made


def ways(llama: Any, tasks: int, rows: int, length: int, train: bool) -> list[Variant]:
    """A step (forward, backward, optimizer) or a forward of ``rows`` rows of ``tasks`` tasks, in each way."""
    names = [f"task{n}" for n in range(tasks)]
    configs = {name: ak.AdapterConfig(adapter_dim=64, layers=[-3, -2, -1]) for name in names}
    config = TrainConfig(batch_size=rows, max_length=length)
    every = examples(names, rows, length, llama.config.vocab_size)

    def head() -> ClassificationHead:
        return ClassificationHead(llama.config.hidden_size, [str(i) for i in range(8)])

    def runner(task: Task, batch: list[Any], name: str | None) -> Callable[[], object]:
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
        return lambda: [run() for run in runs] and None

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
        Variant(way, clock=lambda run=run: cpu_seconds(run), info={"backbone_bytes": held})
        for way, (run, held) in runs.items()
    ]


def cpu_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def llama_copy(llama: Any) -> Any:
    """Another model over the same weights, to be adapted by itself."""
    memo: dict[int, Tensor] = {id(t): t for t in (*llama.parameters(), *llama.buffers())}
    return copy.deepcopy(llama, memo)


def stacking_seconds(llama: Any, tasks: int) -> float:
    """The least of 20 times: all stacks that one mixed forward makes."""
    configs = {f"task{n}": ak.AdapterConfig(adapter_dim=64, layers=[-3, -2, -1]) for n in range(tasks)}
    model = adapted(llama_copy(llama), configs, 0)
    resolved = {name: model.adapter_config(name) for name in configs}
    mixture = Mixture(dict(model.adapters.items()), resolved, torch.zeros(1, dtype=torch.int64))  # type: ignore[arg-type]
    groups = [g for n in range(NUM_LAYERS) for g in mixture._groups(str(n), "layer")]
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for group in groups:
            mixture._stack(group)
        times.append(time.perf_counter() - started)
    return min(times)


def throughput(output: Path, rows: int, length: int, rounds: int) -> None:
    llama, _ = load_backbone(corpora.obtain(corpora.MODEL), num_layers=NUM_LAYERS)
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
                print(json.dumps(measured[-1]), flush=True)
            stacking = {str(n): stacking_seconds(llama, n) for n in (2, 8)}
            write_json(
                output / "throughput.json",
                {"about": about(), "note": "CPU seconds of one thread", "stacking_seconds": stacking, "rows": measured},
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("accuracy", "throughput"))
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16, help="in one step, all tasks together")
    parser.add_argument("--length", type=int, default=48, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.part == "accuracy":
        accuracy(arguments.output, arguments.seeds)
    else:
        throughput(arguments.output, arguments.rows, arguments.length, arguments.rounds)


if __name__ == "__main__":
    main()
