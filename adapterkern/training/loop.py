"""The training loop.

One step learns from ``batch_size · accumulation`` rows. Each forward gives the *sum* of its losses, and every sum is
divided by the number of targets in the whole step, which the host knows beforehand: rows and tokens weigh the same
however they fall on the forwards, and accumulating changes memory and nothing else.

Nothing in a step waits for the device, the fp16 scaler's decision excepted. Losses and gradient norms stay there until
a log line needs them; then each is checked, so that a number that is not finite is reported with its own step. Such a
step has changed no parameter: ClippedAdamW leaves everything as it was when the norm is not finite. On a CPU, where
looking costs nothing, every step is checked at once.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Example, Rows, count_targets, count_tokens, fingerprint
from adapterkern.training.data.prefix import PrefixCache, choose_cache
from adapterkern.training.data.rows import source_name
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.parallel.accelerator import left_as_found, make_accelerator
from adapterkern.training.parallel.deepspeed import Zero
from adapterkern.training.parallel.engine import Engine
from adapterkern.training.run import checkpoint
from adapterkern.training.run.folder import newest_checkpoint, prepare_folder, remove_earlier_run, write_run_card
from adapterkern.training.run.interrupt import StopRequest
from adapterkern.training.run.report import PLOT_NAME, Reporter, plot_history
from adapterkern.training.run.results import NonFiniteError, TrainResult
from adapterkern.training.task import Feed, Task, run_evaluation


def train(
    model: LlamaAdapter,
    train_data: Rows,
    config: TrainConfig | None = None,
    *,
    tokenizer: Any = None,
    eval_data: Rows | None = None,
    head: ClassificationHead | None = None,
    cache: PrefixCache | None = None,
    task: Task | None = None,
    on_start: Callable[[], object] | None = None,
) -> TrainResult:
    """Train the active adapter, with a classification head or as a language model.

    Args:
        model: on the device where it shall train. The backbone stays frozen.
        train_data, eval_data: see :func:`~adapterkern.training.data.examples.load_examples`; or what ``task`` loads.
        config: see :class:`TrainConfig`.
        tokenizer: the backbone's transformers tokenizer; not needed for rows of ``input_ids``.
        head: a head to train further; default a new one for the labels that the training data has.
        cache: activations of earlier runs on the same backbone, to use and to add to.
            Over several processes each has its own, of the texts that it trains on.
        task: another kind of training than ``config.task``, over the same ``model``; see :class:`Task`. It has its own
            head, and reads the data.
        on_start: called once, in the first process, when all has been checked and an earlier run replaced: for files of
            one's own in ``output_dir``, which are there also when the run is killed.

    Returns:
        a :class:`TrainResult`. After Ctrl-C (SIGINT) or SIGTERM its ``stopped`` is True, and with an ``output_dir`` a
        checkpoint of the last finished step exists, from which ``resume=True`` goes on to the numbers of an undisturbed
        run (to the bit on a CPU with as many threads). Over several processes, which all call this with the same
        arguments, they all return; the first has written everything, and has the whole history.

    Raises:
        DataError: rows that cannot be used, by file and line.
        NonFiniteError: a loss or gradient that is not finite, by step.
        CheckpointError: with ``resume``, a checkpoint that is damaged or of another run.
        FileExistsError: ``output_dir`` holds an earlier run. FileNotFoundError: there is none to resume.
        ValueError, TypeError: an argument that does not fit, by name.
        NotImplementedError: several processes, and an engine or a task that cannot use them.
    """
    config = config or TrainConfig()
    accelerator = make_accelerator(config.precision, model.device)
    processes.on_first(lambda: prepare_folder(config))
    if task is None:
        task = Task(model, None if head is None else head.to(model.device))
    elif task.model is not model or head is not None:
        raise ValueError("task: expected one over the same model, and no head beside it")
    train_set = task.load(train_data, config, tokenizer)
    eval_set = [] if eval_data is None else task.load(eval_data, config, tokenizer)
    set_seed(config.seed)
    with left_as_found(task), task.running(config):
        sources = source_name(train_data), None if eval_data is None else source_name(eval_data)
        return _Run(task, train_set, eval_set, config, cache, sources, accelerator).go(on_start)


@dataclasses.dataclass
class _Step:
    """A finished step whose numbers may still be on the device."""

    number: int
    loss: Tensor  # the mean over its targets
    grad_norm: Tensor | None  # None if the scaler skipped it


class _Run:
    """One training run: everything that a step needs, and the order in which steps, evaluations and files come."""

    def __init__(
        self,
        task: Task,
        train_set: list[Example],
        eval_set: list[Example],
        config: TrainConfig,
        cache: PrefixCache | None,
        sources: tuple[str, str | None],  # what the model card calls the data
        accelerator: Accelerator,
    ) -> None:
        self.task, self.model, self.config, self.accelerator = task, task.model, config, accelerator
        self.sources = sources
        self.train_set, self.eval_set = train_set, eval_set
        self.output_dir = None if config.output_dir is None else Path(config.output_dir)
        self.steps_per_epoch = math.ceil(len(train_set) / config.rows_per_step)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch
        # Refuses what it cannot order, before an earlier run is replaced.
        self.order = 0, task.order(train_set, config, 0)  # an epoch's number, and its order of rows
        backbone = checkpoint.describe_backbone(self.model)  # while this process has all of it
        zero = accelerator.distributed_type is DistributedType.DEEPSPEED
        self.engine = (Zero if zero else Engine)(task, config, accelerator, self.total_steps)
        # FSDP2 makes the task's class one of its own.
        self.kind = next(c.__name__ for c in type(task).__mro__ if not issubclass(c, FSDPModule))
        self.state = checkpoint.TrainingState(
            self.engine.parameters,
            self.engine.optimizer,
            self.engine.schedule,
            accelerator.scaler,
            config,
            fingerprint(train_set),
            {"task": self.kind, "adapters": self._trained_adapters(), "backbone": backbone},
        )
        self.feed = Feed(task, config, PrefixCache(config.prefix_cache_bytes) if cache is None else cache)
        self.pending: list[_Step] = []
        self.window_tokens = self.tokens = 0
        self.window_seconds = self.seconds = self.prefix_seconds = self.eval_seconds = 0.0
        self.prefix_layers = 0
        self.metrics: dict[str, float] | None = None
        self.metrics_step = 0
        self.checkpoint: Path | None = None

    def _trained_adapters(self) -> list[dict[str, Any]]:
        """The configurations of the adapters that are trained, whatever they are called."""
        owners = {id(p): name for name in self.model.adapters for p in self.model.adapters[name].parameters()}
        names = dict.fromkeys(owners[id(p)] for p in self.engine.parameters.values() if id(p) in owners)
        return [self.model.adapter_config(name).to_dict() for name in names]

    def go(self, on_start: Callable[[], object] | None) -> TrainResult:
        config, state = self.config, self.state
        if config.resume:
            assert self.output_dir is not None  # TrainConfig has checked it
            self.checkpoint = newest_checkpoint(self.output_dir)
            checkpoint.load_checkpoint(self.checkpoint, state)
        processes.on_first(lambda: self._prepare_files(on_start))
        try:
            self.engine.start()
            with (
                StopRequest() as stop,
                self._reporter() as report,
            ):
                if state.step:
                    report.say(f"resumed from {self.checkpoint}")
                processes.each(lambda: self._fill_cache(report, stop))
                self.engine.run.train()
                while state.step < self.total_steps and not self._stopped(stop):
                    self._timed_step(report)
                    self._after_step(report)
                if state.step < self.total_steps:
                    self._stop(report, stop.signal_name)
                else:
                    self._finish(report)
        finally:
            self.engine.end()
        return TrainResult(
            steps=state.step,
            stopped=state.step < self.total_steps,
            metrics=self.metrics,
            history=report.history,
            head=self.task.head,
            labels=[] if self.task.head is None else self.task.head.labels,
            trainable_parameters=sum(p.numel() for p in state.parameters.values()),
            skipped_steps=state.skipped_steps,
            seconds=self.seconds,
            prefix_seconds=self.prefix_seconds,
            eval_seconds=self.eval_seconds,
            tokens_per_second=self.tokens / self.seconds if self.seconds else 0.0,
            prefix_layers=self.prefix_layers,
            checkpoint=self.checkpoint,
        )

    def _prepare_files(self, on_start: Callable[[], object] | None) -> None:
        remove_earlier_run(self.config)
        if on_start is not None:
            on_start()

    def _reporter(self) -> Reporter:
        made: list[Reporter] = []  # it cannot be sent: every process has its own
        steps = self.total_steps, self.state.step
        processes.on_first(lambda: made.append(Reporter(self.output_dir, *steps, self.config.progress)))
        return made[0] if made else Reporter(None, *steps, show=False)

    def _stopped(self, stop: StopRequest) -> bool:
        """Whether a process has been asked to stop; told where the device is waited for anyway."""
        if processes.count() > 1 and self.model.device.type != "cpu" and not any(self._due()):
            return False
        return processes.any_process(bool(stop), self.model.device)

    # Before the first step

    def _fill_cache(self, report: Reporter, stop: StopRequest) -> None:
        examples = [*self._own(), *self.eval_set]
        config = self.config
        if self.state.step and config.prefix_cache is None and not processes.is_sharded(self.model):
            config = dataclasses.replace(config, prefix_cache=self.state.prefix_cached)
        passes = math.ceil(self.total_steps / self.steps_per_epoch)
        use, why = choose_cache(self.model, config, examples, passes)
        self.state.prefix_cached = use
        layers, depth = self.model.prefix_length, len(self.model.layers)
        report.say(f"prefix cache: {f'the first {layers} of {depth} layers, {why}' if use else f'off, since {why}'}")
        if not use:
            return
        started = time.perf_counter()
        bar = report.start_side_task("prefix", len(examples))

        def on_batch(count: int) -> bool:
            report.advance(bar, count)
            return not stop

        assert self.feed.cache is not None
        slots = self.feed.cache.fill(self.model, examples, self.config, self.accelerator.autocast, on_batch)
        report.end_side_task(bar)
        if slots is not None:
            self.feed.add(examples, slots)
            self.prefix_layers = layers
        self.prefix_seconds = time.perf_counter() - started

    def _own(self) -> list[Example]:
        """The training examples that this process will meet."""
        if processes.count() == 1:
            return self.train_set
        steps = range(self.state.step, self.total_steps)
        batches = (batch for step in steps for batch, _ in self._share(self._examples(step)))
        return list({id(example): example for batch in batches for example in batch}.values())

    # A step

    def _share(self, examples: list[Example]) -> list[tuple[list[Example], bool]]:
        return processes.share(examples, self.config.batch_size)

    def _timed_step(self, report: Reporter) -> None:
        started = time.perf_counter()
        examples = self._examples(self.state.step)
        self._step(examples)
        tokens = count_tokens(examples)
        self.tokens += tokens
        self.window_tokens += tokens
        report.step(self.state.step)
        if self.model.device.type == "cpu" or any(self._due()):
            self._drain()
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self.window_seconds += elapsed

    def _examples(self, step: int) -> list[Example]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, self.task.order(self.train_set, self.config, epoch)
        rows = self.config.rows_per_step
        return [self.train_set[i] for i in self.order[1][index * rows : (index + 1) * rows]]

    def _step(self, examples: list[Example]) -> None:
        state, targets = self.state, count_targets(examples)
        self.task.begin_step(examples, self.config, *divmod(state.step, self.steps_per_epoch))
        losses = []
        batches = self._share(examples)
        for number, (batch, counts) in enumerate(batches, start=1):
            loss, _ = self.engine.run(**self.feed(batch))
            loss = loss if counts else 0 * loss
            self.engine.backward(loss / targets, number == len(batches))
            losses.append(loss.detach())
        loss = processes.total(torch.stack(losses).sum()) / targets
        grad_norm = self.engine.step(loss)
        state.step += 1
        if grad_norm is None:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
        else:
            state.schedule.step()
            state.skipped_in_a_row = 0
        self.pending.append(_Step(state.step, loss, grad_norm))

    def _drain(self) -> None:
        """Take finished steps' numbers from the device, all at once, and refuse what is not finite."""
        columns = [step.loss if step.grad_norm is None else step.grad_norm for step in self.pending]
        values = torch.stack([torch.stack([s.loss, n]) for s, n in zip(self.pending, columns, strict=True)]).tolist()
        steps, self.pending = self.pending, []
        for step, (loss, norm) in zip(steps, values, strict=True):
            for quantity, value in (("the loss", loss), ("the gradient's norm", norm)):
                if not math.isfinite(value):
                    problem = f"{quantity} is {value}; the step was not made"
                    raise NonFiniteError(step.number, problem, self.checkpoint)
            self.state.window.append((loss, None if step.grad_norm is None else norm))
        if self.state.skipped_in_a_row > self.config.max_skipped_steps:
            problem = f"{self.state.skipped_in_a_row} steps in a row had gradients beyond fp16, whatever the scale"
            raise NonFiniteError(self.state.step, problem, self.checkpoint)

    # Between steps

    def _after_step(self, report: Reporter) -> None:
        log, evaluation, save = self._due()
        if log:
            self._log(report)
        if evaluation:
            self._evaluate(report)
        if save:
            self._save_checkpoint()

    def _due(self) -> tuple[bool, bool, bool]:
        """Whether a log line, an evaluation and a checkpoint follow this step. After the last step, `_finish` does."""
        config, step = self.config, self.state.step
        if step == self.total_steps:
            return True, False, False
        return (
            step % config.log_every == 0,
            step % (config.eval_every or self.steps_per_epoch) == 0,
            step % (config.checkpoint_every or self.steps_per_epoch) == 0,
        )

    def _log(self, report: Reporter) -> None:
        window, self.state.window = self.state.window, []
        norms = [norm for _, norm in window if norm is not None]
        report.train(
            {
                "step": self.state.step,
                "epoch": self.state.step / self.steps_per_epoch,
                "loss": sum(loss for loss, _ in window) / len(window),
                "lr": self.state.schedule.get_last_lr()[0],
                "grad_norm": sum(norms) / len(norms) if norms else 0.0,
                "tokens_per_second": self.window_tokens / self.window_seconds,
                "skipped_steps": self.state.skipped_steps,
            }
        )
        self.window_tokens, self.window_seconds = 0, 0.0

    def _evaluate(self, report: Reporter) -> None:
        if not self.eval_set:
            return
        metrics = run_evaluation(self.task, self.engine.run, self.eval_set, self.feed, self.config)
        self.eval_seconds += metrics["seconds"]
        if not math.isfinite(metrics["loss"]):
            problem = f"the evaluation's loss is {metrics['loss']}"
            raise NonFiniteError(self.state.step, problem, self.checkpoint)
        self.metrics, self.metrics_step = metrics, self.state.step
        report.evaluation({"step": self.state.step, "epoch": self.state.step / self.steps_per_epoch, **metrics})

    def _save_checkpoint(self) -> None:
        if self.output_dir is not None:
            whole = self.engine.whole()
            with self.engine.showing(whole.parameters):
                self.checkpoint = checkpoint.save_checkpoint(self.output_dir, self.state, whole, self._save_model)

    def _save_model(self, directory: Path) -> None:
        self.task.save(directory, self.config)
        data, eval_data = self.sources
        described = {
            "task": self.config.task if self.kind == Task.__name__ else self.kind,
            "data": os.path.basename(data),
            "examples": len(self.train_set),
            "steps": self.state.step,
            "eval_data": None if eval_data is None else os.path.basename(eval_data),
            "eval_examples": len(self.eval_set),
            "metrics": self.metrics,
            "metrics_step": self.metrics_step,
            "labels": () if self.task.head is None else self.task.head.labels,
        }
        write_run_card(directory, self.model, self.config, described)

    def _stop(self, report: Reporter, signal_name: str | None) -> None:
        if self.pending:
            self._drain()
        if self.state.step:
            self._save_checkpoint()
        where = f"{signal_name or 'another process'}: stopped after step {self.state.step} of {self.total_steps}"
        if self.output_dir is None:
            report.say(f"{where}; nothing is saved, for want of an output_dir")
        elif self.checkpoint is None:
            report.say(f"{where}; there is nothing to resume")
        else:
            report.say(
                f"{where}; saved {self.checkpoint}. The same call with resume=True (--resume) goes on from there"
            )

    def _finish(self, report: Reporter) -> None:
        self._evaluate(report)
        self._save_checkpoint()
        with self.engine.showing(self.engine.whole().parameters):
            processes.on_first(lambda: self._write_output(report))

    def _write_output(self, report: Reporter) -> None:
        if self.output_dir is not None:
            self._save_model(self.output_dir)
            if self.config.plot:
                plot_history(report.history, self.output_dir / PLOT_NAME, self.config.task)
