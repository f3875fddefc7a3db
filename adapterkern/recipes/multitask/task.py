"""Many tasks, one backbone: named adapters with their heads, trained together from batches that mix the tasks.

One forward runs the whole batch: the backbone once, and at each site every sequence's own adapter, by grouped calls
(``LlamaAdapter.mixing``). Layers and dimensions may differ between tasks. Tasks share nothing that is trained, so
training them together must give each of them what training it alone gives, and it does, because the three things that
would couple them are taken apart:

    the mean    a task's gradient is that of its own mean loss: sum over its targets in the step / their number
    the norm    is clipped task by task, each by max_norm
    absence     a task without a row in a step has no gradient, and the optimizer leaves it alone

What is left between them is rounding, and the schedule, which counts the steps of the run.

The order of rows. A task's rows come in the order in which it would see them alone, pass after pass, and an epoch has
as many rows as there are. With temperature T, task t has a share of n_t^(1/T) / Σ n^(1/T) of it: T = 1 shows every row
once an epoch, T = ∞ shows all tasks alike, the small ones' rows several times. Shares are kept in every step, as far as
whole rows go, not only on average: task t's j-th of c_t rows in the epoch stands at the fraction (j + ½) / c_t of it.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from adapterkern.files import read_json, write_json
from adapterkern.model.adapter import AdapterConfig
from adapterkern.model.llama import LlamaAdapter
from adapterkern.model.mixing import prefix_length
from adapterkern.optim.clipped_adamw import ClippedAdamW
from adapterkern.optim.plan import local
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Example, Rows, collate, count_tokens, epoch_order
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.optimization import make_optimizer
from adapterkern.training.parallel.accelerator import left_as_found
from adapterkern.training.run.checkpoint import CheckpointError
from adapterkern.training.run.folder import MULTITASK_CONFIG, TASKS_FOLDER, settings_to_resume
from adapterkern.training.saved import load_task, save_task
from adapterkern.training.task import Feed, Inputs, Task

FORMAT_VERSION = 1
_MEMBERS = "members/"  # + a task's name: in a batch, which of the targets are that task's


class TaskExample(NamedTuple):
    """An :class:`Example`, and whose it is."""

    input_ids: np.ndarray  # (n,) int64
    targets: np.ndarray  # (k,)
    positions: np.ndarray  # (k,), or empty for classification
    task: np.ndarray  # (1,) the task's number


class Prediction(NamedTuple):
    """What a task's head makes of a text."""

    task: str
    label: str
    probability: float


class MultiTask(Task):
    """Adapters of one model trained together: ``ak.train(model, {"r8": rows, ...}, task=MultiTask(model, [...]))``.

    Training data are a mapping from each task's name to its rows. ``config`` is for all: with ``"classification"`` each
    task has a head of its own, with ``"causal-lm"`` all have the backbone's.

    Args:
        model: the backbone with an adapter for each of ``names``.
        names: the tasks, which are adapters of ``model``.
        temperature: of the sampling, from 1 (in proportion to the tasks' rows) to ``math.inf`` (equal shares).
        heads: by task, to train further; default new ones for the labels that the training data have.

    Raises:
        ValueError: a name that is no adapter, or no name for a folder; an argument out of its range.
    """

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
            model.adapter_config(name)
            if Path(name).name != name:
                raise ValueError(f"names: expected what a folder can be called, got {name!r}")
        if not temperature >= 1:
            raise ValueError(f"temperature: expected a number from 1 to infinity, got {temperature!r}")
        if unknown := sorted(heads.keys() - set(names)):
            raise ValueError(f"heads: expected tasks among {', '.join(names)}, got {unknown[0]!r}")
        self.names = list(names)
        self.temperature = temperature
        self.heads = nn.ModuleDict({name: head.to(model.device) for name, head in heads.items()})
        self._targets: dict[str, int] = {}  # of each task with a row in the step under way
        self._stepped: dict[str, list[nn.Parameter]] = {}  # what the optimizer steps over, by task

    def _head(self, name: str) -> ClassificationHead | None:
        heads: dict[str, Any] = dict(self.heads.items())
        return heads.get(name)

    # Data

    def load(  # type: ignore[override]  # more kinds of data
        self, rows: Mapping[str, Rows], config: TrainConfig, tokenizer: Any
    ) -> list[TaskExample]:
        """Examples of every task in ``rows``; the first call, with the rows to train on, makes the heads."""
        if not isinstance(rows, Mapping):
            raise TypeError(f"data: expected a mapping from task names to rows, got {type(rows).__name__}")
        if not config.train_adapters:
            raise ValueError("train_adapters: expected True: heads alone have nothing to mix, got False")
        if unknown := [name for name in rows if name not in self.names]:
            raise ValueError(f"data: expected tasks among {', '.join(self.names)}, got {unknown[0]!r}")
        if not rows:
            raise ValueError(f"data: expected rows of tasks among {', '.join(self.names)}, got none")
        headless = [name for name in self.names if name not in rows and name not in self.heads]
        if headless and config.task == "classification":
            raise ValueError(self._missing(headless[0]))
        examples = []
        for number, name in enumerate(self.names):
            if name in rows:
                one = Task(self.model, self._head(name))
                mine = np.array([number])
                examples += [TaskExample(*example, mine) for example in one.load(rows[name], config, tokenizer)]
                if one.head is not None:
                    self.heads[name] = one.head
        return examples

    def _missing(self, name: str) -> str:
        return f"data: expected rows of all tasks, {', '.join(self.names)}; {name!r} is missing"

    def collate(self, examples: Sequence[TaskExample], config: TrainConfig) -> Inputs:  # type: ignore[override]
        """A batch; ``choice`` (B,) is each row's task among those that are present, in the order of their members.

        Of several processes each has some of a step's rows, and the gradients that they exchange must be of the same
        parameters: all of the step's tasks are present there, those without a row here with zeros.
        """
        numbers = np.concatenate([example.task for example in examples])
        present = np.unique(numbers)
        if self.training and processes.world_size() > 1:
            present = np.union1d(present, [self.names.index(name) for name in self._targets])
        choice = np.searchsorted(present, numbers)
        of_target = np.repeat(numbers, [len(example.targets) for example in examples])
        members = {_MEMBERS + self.names[n]: torch.from_numpy(np.flatnonzero(of_target == n)) for n in present}
        batch = collate(cast("Sequence[Example]", examples), config)._asdict()
        return batch | {"choice": torch.from_numpy(choice.astype(np.int64))} | members

    def order(self, examples: Sequence[TaskExample], config: TrainConfig, epoch: int) -> list[int]:  # type: ignore[override]
        """Raises ``ValueError`` for a task without a row: it would be saved as if it had learnt something."""
        rows = [[i for i, e in enumerate(examples) if e.task[0] == number] for number in range(len(self.names))]
        if [] in rows:
            raise ValueError(self._missing(self.names[rows.index([])]))
        counts = shares([len(of_task) for of_task in rows], self.temperature)
        placed = []
        for of_task, count in zip(rows, counts, strict=True):
            start = epoch * count  # in the task's own sequence of passes
            for j in range(count):
                turn, place = divmod(start + j, len(of_task))
                if j == 0 or place == 0:
                    own = epoch_order(len(of_task), config.seed, turn)
                placed.append(((j + 0.5) / count, of_task[own[place]]))
        return [index for _, index in sorted(placed, key=lambda item: item[0])]

    # A step

    def begin_step(  # type: ignore[override]
        self, examples: Sequence[TaskExample], config: TrainConfig, epoch: int, index: int
    ) -> None:
        """Count each task's targets, by which its gradient will be divided."""
        counts = [0] * len(self.names)
        for example in examples:
            counts[int(example.task[0])] += len(example.targets)
        self._targets = {name: count for name, count in zip(self.names, counts, strict=True) if count}

    def running(self, config: TrainConfig) -> AbstractContextManager[None]:
        """All tasks' adapters; refuses to resume a run that was begun with another sampling."""
        if before := settings_to_resume(config, MULTITASK_CONFIG):
            path, saved = before
            if saved != self._settings():
                raise CheckpointError(f"{path}: the run was begun with {saved}, not {self._settings()}")
        # No batch yet: this is for `prefix_length`, the least over all tasks.
        return self.model.mixing(self.names, torch.empty(0, dtype=torch.int64, device=self.model.device))

    def trained(self, config: TrainConfig) -> dict[str, nn.Parameter]:
        parameters: dict[str, nn.Parameter] = {}
        for name in self.names:
            parameters |= {f"{name}.adapter.{key}": p for key, p in self.model.adapters[name].named_parameters()}
            if name in self.heads:
                parameters |= {f"{name}.head.{key}": p for key, p in self.heads[name].named_parameters()}
        return parameters

    def optimizer(self, parameters: dict[str, nn.Parameter], config: TrainConfig) -> ClippedAdamW:
        """One for all tasks, before whose step each task's gradient becomes that of its own mean, clipped by itself."""
        self._stepped = {name: [] for name in self.names}
        for key, p in parameters.items():
            self._stepped[key.partition(".")[0]].append(p)
        optimizer = make_optimizer(parameters, dataclasses.replace(config, max_norm=math.inf))
        optimizer.register_step_pre_hook(lambda *_: self._part_tasks(config.max_norm))
        return optimizer

    @torch.no_grad()
    def _part_tasks(self, max_norm: float) -> None:
        """From the gradient of the mean over all targets to each task's own, no longer than ``max_norm``."""
        gradients = [[local(p.grad) for p in self._stepped[name] if p.grad is not None] for name in self._targets]
        # fp64: a norm is infinite only where a gradient is, and then it becomes NaN, which the optimizer refuses.
        norms = [torch._foreach_norm(of_task, 2.0, dtype=torch.float64) for of_task in gradients]
        first = norms[0][0].device
        squares = torch.stack([torch.stack([n.to(first) for n in of_task]).square().sum() for of_task in norms])
        if processes.is_sharded(self):
            squares = processes.total(squares)
        total = sum(self._targets.values())
        for of_task, square, targets in zip(gradients, squares.unbind(), self._targets.values(), strict=True):
            scale = (max_norm / (square.sqrt() * (total / targets) + 1e-6)).clamp(max=1) * (total / targets)
            for device in {g.device for g in of_task}:
                there = [g for g in of_task if g.device == device]
                torch._foreach_mul_(there, scale.to(device, torch.float32))

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None) -> Tensor:
        if prefix is None:
            return super().hidden(input_ids, attention_mask, None)
        # Cached up to the first adapter of all tasks; those that are present may begin later.
        start = min(prefix_length(self.model.adapter_config(name)) for name in self.names)
        return self.model.run_suffix(prefix, attention_mask, start)

    def forward(  # type: ignore[override]  # what `collate` adds
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        choice: Tensor,
        positions: Tensor | None = None,
        prefix: Tensor | None = None,
        **members: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy over all tasks, and how many targets are right (counted in eval mode only)."""
        of = {key.removeprefix(_MEMBERS): rows for key, rows in members.items()}
        with self.model.mixing(list(of), choice):
            hidden = self.hidden(input_ids, attention_mask, prefix)
        if positions is not None:
            return self.next_tokens(hidden.flatten(0, 1)[positions], targets)
        of_tasks = [
            self.scored(self._scores(name, hidden, attention_mask, rows), targets[rows]) for name, rows in of.items()
        ]
        losses, corrects = zip(*of_tasks, strict=True)
        return torch.stack(losses).sum(), torch.stack(corrects).sum()

    def _scores(self, name: str, hidden: Tensor, attention_mask: Tensor, rows: Tensor) -> Tensor:
        if len(rows) < len(hidden):
            hidden, attention_mask = hidden[rows], attention_mask[rows]
        return self.heads[name](hidden, attention_mask)

    # Scores

    def evaluate(  # type: ignore[override]
        self, run: nn.Module, examples: Sequence[TaskExample], feed: Feed, config: TrainConfig
    ) -> dict[str, float]:
        """``loss`` and ``accuracy`` over all targets, and ``NAME/loss``, ``NAME/accuracy``, ... of each task."""
        metrics: dict[str, float] = {}
        sums = dict.fromkeys(("loss", "accuracy", "targets", "seconds"), 0.0)
        for number, name in enumerate(self.names):
            mine: Any = [example for example in examples if example.task[0] == number]
            if not mine:
                continue
            one = super().evaluate(run, mine, feed, config)
            metrics |= {f"{name}/{key}": value for key, value in one.items()}
            for key in sums:
                sums[key] += one[key] * (one["targets"] if key in ("loss", "accuracy") else 1)
        sums["loss"] /= sums["targets"]
        sums["accuracy"] /= sums["targets"]
        return sums | {"tokens_per_second": count_tokens(examples) / sums["seconds"]} | metrics  # type: ignore[arg-type]

    @torch.no_grad()
    def predict(
        self, texts: Sequence[str], tasks: Sequence[str], config: TrainConfig, tokenizer: Any
    ) -> list[Prediction]:
        """The label of each text by its own task, in batches that mix them as they come.

        Args:
            texts: what to label, none empty.
            tasks: the task of each.
            config, tokenizer: those of the training.

        Raises:
            ValueError: a task that is not there or has no head, or another number of them.
        """
        if len(tasks) != len(texts):
            raise ValueError(f"tasks: expected one for each of {len(texts)} texts, got {len(tasks)}")
        if unknown := [name for name in tasks if name not in self.heads]:
            raise ValueError(f"tasks: expected some of {', '.join(self.heads)}, got {unknown[0]!r}")
        ids = tokenizer(list(texts))["input_ids"] if texts else []
        if [] in ids:
            raise ValueError(f"texts: expected none empty, got {texts[ids.index([])]!r}")
        none = np.empty(0, dtype=np.int64)
        examples = [
            TaskExample(np.array(tokens[: config.max_length]), np.zeros(1, np.int64), none, np.array([number]))
            for tokens, number in zip(ids, map(self.names.index, tasks), strict=True)
        ]
        size, feed = config.eval_batch_size or config.batch_size, Feed(self, config, None)
        predictions = []
        with left_as_found(self):
            self.eval()
            for start in range(0, len(examples), size):
                predictions += self._predict(feed(examples[start : start + size]), tasks[start : start + size])  # type: ignore[arg-type]
        return predictions

    def _predict(self, batch: Any, tasks: Sequence[str]) -> list[Prediction]:
        of = {key.removeprefix(_MEMBERS): rows for key, rows in batch.items() if key.startswith(_MEMBERS)}
        with self.model.mixing(list(of), batch["choice"]):
            hidden = self.hidden(batch["input_ids"], batch["attention_mask"], None)
        best: dict[int, tuple[float, int]] = {}
        for name, rows in of.items():
            probability, label = self._scores(name, hidden, batch["attention_mask"], rows).softmax(-1).max(-1)
            best |= dict(zip(rows.tolist(), zip(probability.tolist(), label.tolist(), strict=True), strict=True))
        labels = {name: head.labels for name in of if (head := self._head(name)) is not None}
        return [Prediction(name, labels[name][best[row][1]], best[row][0]) for row, name in enumerate(tasks)]

    # Files

    def save(self, directory: Path, config: TrainConfig) -> None:
        """A folder a task, ``tasks/NAME``, as a training of that task alone would leave it; and their names."""
        for name in self.names:
            save_task(self.folder(directory, name), self.model, self._head(name), config, name)
        write_json(directory / MULTITASK_CONFIG, self._settings())

    def _settings(self) -> dict[str, Any]:
        temperature = None if math.isinf(self.temperature) else self.temperature  # JSON has no infinity
        return {"format_version": FORMAT_VERSION, "tasks": self.names, "temperature": temperature}

    @staticmethod
    def folder(directory: str | os.PathLike[str], name: str) -> Path:
        """Where a run in ``directory`` saves a task."""
        return Path(directory) / TASKS_FOLDER / name

    @classmethod
    def from_pretrained(
        cls, llama: Any, directory: str | os.PathLike[str], *, fused: bool = True, liger: bool = False
    ) -> tuple["MultiTask", TrainConfig]:
        """All tasks of a saved run or checkpoint on ``llama``, and the configuration of their training.

        Raises:
            FileNotFoundError: a file is missing. ValueError: one is damaged or does not fit; the message names it.
        """
        folder = Path(directory) / TASKS_FOLDER
        path = Path(directory) / MULTITASK_CONFIG
        saved = read_json(path)
        names, temperature = saved.get("tasks"), saved.get("temperature", 0)
        if saved.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {saved.get('format_version')!r}")
        if not isinstance(names, list) or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise ValueError(f"{path}: field 'tasks': expected names, got {names!r}")
        if temperature is not None and type(temperature) not in (int, float):
            raise ValueError(f"{path}: field 'temperature': expected a number or null, got {temperature!r}")
        model = LlamaAdapter(llama, AdapterConfig(adapter_dim=1, layers=[0]), fused=fused, liger=liger)
        model.delete_adapter("default")
        heads = {}
        for name in names:
            config, head = load_task(folder / name)
            model.load_adapter(folder / name, name)
            if head is not None:
                heads[name] = head
        temperature = math.inf if temperature is None else temperature
        return cls(model, names, temperature=temperature, heads=heads), config


def shares(rows: Sequence[int], temperature: float) -> list[int]:
    """How many of an epoch's Σ ``rows`` places each task has: in proportion to n^(1/T), whole, and at least one.

    The largest remainders are rounded up; a task without rows has none.
    """
    total = sum(rows)
    weights = [n ** (1 / temperature) if n else 0.0 for n in rows]
    exact = [total * w / sum(weights) for w in weights]
    counts = [max(math.floor(e), 1) if n else 0 for e, n in zip(exact, rows, strict=True)]
    # Where a minimum of one took too many places, `behind` is negative and the largest tasks give them back.
    by_remainder = sorted(range(len(rows)), key=lambda t: counts[t] - exact[t])
    behind = total - sum(counts)
    for t in by_remainder[: max(behind, 0)]:
        counts[t] += 1
    for _ in range(-behind):
        counts[max(range(len(rows)), key=lambda t: counts[t])] -= 1
    return counts
