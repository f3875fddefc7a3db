"""Many tasks, one backbone: named adapters with their heads, trained together from batches that mix the tasks.

One forward runs the whole batch: the backbone once, and at each site every sequence's own adapter, by grouped calls
(``LlamaAdapter.mixing``). Layers and dimensions may differ between tasks. Tasks share nothing that is trained, and
training them together gives each of them what training it alone gives, because the three things that would couple them
are separated:

    the mean    a task's gradient is that of its own mean loss: sum over its targets in the step / their number
    the norm    is clipped per task, each by max_norm
    absence     a task without a row in a step has no gradient, and the optimizer leaves it unchanged

What remains between them is rounding, and the schedule, which counts the steps of the run. sampling.py has the order of
the rows.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from adapterkern import checks
from adapterkern.files import read_json, read_versioned, write_json
from adapterkern.model.config import prefix_length
from adapterkern.model.llama import LlamaAdapter
from adapterkern.model.mixing import check_mixable
from adapterkern.model.saving import unloaded_on_error
from adapterkern.optim.clipped_adamw import ClippedAdamW
from adapterkern.optim.plan import local
from adapterkern.recipes.multitask.examples import Prediction, TaskExample, as_example, check_task
from adapterkern.recipes.multitask.sampling import mixed_order
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, count_tokens
from adapterkern.training.data.examples import Example, Rows, unlabeled
from adapterkern.training.data.packing import pack
from adapterkern.training.data.rows import BadRows, DataError, Row, listed, shown
from adapterkern.training.data.summary import Summary, summarize
from adapterkern.training.feed import Feed
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.optimization import make_optimizer
from adapterkern.training.prediction import predictions
from adapterkern.training.saved import load_run, save_config, save_run
from adapterkern.training.task import Task

TASKS_FOLDER = "tasks"
MULTITASK_CONFIG = f"{TASKS_FOLDER}/multitask.json"
FORMAT_VERSION = 1
TASK_COLUMN = "task"  # of the rows to predict
_ROWS = "rows/"  # + a task's name: the batch's rows of that task


class MultiTask(Task[TaskExample]):
    """Adapters of one model trained together: ``ak.train(model, {"r8": rows, ...}, task=MultiTask(model, [...]))``.

    Training data are a mapping from each task's name to its rows. One ``TrainConfig`` is for all: with
    ``"classification"`` each task has its own head, with ``"causal-lm"`` all use the backbone's.

    Args:
        model: the backbone with an adapter for each of ``names``.
        names: the tasks, which are adapters of ``model``.
        temperature: of the sampling, from 1 (in proportion to the tasks' rows) to ``math.inf`` (equal shares).
        heads: by task, to train further; default new ones for the labels that the training data have.

    Raises:
        ValueError: a name that is no adapter, or cannot name a folder; an argument out of its range.
        TypeError: ``temperature`` is not a number.
    """

    # Not the folder: tasks/NAME/sources.json alone is no run.
    files: ClassVar[tuple[str, ...]] = (MULTITASK_CONFIG,)
    uniform = trains_all = False  # a step trains the tasks that have a row in it

    def __init__(
        self,
        model: LlamaAdapter,
        names: Sequence[str],
        *,
        temperature: float = 1.0,
        heads: Mapping[str, ClassificationHead] | None = None,
    ) -> None:
        super().__init__(model)
        heads = heads or {}
        if not names or len(set(names)) < len(names):
            raise ValueError(f"names: expected at least one and none twice, got {list(names)}")
        for name in names:
            if below := model.adapters_below(name):
                raise ValueError(f"names: expected adapters without others below, got {name!r} on {', '.join(below)}")
            if Path(name).name != name:
                raise ValueError(f"names: expected names that a folder can have, got {name!r}")
        check_mixable({name: model.adapter_config(name) for name in names})
        if unknown := sorted(heads.keys() - set(names)):
            raise ValueError(f"heads: expected tasks among {', '.join(names)}, got {unknown[0]!r}")
        self.names = list(names)
        self.temperature = checks.number("temperature", temperature, "[1, inf]")
        self.heads = nn.ModuleDict({name: head.to(model.device) for name, head in heads.items()})
        self._step_targets: dict[str, int] = {}  # of each task with a row in the step under way

    def settings_in(self, directory: Path) -> dict[str, Any] | None:
        saved = read_json(directory / MULTITASK_CONFIG)
        return {name: value for name, value in saved.items() if name != "format_version"}

    @property
    def settings(self) -> dict[str, Any]:
        temperature = None if math.isinf(self.temperature) else self.temperature  # JSON has no infinity
        return {"tasks": self.names, "temperature": temperature}

    def _head(self, name: str) -> ClassificationHead | None:
        heads: dict[str, Any] = dict(self.heads.items())
        return heads.get(name)

    # Data

    def load(self, rows: Mapping[str, Rows], config: TrainConfig, tokenizer: Any) -> list[TaskExample]:
        """Examples of every task in ``rows``; the first call, with the training rows, makes the heads."""
        check_task(config)
        if not isinstance(rows, Mapping):
            raise TypeError(f"data: expected a mapping from task names to rows, got {type(rows).__name__}")
        if not config.train_adapters:
            raise ValueError("train_adapters: expected True for several tasks, whose adapters are mixed, got False")
        if unknown := [name for name in rows if name not in self.names]:
            raise ValueError(f"data: expected tasks among {listed(self.names)}, got {shown(unknown[0])}")
        if not rows:
            raise ValueError(f"data: expected rows of tasks among {listed(self.names)}, got none")
        headless = [name for name in self.names if name not in rows and name not in self.heads]
        if headless and config.labeled:
            raise ValueError(self._missing(headless[0]))
        examples = []
        for number, name in enumerate(self.names):
            if name in rows:
                one: Task[Example] = Task(self.model, self._head(name))
                try:
                    loaded = one.load(rows[name], config, tokenizer)
                except DataError as error:
                    raise DataError(f"task {name!r}: {error}") from error
                examples += [as_example(example, number) for example in loaded]
                if one.head is not None:
                    self.heads[name] = one.head
        return examples

    def summaries(self, examples: Sequence[TaskExample], config: TrainConfig) -> dict[str, Summary]:
        """What the examples of each task are."""
        found: dict[str, Summary] = {}
        for number, name in enumerate(self.names):
            if mine := [example for example in examples if example.task == number]:
                head = self._head(name)
                found[name] = summarize(mine, config.max_length, None if head is None else head.labels)
        return found

    def shown(self, example: TaskExample) -> tuple[list[int], str]:
        name = self.names[example.task]
        places, label = Task(self.model, self._head(name)).shown(example)
        return places, f"{name}: {label}" if label else name

    def _missing(self, name: str) -> str:
        return f"data: expected rows of all tasks, {listed(self.names)}; {name!r} is missing"

    def collate(self, examples: Sequence[TaskExample], config: TrainConfig) -> Batch:
        """A batch with ``choice`` (B,), each row's task among those present, and ``rows/NAME`` of each of these.

        A packed row holds texts of one task.

        Over several processes each rank has some of a step's rows, and all ranks exchange the gradients of the same
        parameters: all of the step's tasks are present on each, those without a row there with zeros.
        """
        numbers = np.array([example.task for example in examples])
        present = np.unique(numbers)
        if self.training and processes.world_size() > 1:
            present = np.union1d(present, [self.names.index(name) for name in self._step_targets])
        if config.packing:
            batch = pack(examples, config, kinds=numbers.tolist())
            of_texts, numbers = numbers, np.zeros(len(batch["input_ids"]), dtype=np.int64)
            numbers[batch["starts"].numpy() // batch["input_ids"].shape[1]] = of_texts
        else:
            batch = super().collate(examples, config)
        choice = np.searchsorted(present, numbers)
        rows = {_ROWS + self.names[n]: torch.from_numpy(np.flatnonzero(numbers == n)) for n in present}
        return batch | {"choice": torch.from_numpy(choice.astype(np.int64))} | rows

    def order(self, examples: Sequence[TaskExample], config: TrainConfig, epoch: int) -> list[int]:
        """Raises ``ValueError`` for a task without a row: it would be saved without having learned anything."""
        rows = [[i for i, e in enumerate(examples) if e.task == number] for number in range(len(self.names))]
        if [] in rows:
            raise ValueError(self._missing(self.names[rows.index([])]))
        return mixed_order(rows, self.temperature, config.seed, epoch)

    # Training

    def trained(self, config: TrainConfig) -> dict[str, nn.Parameter]:
        parameters: dict[str, nn.Parameter] = {}
        for name in self.names:
            parameters |= {f"{name}.adapter.{key}": p for key, p in self.model.adapters[name].named_parameters()}
            if name in self.heads:
                parameters |= {f"{name}.head.{key}": p for key, p in self.heads[name].named_parameters()}
        return parameters

    def running(self, config: TrainConfig) -> AbstractContextManager[None]:
        """Context of a run with the adapters of all tasks."""
        # No batch yet: this is for `prefix_length`, the least over all tasks.
        return self.model.mixing(self.names, torch.empty(0, dtype=torch.int64, device=self.model.device))

    def optimizer(self, parameters: dict[str, nn.Parameter], config: TrainConfig) -> ClippedAdamW:
        """One for all tasks. Before its step each task's gradient becomes that of its own mean, clipped by itself."""
        of_tasks: dict[str, list[nn.Parameter]] = {name: [] for name in self.names}
        for key, p in parameters.items():
            of_tasks[key.partition(".")[0]].append(p)
        optimizer = make_optimizer(parameters, dataclasses.replace(config, max_norm=math.inf))
        optimizer.register_step_pre_hook(lambda *_: self._separate(of_tasks, config.max_norm))
        return optimizer

    def begin_step(self, examples: Sequence[TaskExample], config: TrainConfig, epoch: int, index: int) -> None:
        """Count each task's targets, by which its gradient will be divided."""
        counts = [0] * len(self.names)
        for example in examples:
            counts[example.task] += len(example.targets)
        self._step_targets = {name: count for name, count in zip(self.names, counts, strict=True) if count}

    @torch.no_grad()
    def _separate(self, of_tasks: Mapping[str, Sequence[nn.Parameter]], max_norm: float) -> None:
        """From the gradient of the mean over all targets to each task's own, no longer than ``max_norm``."""
        targets_of = self._step_targets
        gradients = [[local(p.grad) for p in of_tasks[name] if p.grad is not None] for name in targets_of]
        # fp64: a norm is infinite only where a gradient is, and then it becomes NaN, which the optimizer refuses.
        norms = [torch._foreach_norm(of_task, 2.0, dtype=torch.float64) for of_task in gradients]
        first = norms[0][0].device
        squares = torch.stack([torch.stack([n.to(first) for n in of_task]).square().sum() for of_task in norms])
        if processes.is_sharded(self):
            squares = processes.total(squares)
        total = sum(targets_of.values())
        for of_task, square, targets in zip(gradients, squares.unbind(), targets_of.values(), strict=True):
            scale = (max_norm / (square.sqrt() * (total / targets) + 1e-6)).clamp(max=1) * (total / targets)
            for device in {g.device for g in of_task}:
                there = [g for g in of_task if g.device == device]
                torch._foreach_mul_(there, scale.to(device, torch.float32))

    # A forward

    def hidden(self, batch: Batch) -> Tensor:
        with self.model.mixing(list(self._rows_of(batch)), batch["choice"]):
            if "prefix" not in batch:
                return super().hidden(batch)
            # Cached up to the first adapter of all tasks; those that are present may begin later.
            start = min(prefix_length(self.model.adapter_config(name)) for name in self.names)
            where = batch.get("attention_mask"), start, batch.get("position_ids")
            return self.model.run_suffix(batch["prefix"], *where)

    def behaviors(self) -> dict[str, Callable[[Batch], Tensor]]:
        def of(name: str, batch: Batch) -> Tensor:
            rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
            return self.hidden(batch | {"choice": torch.zeros_like(rows), _ROWS + name: rows})

        return {f"{name}/": functools.partial(of, name) for name in self.names}

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy over all tasks, and (1,) how many targets are right, counted in eval mode alone."""
        if "positions" in batch:
            return super().loss(hidden, batch)
        losses, right = zip(
            *(
                self.heads[name].loss(  # type: ignore[operator]
                    self._scores(name, hidden, batch, rows), batch["targets"][rows], count=not self.training
                )
                for name, rows in self._rows_of(batch).items()
            ),
            strict=True,
        )
        return torch.stack(losses).sum(), torch.stack(right).sum(0)

    # Answers

    @classmethod
    def saved_predicts(cls, directory: Path) -> dict[str, Any]:
        return {"names": cls.saved_names(directory)}

    @classmethod
    def to_predict(
        cls, rows: list[Row], config: TrainConfig, tokenizer: Any, bad: BadRows, **of_task: Any
    ) -> list[list[TaskExample]]:
        """As ``Task``'s, of rows whose column ``"task"`` names their task."""
        names: list[str] = of_task["names"]
        made: list[list[TaskExample]] = []
        for row, example in zip(rows, unlabeled(rows, config, tokenizer, bad), strict=True):
            name = row.values.get(TASK_COLUMN)
            if name not in names:
                got = shown(name) if TASK_COLUMN in row.values else "none"
                bad.add(row.place, f"column {TASK_COLUMN!r}: expected a task among {listed(names)}, got {got}")
            known = example is not None and name in names
            made.append([as_example(example, names.index(name))] if known else [])  # type: ignore[arg-type]
        return made

    def predicts(self) -> dict[str, Any]:
        if not self.heads:
            raise NotImplementedError("predict: expected tasks with heads, got causal-lm; use model.generate")
        return {"names": self.names}

    def predict(self, batch: Batch) -> list[Prediction]:
        """The label of each row of the batch by its own task. Raises as ``predicts``."""
        self.predicts()
        hidden = self.hidden(batch)
        found: dict[int, Prediction] = {}
        for name, rows in self._rows_of(batch).items():
            head = self._head(name)
            assert head is not None  # all tasks have one, or none
            labels = head.predictions(self._scores(name, hidden, batch, rows))
            found |= {row: Prediction(name, *one) for row, one in zip(rows.tolist(), labels, strict=True)}
        return [found[row] for row in range(len(hidden))]

    def _rows_of(self, batch: Batch) -> dict[str, Tensor]:
        """The batch's rows of each task that is present, in the order that ``choice`` counts in."""
        return {name: batch[_ROWS + name] for name in self.names if _ROWS + name in batch}

    def _scores(self, name: str, hidden: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        mask = batch["attention_mask"]
        if len(rows) < len(hidden):
            hidden, mask = hidden[rows], mask[rows]
        return self.heads[name](hidden, mask)

    # Scores

    def evaluate(
        self, run: nn.Module, examples: Sequence[TaskExample], feed: Feed, config: TrainConfig
    ) -> dict[str, float]:
        """``loss`` and ``accuracy`` over all targets, and ``NAME/loss``, ``NAME/accuracy``, ... of each task."""
        metrics: dict[str, float] = {}
        sums = dict.fromkeys(("loss", "accuracy", "targets", "seconds"), 0.0)
        for number, name in enumerate(self.names):
            mine = [example for example in examples if example.task == number]
            if not mine:
                continue
            one = super().evaluate(run, mine, feed, config)
            metrics |= {f"{name}/{key}": value for key, value in one.items()}
            for key in sums:
                sums[key] += one[key] * (one["targets"] if key in ("loss", "accuracy") else 1)
        sums["loss"] /= sums["targets"]
        sums["accuracy"] /= sums["targets"]
        return sums | {"tokens_per_second": count_tokens(examples) / sums["seconds"]} | metrics

    def classify(
        self, texts: Sequence[str], tasks: Sequence[str], config: TrainConfig, tokenizer: Any
    ) -> list[Prediction]:
        """The label of each text by its own task, in batches that mix the tasks.

        Args:
            texts: what to label, none empty.
            tasks: the task of each text.
            config, tokenizer: those of the training.

        Raises:
            ValueError: a task that does not exist or has no head, or another number of them than of texts.
        """
        if len(tasks) != len(texts):
            raise ValueError(f"tasks: expected one for each of {len(texts)} texts, got {len(tasks)}")
        if unknown := [name for name in tasks if name not in self.heads]:
            raise ValueError(f"tasks: expected some of {', '.join(self.heads)}, got {unknown[0]!r}")
        if empty := [text for text in texts if not text.strip()]:
            raise ValueError(f"texts: expected none empty, got {shown(empty[0])}")
        rows = [{config.text_column: text, TASK_COLUMN: name} for text, name in zip(texts, tasks, strict=True)]
        return [found for _, found in predictions(self, rows, config, tokenizer)] if rows else []

    # Files

    def save(self, directory: Path, config: TrainConfig) -> None:
        """Write ``tasks/NAME`` per task, as a training of that task alone would leave it, and the tasks' names."""
        for name in self.names:
            folder = self.folder(directory, name)
            save_run(folder, self.model, self._head(name), config, kind=Task.__name__, name=name)
        write_json(directory / MULTITASK_CONFIG, {"format_version": FORMAT_VERSION, **self.settings})
        save_config(directory, config, self.kind)

    @staticmethod
    def folder(directory: str | os.PathLike[str], name: str) -> Path:
        """The folder of a task in a run's ``directory``."""
        return Path(directory) / TASKS_FOLDER / name

    @classmethod
    def from_pretrained(
        cls, llama: Any, directory: str | os.PathLike[str], *, fused: bool = True, liger: bool = False
    ) -> tuple[Self, TrainConfig]:
        """All tasks of a saved run or checkpoint on ``llama``, and the configuration of their training.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: one is damaged or does not fit; the message names it.
        """
        names, temperature = cls._saved_settings(directory)
        model = LlamaAdapter(llama, None, fused=fused, liger=liger)
        heads: dict[str, ClassificationHead] = {}
        with unloaded_on_error(model):
            for name in names:
                config, head = load_run(folder := cls.folder(directory, name))
                model.load_adapter(folder, name)
                heads |= {name: head} if isinstance(head, ClassificationHead) else {}
            try:
                return cls(model, names, temperature=temperature, heads=heads), config
            except (TypeError, ValueError) as error:
                raise ValueError(f"{Path(directory) / MULTITASK_CONFIG}: {error}") from error

    @classmethod
    def saved_names(cls, directory: str | os.PathLike[str]) -> list[str]:
        """The tasks of a saved run or checkpoint. Raises as ``from_pretrained``."""
        return cls._saved_settings(directory)[0]

    @staticmethod
    def _saved_settings(directory: str | os.PathLike[str]) -> tuple[list[str], float]:
        path = Path(directory) / MULTITASK_CONFIG
        saved = read_versioned(path, FORMAT_VERSION, {"tasks": list, "temperature": int | float | None})
        names = saved["tasks"]
        if not names or len({n for n in names if isinstance(n, str) and n and Path(n).name == n}) != len(names):
            raise ValueError(f"{path}: field 'tasks': expected names, each once, got {names!r:.80}")
        return names, math.inf if saved["temperature"] is None else saved["temperature"]
